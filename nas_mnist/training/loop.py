"""Train a network and say after every epoch how it stands. Nothing here knows that a search exists."""

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_mnist.data.images import Images
from nas_mnist.errors import TrainingDiverged
from nas_mnist.kernels import operations as kernels
from nas_mnist.model.network import Network
from nas_mnist.training.augmentation import augment
from nas_mnist.training.averaging import N_UPDATES, AveragedWeights
from nas_mnist.training.cuda_graph import CapturedStep
from nas_mnist.training.evaluation import calibrate, evaluate
from nas_mnist.training.optimizers import make_optimizer, one_cycle
from nas_mnist.training.recipe import Recipe


@dataclass(frozen=True)
class EpochResult:
    """One epoch: losses in nats, accuracies as fractions; those of training are of augmented images, with dropout."""

    number: int  # from 1
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float  # of the epoch's last step
    train_seconds: float
    val_seconds: float
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
) -> Iterator[EpochResult]:
    """Train the network in place on the device it is on; yield one result an epoch.

    Batches, augmentation and dropout are drawn from one generator seeded with `seed`; the images are on the network's
    device. After `averaged_epochs` the averaged weights are validated too. Raises `TrainingDiverged` at the end of an
    epoch whose loss is not finite.
    """
    device = next(network.parameters()).device
    if device.type == "cpu":
        kernels.keep_memory()
    averaged = AveragedWeights(network) if averaged_epochs else None
    generator = torch.Generator(device).manual_seed(seed)
    network.draw_from(generator)
    steps = _Steps(network, recipe, train_images, generator, averaged)
    for number in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        train_loss, train_accuracy = steps.run_epoch()
        if not math.isfinite(train_loss):
            raise TrainingDiverged(f"the training loss was {train_loss} in epoch {number}: lower the learning rate")
        if recipe.calibrated:
            calibrate(network, train_images)
        trained = time.perf_counter()
        val_loss, val_accuracy = evaluate(network, val_images)
        of_averaged = (
            averaged.evaluate(train_images, val_images) if averaged and number in averaged_epochs else (None, None)
        )
        evaluated = time.perf_counter()
        yield EpochResult(
            number,
            train_loss,
            train_accuracy,
            val_loss,
            val_accuracy,
            learning_rate=steps.learning_rate,
            train_seconds=trained - start,
            val_seconds=evaluated - trained,
            averaged_loss=of_averaged[0],
            averaged_accuracy=of_averaged[1],
        )


def n_batches(n_images: int, recipe: Recipe) -> int:
    """Steps an epoch. A last batch of one image is left out: batch norm has no variance to divide by."""
    full, rest = divmod(n_images, recipe.batch_size)
    return full + (rest > 1)


class _Steps:
    """The steps of one training, and sums over an epoch: on the device, so that no step waits for the host."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        images: Images,
        generator: torch.Generator,
        averaged: AveragedWeights | None = None,
    ):
        self._network, self._recipe, self._images, self._generator = network, recipe, images, generator
        self._averaged = averaged
        self._optimizer = make_optimizer(network, recipe)
        n_steps = recipe.epochs * n_batches(len(images), recipe)
        rates = one_cycle(recipe.learning_rate, n_steps, recipe.warmup_fraction)
        self._rates = iter(rates)
        self._loss_sum = torch.zeros((), device=generator.device)
        self._n_correct = torch.zeros((), dtype=torch.int64, device=generator.device)
        on_gpu = generator.device.type == "cuda"
        self._captured = CapturedStep(recipe.batch_size, generator, rates) if on_gpu else None
        self.learning_rate = 0.0  # of the last step

    def run_epoch(self) -> tuple[float, float]:
        """Train on every image once: mean loss in nats, and accuracy."""
        self._network.train()
        self._loss_sum.zero_()
        self._n_correct.zero_()
        n_seen = n_averaged = 0
        for positions in self._images.shuffled(self._recipe.batch_size, self._generator):
            if len(positions) < 2:
                continue
            self.learning_rate = next(self._rates)
            self._optimizer.prepare()
            if self._captured:
                self._captured(self.step, positions)
            else:
                self.step(positions, self.learning_rate)
            n_seen += len(positions)
            if self._averaged and n_seen * N_UPDATES // len(self._images) > n_averaged:
                n_averaged = n_seen * N_UPDATES // len(self._images)
                self._averaged.update()
        return self._loss_sum.item() / n_seen, self._n_correct.item() / n_seen

    def step(self, positions: Tensor, learning_rate: float | Tensor) -> None:
        """One batch, from the images at these positions (B,) to the new weights."""
        pixels, labels = self._images.select(positions)
        logits = self._network(augment(pixels, self._recipe.augmentation, self._images.normalisation, self._generator))
        loss = F.cross_entropy(logits, labels, label_smoothing=self._recipe.label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step(learning_rate)
        self._loss_sum += loss.detach() * len(labels)
        self._n_correct += (logits.argmax(1) == labels).sum()
