"""The fast steps against plain ones, and what is remembered of it. No GPU is needed: stand-ins differ where asked."""

import json
import math
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch

from nas_mnist.data.folds import search_split
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.training import loop, self_check
from nas_mnist.training.cuda_graph import CapturedStep
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.self_check import CHECKS, TOLERANCE, Comparison
from nas_mnist.training.steps import PlainSteps, make_steps

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SMALL = replace(CHECKS[0], line="c4 c6 M c8 G c10k1-")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.optimizer)
def test_compiled_steps_are_those_of_plain_pytorch_on_this_machine(check):
    found = self_check.compare(check, CPU)
    assert found.agrees and 0 < found.difference < TOLERANCE / 2 and found.speedup > 0


class Slanted(PlainSteps):
    """The eleventh step is wrong by a per cent of the rate, and those after it."""

    n_steps = 0

    def step(self, positions, learning_rate):
        self.n_steps += 1
        super().step(positions, learning_rate * (1.01 if self.n_steps > 10 else 1))


def test_a_rate_that_is_a_per_cent_too_large_is_seen(monkeypatch):
    monkeypatch.setattr(self_check, "make_steps", Slanted)
    found = self_check.compare(replace(CHECKS[0], learning_rate=1e-2), CPU)
    assert not found.agrees


def test_a_step_that_is_not_finite_is_a_difference(monkeypatch):
    class Nothing(PlainSteps):
        def run(self, positions, rates):
            return math.nan, 0

    monkeypatch.setattr(self_check, "make_steps", Nothing)
    found = self_check.compare(SMALL, CPU)
    assert math.isnan(found.difference) and not found.agrees


class Graph:
    """Stands for a CUDA graph: replays what was captured by calling it."""

    def __init__(self, step):
        self.replay = step


def captured(forgets: bool):
    """Makes steps that are captured as on a GPU; one that `forgets` sees the captured batch again and again."""

    def make(network, recipe, images, generator, rates):
        steps = PlainSteps(network, recipe, images, generator)
        steps._captured = CapturedStep(recipe.batch_size, generator, list(rates))
        return steps

    def capture(self, step):
        positions = self._positions.clone() if forgets else self._positions
        return Graph(lambda: self._run(step, positions))

    return make, capture


@pytest.mark.parametrize("forgets", [False, True])
def test_a_graph_that_does_not_see_the_next_batch_is_caught(monkeypatch, forgets):
    make, capture = captured(forgets)
    monkeypatch.setattr(CapturedStep, "_warm_up", CapturedStep._run)
    monkeypatch.setattr(CapturedStep, "_capture", capture)
    monkeypatch.setattr(self_check, "make_steps", make)
    assert self_check.compare(SMALL, CPU).agrees is not forgets


class Machine:
    """One GPU, whose captured steps differ by `difference`."""

    def __init__(self):
        self.name, self.difference, self.n_checks = "GPU A, driver 1", 1e-6, 0

    def compare_all(self, device):
        self.n_checks += 1
        return [Comparison("c10k28-", "sgd", 1e-7, 2.0), Comparison("c10k28-", "soap", self.difference, 2.0)]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    found = Machine()
    monkeypatch.setenv("NAS_MNIST_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(self_check, "identity", lambda device: found.name)
    monkeypatch.setattr(self_check, "compare_all", found.compare_all)
    monkeypatch.setattr(self_check, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
    self_check._found_here.cache_clear()
    yield found
    self_check._found_here.cache_clear()


def as_in_another_process():
    self_check._found_here.cache_clear()


def test_a_gpu_is_checked_once_and_again_with_another_driver(machine):
    for _ in range(3):
        as_in_another_process()
        assert self_check.is_trusted(GPU)
    assert machine.n_checks == 1
    machine.name = "GPU A, driver 2"
    assert self_check.is_trusted(GPU) and machine.n_checks == 2


@pytest.mark.parametrize("difference", [1e-2, math.nan])
def test_a_gpu_that_differs_is_warned_of_once_and_remembered(machine, difference):
    machine.difference = difference
    with pytest.warns(UserWarning, match="cuda:0: captured steps differ from plain ones") as warned:
        assert not self_check.is_trusted(GPU)
    as_in_another_process()
    assert not self_check.is_trusted(GPU)  # and a warning would be an error
    assert len(warned) == 1 and machine.n_checks == 1


def test_a_command_says_in_one_line_which_gpu_differs_each_time_it_is_run(machine):
    machine.difference = 0.5
    for _ in range(2):
        lines = []
        self_check.tell(["cpu", "cuda:0", "cuda:0"], lines.append)
        assert len(lines) == 1 and "\n" not in lines[0] and "cuda:0: captured steps differ" in lines[0]
    assert machine.n_checks == 1
    lines = []
    self_check.tell(["cpu"], lines.append)
    assert lines == []


def test_where_nothing_can_be_remembered_each_process_checks_once(machine, monkeypatch):
    monkeypatch.setenv("NAS_MNIST_DATA", "/proc/nothing")
    assert self_check.is_trusted(GPU) and self_check.is_trusted(GPU) and machine.n_checks == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"GPU A, driver 1": "small"}'])
def test_a_damaged_memory_counts_as_none(machine, tmp_path, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / self_check.VERDICTS).write_text(text)
    assert self_check.is_trusted(GPU) and machine.n_checks == 1
    assert json.loads((tmp_path / "data" / self_check.VERDICTS).read_text()) == {machine.name: machine.difference}


def test_a_cpu_is_trusted_without_a_check(machine):
    assert self_check.is_trusted(CPU) and machine.n_checks == 0


@pytest.mark.parametrize("trusted", [True, False])
def test_training_captures_no_steps_where_they_are_not_trusted(monkeypatch, images, trusted):
    """Steps whose rates are not told beforehand are never captured."""
    seen = []

    def make(network, recipe, images, generator, rates):
        seen.append(rates)
        return make_steps(network, recipe, images, generator, rates)

    monkeypatch.setattr(loop, "make_steps", make)
    monkeypatch.setattr(loop, "is_trusted", lambda device: trusted)
    split = search_split(images, 128)
    network = build(parse("c4 M c10k1- G"), seed=0)
    list(loop.train(network, Recipe(epochs=1, batch_size=64), split.train, split.val, seed=0))
    assert [rates is not None for rates in seen] == [trusted]


@pytest.fixture(params=range(torch.cuda.device_count()))
def gpu(request):
    return torch.device("cuda", request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.optimizer)
def test_captured_steps_are_those_of_plain_pytorch_on_this_machine(gpu, check):
    assert self_check.compare(check, gpu).agrees
