"""Three ways to train a network: as the reference systems were, as experts write it in PyTorch, and the package's."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from networks import Case
from torch import Tensor, nn
from torch.nn import functional as F

from nas_mnist.data import images as data
from nas_mnist.data.datasets import MNIST
from nas_mnist.data.folds import search_split
from nas_mnist.model.architecture import Architecture, Conv, MaxPool
from nas_mnist.model.network import build
from nas_mnist.study.pruner import AVERAGED_EPOCHS
from nas_mnist.task import MAX_EPOCHS
from nas_mnist.training import averaging, loop
from nas_mnist.training.augmentation import Augmentation, affine, draw_matrices
from nas_mnist.training.steps import make_steps

FIRST_STEPS = 10
TURN_SECONDS = 0.8  # what one takes, about


class Way:
    """Trains a network, on and on."""

    def __init__(self, root: Path, case: Case):
        self.batch_size = case.batch_size
        self.n_steps = FIRST_STEPS

    def images_a_second(self) -> float:
        seconds, n = self.train(self.n_steps), self.n_steps
        self.n_steps = max(3, min(400, int(n * TURN_SECONDS / seconds)))
        return n * self.batch_size / seconds

    def train(self, n_steps: int) -> float:
        """That many steps; returns the seconds that they took."""
        raise NotImplementedError


class Reference(Way):
    """torchvision's data set, transforms on each image, a DataLoader in this process, NCHW maps, SGD."""

    def __init__(self, root: Path, case: Case):
        from torch.utils.data import DataLoader
        from torchvision import transforms
        from torchvision.datasets import MNIST as MnistOfTorchvision

        super().__init__(root, case)
        ranges = Augmentation()
        transform = transforms.Compose(
            [
                transforms.RandomAffine(
                    ranges.rotation_degrees,
                    translate=(ranges.translation, ranges.translation),
                    scale=(1 - ranges.scale, 1 + ranges.scale),
                    shear=ranges.shear_degrees,
                ),
                transforms.ToTensor(),
                transforms.Normalize((MNIST.normalisation.mean,), (MNIST.normalisation.std,)),
            ]
        )
        self.loader = DataLoader(
            MnistOfTorchvision(root, transform=transform), batch_size=case.batch_size, shuffle=True
        )
        self.network = plain_network(case.architecture)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9)

    def train(self, n_steps: int) -> float:
        batches = iter(self.loader)
        start = time.perf_counter()
        for _ in range(n_steps):
            x, labels = next(batches)
            self.optimizer.zero_grad()
            F.cross_entropy(self.network(x).flatten(1), labels).backward()
            self.optimizer.step()
        return time.perf_counter() - start


class Plain(Way):
    """PyTorch done well: images as tensors, one grid_sample for a batch, channels last, ReLU in place, SGD."""

    def __init__(self, root: Path, case: Case):
        super().__init__(root, case)
        self.images = data.load_train(root)
        self.generator = torch.Generator().manual_seed(0)
        self.network = plain_network(case.architecture, in_place=True).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9, nesterov=True)

    def train(self, n_steps: int) -> float:
        positions = torch.randperm(len(self.images), generator=self.generator)
        start = time.perf_counter()
        for batch in positions[: n_steps * self.batch_size].split(self.batch_size):
            x, labels = self.augmented(batch)
            self.optimizer.zero_grad()
            F.cross_entropy(self.network(x).flatten(1), labels).backward()
            self.optimizer.step()
        return time.perf_counter() - start

    def augmented(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pixels, labels = self.images.select(positions)
        matrices = draw_matrices(len(pixels), pixels.shape[-1], Augmentation(), self.generator)
        x = affine(pixels, matrices, self.images.normalisation)
        return x.to(memory_format=torch.channels_last), labels


def plain_network(architecture: Architecture, *, in_place: bool = False) -> nn.Sequential:
    """The same layers from PyTorch's own modules, as a tutorial writes them; element-wise dropout, as most do."""

    def follow(layer: Conv, channels: int, rate: float) -> list[nn.Module]:
        if not layer.activation:
            return []
        modules = [nn.BatchNorm2d(channels)] * layer.norm + [nn.ReLU(inplace=in_place)]
        modules = modules if architecture.norm_first else modules[::-1]
        return modules + [nn.Dropout(rate)] * (rate > 0)

    modules = []
    for layer, shape in zip(architecture.layers, architecture.shapes, strict=True):
        if not isinstance(layer, Conv):
            modules.append(nn.MaxPool2d(2) if isinstance(layer, MaxPool) else nn.AdaptiveAvgPool2d(1))
            continue
        c, size = shape.in_channels, (layer.kernel, layer.stride, layer.padding)
        if layer.separable:
            modules += [nn.Conv2d(c, c, *size, groups=c, bias=False), *follow(layer, c, 0.0)]
            size = (1,)
        modules += [nn.Conv2d(c, layer.channels, *size, bias=layer.bias)]
        modules += follow(layer, layer.channels, architecture.dropout)
    return nn.Sequential(*modules)


class Package(Way):
    """What a search runs."""

    def __init__(self, root: Path, case: Case):
        super().__init__(root, case)
        self.case = case
        self.split = search_split(data.load_train(root))
        self.generator = torch.Generator().manual_seed(0)
        self.network = build(case.architecture, seed=0)
        self.steps = make_steps(self.network, case.recipe, self.split.train, self.generator)

    def train(self, n_steps: int) -> float:
        positions = torch.randperm(len(self.split.train), generator=self.generator)[: n_steps * self.batch_size]
        start = time.perf_counter()
        self.steps.run(positions, [self.case.recipe.learning_rate / 10] * n_steps)
        return time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """What each kind of instruction takes of a step."""
        from shares import seconds_of_kinds

        seconds = seconds_of_kinds(self.case, self.split.train)
        return {kind: s / sum(seconds.values()) for kind, s in seconds.items()}

    def trial(self) -> dict[str, float]:
        """Of a whole trial, from one epoch and the averaged weights validated once: seconds, and the share of them
        that calibration and validation take."""
        network = build(self.case.architecture, seed=1)
        recipe = replace(self.case.recipe, epochs=MAX_EPOCHS)
        with (
            timed(loop, "recalibrate") as calibration,
            timed(loop, "evaluate") as validation,
            timed(averaging.AveragedWeights, "evaluate") as of_averaged,
        ):
            epochs = loop.train(network, recipe, self.split.train, self.split.val, seed=1, averaged_epochs=[1])
            epoch = next(epochs)
        judging = MAX_EPOCHS * (sum(calibration) + sum(validation)) + len(AVERAGED_EPOCHS) * sum(of_averaged)
        seconds = MAX_EPOCHS * (epoch.train_seconds + epoch.eval_seconds - sum(of_averaged))
        seconds += len(AVERAGED_EPOCHS) * sum(of_averaged)
        return {"seconds": seconds, "evaluation_share": judging / seconds}


@contextmanager
def timed(owner, name: str) -> Iterator[list[float]]:
    """The seconds of each call of this function meanwhile."""
    function, seconds = getattr(owner, name), []

    def call(*arguments):
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        setattr(owner, name, function)
