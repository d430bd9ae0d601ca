"""The captured training step. What needs a GPU is skipped without one."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nas_mnist import augment, cuda_graph, data, network, training
from nas_mnist.architecture import parse
from nas_mnist.cuda_graph import WARM_UP_STEPS, CapturedStep
from nas_mnist.training import Recipe, train

NETWORK = parse("c8 c16 M c8k1 d12 c16 G c16k1 c10k1- | dropout=0.05")
RECIPE = Recipe(epochs=2, batch_size=64, label_smoothing=0.02, learning_rate=1e-4)
# For a value, for the number of results, for a tensor made of Python's numbers.
HOST_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"}


class Operations(TorchDispatchMode):
    """Notes the name of each operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_operation_of_a_step_waits_for_the_host(images, monkeypatch, optimizer):
    monkeypatch.setattr(network, "_has_kernels", lambda module, x: False)  # as on a GPU
    monkeypatch.setattr(augment, "affine", augment._affine)
    generator = torch.Generator().manual_seed(0)
    net = network.build(NETWORK, seed=0).train()
    net.draw_from(generator)
    steps = training._Steps(net, replace(RECIPE, optimizer=optimizer), images, generator)
    steps.step(torch.arange(64), 0.1)
    with Operations() as operations:
        steps.step(torch.arange(64, 128), 0.1)
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
def without_gpu(monkeypatch):
    """A captured step whose graph is made in Python."""
    graphs = []

    def capture(self):
        graphs.append(Graph(lambda: self._step(self._positions, self._learning_rate)))
        return graphs[-1]

    monkeypatch.setattr(CapturedStep, "_warm_up", lambda self, positions: self._step(positions, self._learning_rate))
    monkeypatch.setattr(CapturedStep, "_capture", capture)
    return graphs


def test_it_is_captured_once_and_sees_every_batch_and_rate(without_gpu):
    seen = []
    captured = CapturedStep(lambda p, rate: seen.append((p.tolist(), round(float(rate), 3))), 4, torch.Generator())
    batches = [torch.arange(4) + i for i in range(6)]
    for i, batch in enumerate([*batches[:5], torch.arange(3), batches[5]]):
        captured(batch, i / 10)
    assert seen == [(b.tolist(), i / 10) for i, b in enumerate([*batches[:5], torch.arange(3), batches[5]])]
    assert [graph.n_replays for graph in without_gpu] == [6 - WARM_UP_STEPS]


def test_a_step_that_cannot_be_captured_is_started_by_the_host(without_gpu, monkeypatch):
    def fail(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturedStep, "_capture", fail)
    seen = []
    captured = CapturedStep(lambda positions, rate: seen.append(positions.tolist()), 2, torch.Generator())
    with pytest.warns(UserWarning, match="no CUDA graph, so each training step takes longer: operation not permitted"):
        for i in range(WARM_UP_STEPS + 2):
            captured(torch.tensor([i, i]), 0.1)
    assert seen == [[i, i] for i in range(WARM_UP_STEPS + 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_captured_training_is_that_of_the_plain_path(images, monkeypatch, optimizer):
    device = torch.device("cuda")
    split = data.search_split(images, 20 * 64 + 17)
    split = data.Split(split.train.to(device), split.val.to(device))
    recipe = replace(RECIPE, optimizer=optimizer)

    def run():
        built = network.build(NETWORK, seed=0, device=device)
        return [e.train_loss for e in train(built, recipe, split.train, split.val, seed=0)]

    captured = run()
    monkeypatch.setattr(cuda_graph, "WARM_UP_STEPS", 10**9)
    assert run() == pytest.approx(captured, rel=1e-4)
