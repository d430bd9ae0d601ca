"""Train a network and say after every epoch how it stands. Nothing here knows that a search exists."""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nas_mnist.data.images import Images
from nas_mnist.errors import TrainingDiverged
from nas_mnist.model.network import Network
from nas_mnist.training.averaging import N_UPDATES, AveragedWeights
from nas_mnist.training.evaluation import evaluate, recalibrate
from nas_mnist.training.optimizers import learning_rates
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.self_check import is_trusted
from nas_mnist.training.steps import Steps, make_steps


@dataclass(frozen=True)
class EpochResult:
    """One epoch: losses in nats, accuracies as fractions; those of training are of augmented images, with dropout.

    Its seconds are also those of the epochs before it that were not judged.
    """

    number: int  # from 1
    train_loss: float
    train_accuracy: float
    eval_loss: float
    eval_accuracy: float
    learning_rate: float  # of the epoch's last step
    train_seconds: float
    eval_seconds: float
    averaged_loss: float | None = None  # in validation, of the mean of the recent weights; None: not asked for
    averaged_accuracy: float | None = None


def train(
    network: Network,
    recipe: Recipe,
    train_images: Images,
    val_images: Images,
    *,
    seed: int,
    averaged_epochs: Collection[int] = (),
    judged_epochs: Collection[int] | None = None,
) -> Iterator[EpochResult]:
    """Train the network in place on the device it is on; yield one result an epoch, or for each of `judged_epochs`.

    Batches, augmentation and dropout are drawn from one generator seeded with `seed`; the images are on the network's
    device. After `averaged_epochs` the averaged weights are validated too. Raises `TrainingDiverged` at the end of an
    epoch whose loss is not finite.
    """
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    n_steps = n_batches(len(train_images), recipe)
    rates = learning_rates(recipe, recipe.epochs * n_steps)
    averaged = AveragedWeights(network) if averaged_epochs else None
    known_rates = rates if is_trusted(device) else None
    steps = make_steps(network, recipe, train_images, generator, known_rates)
    start = time.perf_counter()
    for number in range(1, recipe.epochs + 1):
        own_rates = rates[(number - 1) * n_steps : number * n_steps]
        positions = torch.randperm(len(train_images), generator=generator, device=device)
        positions = positions[: n_steps * recipe.batch_size]  # without a last batch of one image
        loss_sum, n_correct = _run(steps, positions, own_rates, recipe.batch_size, averaged)
        train_loss, train_accuracy = loss_sum / len(positions), n_correct / len(positions)
        if not math.isfinite(train_loss):
            raise TrainingDiverged(f"the training loss was {train_loss} in epoch {number}: lower the learning rate")
        if judged_epochs is not None and number not in judged_epochs:
            continue
        if recipe.recalibrated:
            recalibrate(network, train_images)
        trained = time.perf_counter()
        eval_loss, eval_accuracy = evaluate(network, val_images)
        of_averaged = (
            averaged.evaluate(train_images, val_images) if averaged and number in averaged_epochs else (None, None)
        )
        evaluated = time.perf_counter()
        yield EpochResult(
            number,
            train_loss,
            train_accuracy,
            eval_loss,
            eval_accuracy,
            learning_rate=own_rates[-1],
            train_seconds=trained - start,
            eval_seconds=evaluated - trained,
            averaged_loss=of_averaged[0],
            averaged_accuracy=of_averaged[1],
        )
        start = time.perf_counter()


def _run(
    steps: Steps, positions: Tensor, rates: Sequence[float], batch_size: int, averaged: AveragedWeights | None
) -> tuple[float, int]:
    """The steps of an epoch in some twenty parts, after each of which the weights are averaged, if they are to be."""
    n = -(-len(rates) // N_UPDATES)
    loss_sum, n_correct = 0.0, 0
    for part, own_rates in zip(positions.split(n * batch_size), _split(rates, n), strict=True):
        loss, correct = steps.run(part, own_rates)
        loss_sum, n_correct = loss_sum + loss, n_correct + correct
        if averaged:
            averaged.update()
    return loss_sum, n_correct


def _split(rates: Sequence[float], n: int) -> list[Sequence[float]]:
    return [rates[start : start + n] for start in range(0, len(rates), n)]


def n_batches(n_images: int, recipe: Recipe) -> int:
    """Steps an epoch. A last batch of one image is left out: batch norm has no variance to divide by."""
    full, rest = divmod(n_images, recipe.batch_size)
    return full + (rest > 1)
