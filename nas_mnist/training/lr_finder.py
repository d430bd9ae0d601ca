"""A learning-rate range test: the rate rises from batch to batch until the loss explodes.

L. N. Smith, Cyclical Learning Rates for Training Neural Networks, 2015 (arXiv 1506.01186).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from nas_mnist.data.images import Images
from nas_mnist.errors import NasMnistError, TrainingDiverged
from nas_mnist.model.architecture import Architecture
from nas_mnist.model.network import build
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import make_steps

MIN_STEPS = 50
SMOOTHING_STEPS = 6  # standard deviation of the Gaussian; symmetric, or it would push the suggestions to the right
DIVERGED = 4  # times the lowest loss
RUNNING_MEAN_KEEP = 0.8  # of the mean that decides when to stop: one bad batch does not
LEAST_FALL = 0.05  # of the first loss; less is noise


@dataclass(frozen=True)
class RateRange:
    """The rates to try: from `lowest` to `highest`, each step by the same factor."""

    lowest: float = 1e-5
    highest: float = 10.0
    n_steps: int = 300

    def __post_init__(self):
        if not 0 < self.lowest < self.highest < math.inf:
            raise NasMnistError(
                f"learning rates must rise from above 0, not from {self.lowest:g} to {self.highest:g}",
                "lowest",
                "highest",
            )
        if self.n_steps < MIN_STEPS:
            raise NasMnistError(f"a range test needs at least {MIN_STEPS} steps, not {self.n_steps}", "n_steps")

    def rates(self) -> list[float]:
        return np.geomspace(self.lowest, self.highest, self.n_steps).tolist()


@dataclass(frozen=True)
class RateStep:
    """One batch: the rate it was trained with, and its loss in nats before that step."""

    learning_rate: float
    loss: float


@dataclass(frozen=True)
class RateCurve:
    """What a range test found. `smoothed_losses` is what the suggestions are read from."""

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed_losses: tuple[float, ...]
    steepest: float  # the rate at which the loss falls fastest
    minimum: float  # the rate at which it is lowest, and about to rise

    @property
    def tenth_of_minimum(self) -> float:
        """The customary margin below the rate that is too high."""
        return self.minimum / 10


def range_test(
    architecture: Architecture,
    recipe: Recipe,
    images: Images,
    rates: RateRange,
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Iterator[RateStep]:
    """Build the network and train it, one batch a rate, until the range ends or the loss diverges.

    Optimiser, batches and augmentation are the recipe's.
    """
    images = images.to(torch.device(device))
    network = build(architecture, seed=seed, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    steps = make_steps(network, recipe, images, generator)
    mean, lowest = None, math.inf
    for rate, positions in zip(rates.rates(), _endless_batches(images, recipe, generator), strict=False):
        value = steps.run(positions, [rate])[0] / len(positions)
        mean = value if mean is None else RUNNING_MEAN_KEEP * mean + (1 - RUNNING_MEAN_KEEP) * value
        lowest = min(lowest, mean)
        if not math.isfinite(value) or mean > DIVERGED * lowest:
            return
        yield RateStep(rate, value)


def _endless_batches(images: Images, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of shuffled batches of full size, epoch after epoch."""
    size = min(recipe.batch_size, len(images))
    while True:
        yield from (positions for positions in images.shuffled(size, generator) if len(positions) == size)


def fit(steps: Iterable[RateStep]) -> RateCurve:
    """Smooth the losses and read the two suggestions from them.

    Raises `TrainingDiverged` if the loss never fell: the range starts too high.
    """
    steps = list(steps)
    losses = np.array([step.loss for step in steps])
    smoothed = gaussian_filter1d(losses, SMOOTHING_STEPS, mode="nearest") if len(steps) else losses
    lowest = int(smoothed.argmin()) if len(steps) >= MIN_STEPS // 2 else 0
    if lowest < 2 or smoothed[0] - smoothed[lowest] < LEAST_FALL * smoothed[0]:
        raise TrainingDiverged(
            "the loss never fell at these learning rates: start lower, or take more steps", "lowest", "n_steps"
        )
    steepest = int(np.gradient(smoothed)[: lowest + 1].argmin())  # the steps are even on a logarithmic scale
    rates = tuple(step.learning_rate for step in steps)
    return RateCurve(rates, tuple(losses.tolist()), tuple(smoothed.tolist()), rates[steepest], rates[lowest])
