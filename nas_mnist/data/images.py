"""A dataset as tensors: unpacked once, memory-mapped by every process.

The images are kept as `.npy` files and mapped copy-on-write, so that all workers of a machine share one copy of them in
memory and none waits for another.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nas_mnist.data.datasets import MNIST, Dataset, Normalisation
from nas_mnist.data.deskew import deskew
from nas_mnist.errors import DataError

NORMALISATION_FILE = "normalisation.json"


@dataclass(frozen=True)
class Images:
    """Labelled images, or the part of them that `indices` names; nothing is copied.

    `pixels` (N, 28, 28) uint8 with 0 the background, `labels` (N,) int64, `indices` (M,) int64. `normalisation` is that
    of the dataset's training images, whatever part this is. `upright` are the pixels made upright: they are kept beside
    the others, because a network that is given them sees them many times.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    normalisation: Normalisation
    upright: Tensor | None = None  # None: not worked out yet

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The images at these positions of the part: pixels (B, 28, 28) uint8 and labels (B,)."""
        chosen = self.indices[positions]
        return self.pixels[chosen], self.labels[chosen]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once and in order, in batches of `size` and a last smaller one."""
        for positions in torch.arange(len(self), device=self.indices.device).split(size):
            yield self.select(positions)

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Every position once in random order, `size` at a time and a last time fewer; `select` gives the images."""
        yield from torch.randperm(len(self), generator=generator, device=self.indices.device).split(size)

    def part(self, indices: Tensor) -> "Images":
        return replace(self, indices=indices.to(self.indices.device))

    def first(self, n: int) -> "Images":
        """The first `n` images, cut out."""
        upright = None if self.upright is None else self.upright[:n]
        return replace(self, pixels=self.pixels[:n], labels=self.labels[:n], indices=torch.arange(n), upright=upright)

    def deskewed(self) -> "Images":
        """The same images made upright, see `deskew`."""
        upright = make_upright(self.pixels) if self.upright is None else self.upright
        return replace(self, pixels=upright, upright=upright)

    def to(self, device: torch.device) -> "Images":
        return replace(
            self,
            pixels=self.pixels.to(device),
            labels=self.labels.to(device),
            indices=self.indices.to(device),
            upright=None if self.upright is None else self.upright.to(device),
        )


def make_upright(pixels: Tensor) -> Tensor:
    """Pixels (N, 28, 28) uint8 → the same deskewed, a part at a time: in between they are float64."""
    return torch.cat([deskew(part).to(torch.uint8) for part in pixels.split(1000)])


def load_train(data_dir: Path, dataset: Dataset = MNIST) -> Images:
    """All training images, memory-mapped."""
    return _load(dataset, data_dir / dataset.name, "train")


def load_test(data_dir: Path, dataset: Dataset = MNIST) -> Images:
    """The test images. Only `retrain`, `evaluate` and `export` may read them, after the choice is made;
    and `baselines`, which chooses nothing.
    """
    return _load(dataset, data_dir / dataset.name, "test")


def _load(dataset: Dataset, folder: Path, name: str) -> Images:
    try:
        pixels = np.load(folder / f"{name}_images.npy", mmap_mode="c")
        labels = np.load(folder / f"{name}_labels.npy")
        upright = np.load(folder / f"{name}_upright.npy", mmap_mode="c")
        normalisation = dataset.normalisation or Normalisation(**json.loads((folder / NORMALISATION_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{dataset.title} in {folder} cannot be read ({error}): delete that folder and run again"
        ) from error
    indices = torch.arange(len(labels))
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), indices, normalisation, torch.from_numpy(upright))
