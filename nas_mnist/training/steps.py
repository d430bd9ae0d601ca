"""The steps of one training: as a compiled program on a CPU, by plain PyTorch everywhere else.

Plain PyTorch is also what the compiled steps are held to. To compare the two, give both a network built from the same
seed and the same positions, without augmentation and dropout, whose draws differ:

    for kind in (PlainSteps, CompiledSteps):
        steps = kind(build(architecture, seed=0), recipe, images, torch.Generator().manual_seed(0))
        losses = [steps.run(positions, [rate])[0] for positions in images.shuffled(recipe.batch_size, generator)]
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_mnist.data.images import Images
from nas_mnist.kernels.instructions import Mode
from nas_mnist.model.network import Network
from nas_mnist.training.augmentation import augment, draw_matrices, seen_by
from nas_mnist.training.cuda_graph import CapturedStep
from nas_mnist.training.optimizers import make_optimizer
from nas_mnist.training.program import Program, can_compile
from nas_mnist.training.recipe import Recipe


class Steps(Protocol):
    """Training steps of one network; the state of the optimizer is theirs."""

    def run(self, positions: Tensor, rates: Sequence[float]) -> tuple[float, int]:
        """Train on the images at these positions, a batch and a learning rate a step; the last batch may be smaller.

        Returns the sum of the images' losses, in nats, and how many were classified right.
        """


def make_steps(
    network: Network, recipe: Recipe, images: Images, generator: torch.Generator, rates: Sequence[float] | None = None
) -> Steps:
    """The fastest way there is. Augmentation and dropout are drawn from the generator.

    `rates` are those of all steps to come, if known: a GPU's steps are then captured.
    """
    if can_compile(network):
        return CompiledSteps(network, recipe, images, generator)
    return PlainSteps(network, recipe, images, generator, rates)


class CompiledSteps:
    """One call of a program for any number of steps; the network is up to date after each call."""

    def __init__(self, network: Network, recipe: Recipe, images: Images, generator: torch.Generator):
        self._images, self._augmentation, self._generator = seen_by(network, images), recipe.augmentation, generator
        self._program = Program(network, Mode.TRAIN, recipe.batch_size, recipe)
        self._seed = int(torch.randint(2**62, (), generator=generator))  # of dropout

    def run(self, positions: Tensor, rates: Sequence[float]) -> tuple[float, int]:
        matrices = None
        if self._augmentation:
            side = self._images.pixels.shape[-1]
            matrices = draw_matrices(len(positions), side, self._augmentation, self._generator)
        results = self._program.run(self._images, positions, rates, matrices=matrices, seed=self._seed)
        return float(results.losses.sum()), int(results.n_correct.sum())


class PlainSteps:
    """Plain PyTorch. Sums are kept on the device, so that no step waits for the host."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        images: Images,
        generator: torch.Generator,
        rates: Sequence[float] | None = None,
    ):
        self._network, self._recipe, self._generator = network, recipe, generator
        self._images = seen_by(network, images)
        self._optimizer = make_optimizer(network, recipe)
        self._loss_sum = torch.zeros((), device=generator.device)
        self._n_correct = torch.zeros((), dtype=torch.int64, device=generator.device)
        captures = generator.device.type == "cuda" and rates is not None
        self._captured = CapturedStep(recipe.batch_size, generator, list(rates)) if captures else None
        network.draw_from(generator)

    def run(self, positions: Tensor, rates: Sequence[float]) -> tuple[float, int]:
        self._network.train()
        self._loss_sum.zero_()
        self._n_correct.zero_()
        for batch, rate in zip(positions.split(self._recipe.batch_size), rates, strict=True):
            self._optimizer.prepare()
            if self._captured:
                self._captured(self.step, batch)
            else:
                self.step(batch, rate)
        return self._loss_sum.item(), int(self._n_correct.item())

    def step(self, positions: Tensor, learning_rate: float | Tensor) -> None:
        """One batch, from the images at these positions (B,) to the new weights."""
        pixels, labels = self._images.select(positions)
        x = augment(pixels, self._recipe.augmentation, self._images.normalisation, self._generator)
        logits = self._network(x.to(next(self._network.parameters()).dtype))
        loss = F.cross_entropy(logits, labels, label_smoothing=self._recipe.label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step(learning_rate)
        self._loss_sum += loss.detach() * len(labels)
        self._n_correct += (logits.argmax(1) == labels).sum()
