"""What a network can do: its batch norms recalibrated, its logits, its loss and accuracy, its mistakes."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_mnist.data.images import Images
from nas_mnist.kernels.instructions import Mode
from nas_mnist.model.network import Network
from nas_mnist.task import N_FINAL_EPOCHS
from nas_mnist.training.augmentation import normalise, seen_by
from nas_mnist.training.program import Program, can_compile

EVALUATION_BATCH = {"cpu": 128, "cuda": 2500}  # a CPU is twice as fast while the maps fit its cache
PROGRAM_BATCH = 64  # of a compiled evaluation
N_RECALIBRATION_IMAGES = 5000


def final_accuracy(val_accuracies: list[float]) -> float:
    """The objective: the mean validation accuracy of the last two epochs (of one, if there was but one)."""
    last = val_accuracies[-N_FINAL_EPOCHS:]
    return sum(last) / len(last)


@torch.no_grad()
def recalibrate(network: Network, images: Images) -> None:
    """Give batch norm the mean statistics of these images (of up to 5,000), not augmented and without dropout.

    The running ones are of augmented images, which the network will not be asked about, and of the last batches.
    As `torch.optim.swa_utils.update_bn`; Y. Wu and J. Johnson, Rethinking "Batch" in BatchNorm, 2021, arXiv 2105.07576.
    """
    images = seen_by(network, images)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
    size = min(EVALUATION_BATCH[images.labels.device.type], len(images))
    spread = torch.arange(size, device=images.labels.device) * len(images) // size
    # The images of a split come class by class, and each batch is to have all classes.
    starts = range(min(len(images), N_RECALIBRATION_IMAGES) // size)
    if can_compile(network):
        positions = torch.cat([spread + start for start in starts])
        Program(network, Mode.RECALIBRATE, size).run(images, positions, [0.0] * len(starts))
        return
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # the mean over all batches
    for start in starts:
        pixels, _ = images.select(spread + start)
        network(normalise(pixels, images.normalisation))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def predict(network: Network, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, 10) and labels (B,) of every image in order, batch by batch, in evaluation mode."""
    network.eval()
    images = seen_by(network, images)
    for pixels, labels in images.batches(EVALUATION_BATCH[images.labels.device.type]):
        yield network(normalise(pixels, images.normalisation)), labels


def evaluate(network: Network, images: Images) -> tuple[float, float]:
    """Mean cross-entropy in nats, and the fraction that is classified right."""
    images = seen_by(network, images)
    if can_compile(network):
        size = min(PROGRAM_BATCH, len(images))
        n_steps = -(-len(images) // size)
        results = Program(network, Mode.EVALUATE, size).run(images, torch.arange(len(images)), [0.0] * n_steps)
        return float(results.losses.sum() / len(images)), int(results.n_correct.sum()) / len(images)
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
