"""What each kind of instruction of a training step takes: each is run alone, in turn, with the maps of a real step."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from networks import Case

from nas_mnist.data.images import Images
from nas_mnist.kernels.instructions import SWEEP, Mode, Op
from nas_mnist.kernels.interpreter import Results
from nas_mnist.kernels.optimizers import PRECONDITION_FREQUENCY
from nas_mnist.model.network import build
from nas_mnist.training.augmentation import draw_matrices
from nas_mnist.training.plan import Instruction, Plan
from nas_mnist.training.program import Program

N_STEPS = 21
OPTIMIZER = "optimizer"


def seconds_of_kinds(case: Case, images: Images) -> dict[str, float]:
    """Seconds of one step for each kind of instruction; what Python adds between calls of the program is `host`."""
    program = Program(build(case.architecture, seed=0), Mode.TRAIN, case.batch_size, case.recipe)
    batch = Batch(case, images)
    batch.whole_steps(program, N_STEPS)  # so that SOAP's bases are those of gradients
    seconds: dict[str, float] = defaultdict(float)
    for n_steps, share in (PRECONDITION_FREQUENCY + 1, 1 / PRECONDITION_FREQUENCY), (2, 1 - 1 / PRECONDITION_FREQUENCY):
        program.n_steps = n_steps  # before the step that renews SOAP's bases, and before another one
        for instruction, own in zip(program.plan.instructions, time_instructions(program, batch), strict=True):
            seconds[kind(instruction)] += share * own
    whole = min(batch.whole_steps(program, PRECONDITION_FREQUENCY) for _ in range(5))  # the least disturbed
    seconds["host"] = max(0.0, whole - sum(seconds.values()))
    return dict(seconds)


def kind(instruction: Instruction) -> str:
    if instruction.filter:
        pointwise = instruction.filter.shape[1:] != (1, 1, 1) and instruction.filter.shape[2:] == (1, 1)
        return "depthwise" if instruction.filter.depthwise else "pointwise" if pointwise else "dense"
    if instruction.parameters:
        return OPTIMIZER
    if instruction.following:
        return "norm and ReLU"
    return "augmentation" if instruction.op == Op.AUGMENT else "loss, pool"


class Batch:
    """The same images in every step."""

    def __init__(self, case: Case, images: Images):
        self.images, self.size, self.recipe = images, case.batch_size, case.recipe
        self.generator = torch.Generator().manual_seed(0)
        self.positions = torch.arange(self.size) * 7
        self.matrices = self.draw(1)

    def draw(self, n_steps: int) -> torch.Tensor:
        side = self.images.pixels.shape[-1]
        return draw_matrices(n_steps * self.size, side, self.recipe.augmentation, self.generator)

    def whole_steps(self, program: Program, n: int) -> float:
        """Seconds of one of them."""
        start = time.perf_counter()
        rates = [self.recipe.learning_rate / 100] * n
        program.run(self.images, self.positions.repeat(n), rates, matrices=self.draw(n), seed=1)
        return (time.perf_counter() - start) / n

    def call(self, program: Program) -> None:
        """One step of the program's table as it is, and nothing besides."""
        chosen, results = self.images.indices[self.positions].numpy(), Results(np.zeros(1), np.zeros(1, np.int64))
        program._call(self.images, program._settings, chosen, self.matrices.numpy(), [0.0], 1, results)


def time_instructions(program: Program, batch: Batch) -> list[float]:
    """Medians, in the order of a step, so that each finds the caches as the one before leaves them."""
    whole = program.plan
    parts = [replace(whole, table=row) for row in _rows(whole)]
    nothing, times = replace(whole, table=whole.table[:0]), [[] for _ in parts]
    overhead = []
    try:
        for _ in range(N_STEPS):
            for part, own in zip(parts, times, strict=True):
                program.plan = part
                own.append(seconds_of(lambda: batch.call(program)))
            program.plan = nothing
            overhead.append(seconds_of(lambda: batch.call(program)))
    finally:
        program.plan = whole
    return [max(0.0, statistics.median(own) - statistics.median(overhead)) for own in times]


def _rows(plan: Plan) -> Iterator[np.ndarray]:
    """The table of each instruction alone (1, COLUMNS): channel by channel if it is part of a sweep."""
    for start, n in zip(accumulate(plan.sweeps, initial=0), plan.sweeps, strict=False):
        for i in range(start, start + n):
            row = plan.table[i : i + 1].copy()
            row[0, SWEEP] = n > 1
            yield row


def seconds_of(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
