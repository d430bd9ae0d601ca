"""The captured training step. What needs a GPU is skipped without one."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nas_mnist.data.folds import search_split
from nas_mnist.model import network
from nas_mnist.model.architecture import parse
from nas_mnist.training import cuda_graph
from nas_mnist.training.cuda_graph import WARM_UP_STEPS, CapturedStep
from nas_mnist.training.loop import train
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import PlainSteps

NETWORK = parse("c8 c16 M c8k1 d12 c16 G c16k1 c10k1- | dropout=0.05")
RECIPE = Recipe(epochs=2, batch_size=64, label_smoothing=0.02, learning_rate=1e-4)
# For a value, for the number of results, for a tensor made of Python's numbers.
HOST_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh"}


class Operations(TorchDispatchMode):
    """Notes the name of each operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "soap"])
def test_no_operation_of_a_step_waits_for_the_host(images, monkeypatch, optimizer):
    if optimizer == "soap":
        monkeypatch.setattr(
            "nas_mnist.training.optimizers.adamw", lambda *args, **settings: None
        )  # held to it as "adamw"
    generator = torch.Generator().manual_seed(0)
    net = network.build(NETWORK, seed=0).train()
    steps = PlainSteps(net, replace(RECIPE, optimizer=optimizer), images, generator)
    captured = CapturedStep(64, generator, [0.1, 0.1])

    def step(positions, rate):  # SGD on a CPU asks a rate that is a tensor for its value; on a GPU, fused, it does not
        steps.step(positions, rate if optimizer == "soap" else 0.1)

    steps._optimizer.prepare()
    captured._run(step, torch.arange(64))
    steps._optimizer.prepare()
    with Operations() as operations:
        captured._run(step, torch.arange(64, 128))
    assert "aten::grid_sampler_2d" in operations.names and "aten::convolution_backward" in operations.names
    own = {"aten::_local_scalar_dense"} if optimizer == "adamw" else set()  # of AdamW on a CPU, which counts its steps
    assert not operations.names & (HOST_WAITS - own)


class Graph:
    """Stands for a CUDA graph: replays what was captured by calling it."""

    def __init__(self, step):
        self.step, self.n_replays = step, 0

    def replay(self):
        self.n_replays += 1
        self.step()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were captured, in Python."""
    made = []

    def capture(self, step):
        made.append(Graph(lambda: self._run(step, self._positions)))
        return made[-1]

    monkeypatch.setattr(CapturedStep, "_warm_up", CapturedStep._run)
    monkeypatch.setattr(CapturedStep, "_capture", capture)
    return made


def test_it_is_captured_once_and_sees_every_batch_and_rate(graphs):
    seen = []
    whole = [torch.arange(4) + i for i in range(6)]
    batches = [*whole[:5], torch.arange(3), whole[5]]
    captured = CapturedStep(4, torch.Generator(), [i / 10 for i in range(len(batches))])
    for batch in batches:
        captured(lambda positions, rate: seen.append((positions.tolist(), round(float(rate), 3))), batch)
    assert seen == [(batch.tolist(), i / 10) for i, batch in enumerate(batches)]
    assert [graph.n_replays for graph in graphs] == [6 - WARM_UP_STEPS]


def test_a_step_that_cannot_be_captured_is_started_by_the_host(graphs, monkeypatch):
    def fail(self, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedStep, "_capture", fail)
    seen = []
    captured = CapturedStep(2, torch.Generator(), [0.1] * (WARM_UP_STEPS + 2))
    with pytest.warns(UserWarning, match="no CUDA graph, so each training step takes longer: operation") as warned:
        for i in range(WARM_UP_STEPS + 2):
            captured(lambda positions, rate: seen.append(positions.tolist()), torch.tensor([i, i]))
    assert seen == [[i, i] for i in range(WARM_UP_STEPS + 2)] and len(warned) == 1


def test_a_finished_training_leaves_nothing_behind(images):
    """Or the memory of a GPU would fill from trial to trial, until Python looks for cycles."""
    net = network.build(NETWORK, seed=0)
    steps = PlainSteps(net, RECIPE, images, torch.Generator())
    steps._captured = CapturedStep(64, torch.Generator(), [0.1])
    gone = weakref.ref(steps._captured)
    gc.disable()
    try:
        del steps
        assert gone() is None
    finally:
        gc.enable()


@pytest.fixture(params=range(torch.cuda.device_count()))
def gpu(request):
    return torch.device("cuda", request.param)


def train_losses(gpu, images, recipe):
    split = search_split(images, 20 * 64 + 17)
    built = network.build(NETWORK, seed=0, device=gpu)
    return [e.train_loss for e in train(built, recipe, split.train.to(gpu), split.val.to(gpu), seed=0)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "soap"])
def test_captured_training_is_that_of_the_plain_path(gpu, images, monkeypatch, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer)
    captured = train_losses(gpu, images, recipe)
    assert train_losses(gpu, images, recipe) == pytest.approx(captured, rel=1e-4)  # a second graph in this process
    monkeypatch.setattr(cuda_graph, "WARM_UP_STEPS", 10**9)
    assert train_losses(gpu, images, recipe) == pytest.approx(captured, rel=1e-4)


def test_training_goes_on_after_a_capture_that_failed(gpu, images, monkeypatch):
    step = PlainSteps.step
    monkeypatch.setattr(PlainSteps, "step", lambda *args: (step(*args), args[0]._loss_sum.item()))
    with pytest.warns(UserWarning, match="no CUDA graph"):
        losses = train_losses(gpu, images, RECIPE)
    assert losses[-1] < losses[0]
