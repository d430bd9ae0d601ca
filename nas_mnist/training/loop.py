"""Train a network and say after every epoch how it stands. Nothing here knows that a search exists."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_mnist.data.images import Images
from nas_mnist.errors import TrainingDiverged
from nas_mnist.kernels import operations as kernels
from nas_mnist.model.network import Network
from nas_mnist.task import MAX_EPOCHS, N_FINAL_EPOCHS
from nas_mnist.training.augmentation import Augmentation, augment, normalise
from nas_mnist.training.cuda_graph import CapturedStep
from nas_mnist.training.optimizers import AdamW, Optimizer, Sgd, Soap, one_cycle

EVALUATION_BATCH = {"cpu": 128, "cuda": 2500}  # a CPU is twice as fast while the maps fit its cache
N_CALIBRATION_IMAGES = 5000


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The learning rate rises to its maximum and falls to almost nothing: `one_cycle`."""

    epochs: int = MAX_EPOCHS
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw", "soap"] = "sgd"  # sgd: Nesterov momentum
    learning_rate: float = 0.1  # the maximum, per step
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_fraction: float = 0.2  # of all steps, until the learning rate is at its maximum
    augmentation: Augmentation = field(default_factory=Augmentation)
    calibrated: bool = False  # batch norm's statistics are measured anew after every epoch: `calibrate`

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(
                f"a recipe needs at least 1 epoch and 2 images a batch, not {self.epochs} and {self.batch_size}"
            )


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


def train(
    network: Network, recipe: Recipe, train_images: Images, val_images: Images, *, seed: int
) -> Iterator[EpochResult]:
    """Train the network in place on the device it is on; yield one result an epoch.

    Batches, augmentation and dropout are drawn from one generator seeded with `seed`; the images are on the network's
    device. Raises `TrainingDiverged` at the end of an epoch whose loss is not finite.
    """
    device = next(network.parameters()).device
    if device.type == "cpu":
        kernels.keep_memory()
    generator = torch.Generator(device).manual_seed(seed)
    network.draw_from(generator)
    steps = _Steps(network, recipe, train_images, generator)
    for number in range(1, recipe.epochs + 1):
        start = time.perf_counter()
        train_loss, train_accuracy = steps.run_epoch()
        if not math.isfinite(train_loss):
            raise TrainingDiverged(f"the training loss was {train_loss} in epoch {number}: lower the learning rate")
        if recipe.calibrated:
            calibrate(network, train_images)
        trained = time.perf_counter()
        val_loss, val_accuracy = evaluate(network, val_images)
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
        )


def final_accuracy(val_accuracies: list[float]) -> float:
    """The objective: the mean validation accuracy of the last two epochs (of one, if there was but one)."""
    last = val_accuracies[-N_FINAL_EPOCHS:]
    return sum(last) / len(last)


def n_batches(n_images: int, recipe: Recipe) -> int:
    """Steps an epoch. A last batch of one image is left out: batch norm has no variance to divide by."""
    full, rest = divmod(n_images, recipe.batch_size)
    return full + (rest > 1)


@torch.no_grad()
def calibrate(network: Network, images: Images) -> None:
    """Give batch norm the mean statistics of these images (of up to 5,000), not augmented and without dropout.

    The running ones are of augmented images, which the network will not be asked about, and of the last batches.
    As `torch.optim.swa_utils.update_bn`; Y. Wu and J. Johnson, Rethinking "Batch" in BatchNorm, 2021, arXiv 2105.07576.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the mean over all batches
    size = min(EVALUATION_BATCH[images.labels.device.type], len(images))
    spread = torch.arange(size, device=images.labels.device) * len(images) // size
    # The images of a split come class by class, and each batch is to have all classes.
    for start in range(min(len(images), N_CALIBRATION_IMAGES) // size):
        pixels, _ = images.select(spread + start)
        network(normalise(pixels, images.normalisation))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def predict(network: Network, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, 10) and labels (B,) of every image in order, batch by batch, in evaluation mode."""
    network.eval()
    for pixels, labels in images.batches(EVALUATION_BATCH[images.labels.device.type]):
        yield network(normalise(pixels, images.normalisation)), labels


def evaluate(network: Network, images: Images) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the fraction that is classified right."""
    loss = torch.zeros((), device=images.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    for logits, labels in predict(network, images):
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(images), correct.item() / len(images)


def find_mistakes(network: Network, images: Images) -> list[tuple[int, int, int]]:
    """What is classified wrong: index in the data set, label, prediction."""
    predictions = torch.cat([logits.argmax(1) for logits, _ in predict(network, images)])
    labels = images.labels[images.indices]
    wrong = (predictions != labels).nonzero().flatten()
    return list(zip(images.indices[wrong].tolist(), labels[wrong].tolist(), predictions[wrong].tolist(), strict=True))


class _Steps:
    """The steps of one training, and sums over an epoch: on the device, so that no step waits for the host."""

    def __init__(self, network: Network, recipe: Recipe, images: Images, generator: torch.Generator):
        self._network, self._recipe, self._images, self._generator = network, recipe, images, generator
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
        n_seen = 0
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


def make_optimizer(network: Network, recipe: Recipe) -> Optimizer:
    """The recipe's optimiser for the network's parameters."""
    if recipe.optimizer == "sgd":
        return Sgd(network.parameters(), recipe.weight_decay, recipe.momentum)
    return {"adamw": AdamW, "soap": Soap}[recipe.optimizer](network.parameters(), recipe.weight_decay)
