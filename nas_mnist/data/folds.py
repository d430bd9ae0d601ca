"""How the images are divided: a search trains and validates on one partition, a confirmation on another."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nas_mnist.data.datasets import Dataset
from nas_mnist.data.images import Images
from nas_mnist.errors import DataError

N_FOLDS = 6  # of MNIST 50,000 images to train, 10,000 to validate
SEARCH_PARTITION, CONFIRM_PARTITION = 0, 1  # seeds: what the search was chosen on is not what it is confirmed on


@dataclass(frozen=True)
class Split:
    """Images to train on and images to validate on; they have none in common."""

    train: Images
    val: Images


def n_search_images(dataset: Dataset) -> int:
    """How many images the search has to train on: all but one fold."""
    return dataset.n_train_images - math.ceil(dataset.n_train_images / N_FOLDS)


def fold(images: Images, number: int, *, partition: int, n_folds: int = N_FOLDS) -> Split:
    """Fold `number` of a stratified partition: every class is spread evenly over the folds, to within one image.

    With 6 folds of 60,000 images a fold validates on 10,000. `partition` seeds the shuffle.
    """
    order = _by_class(images, partition)
    held_out = torch.arange(len(order)) % n_folds == number
    return Split(images.part(order[~held_out]), images.part(order[held_out]))


def search_split(images: Images, n_train_images: int | None = None) -> Split:
    """The fixed split that the search sees: a fold to validate and all others to train, or `n_train_images` of them.

    Raises `DataError` if there are not that many.
    """
    split = fold(images, 0, partition=SEARCH_PARTITION)
    if n_train_images is None or n_train_images == len(split.train):
        return split
    if not 2 <= n_train_images <= len(split.train):
        raise DataError(f"there are 2 to {len(split.train):,} training images to choose from, not {n_train_images:,}")
    spread = torch.arange(n_train_images) * len(split.train) // n_train_images
    return Split(images.part(split.train.indices[spread]), split.val)


def _by_class(images: Images, seed: int) -> Tensor:
    """The indices shuffled, then grouped by class, so that every n-th of them is a stratified sample."""
    shuffled = images.indices[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    return shuffled[torch.sort(images.labels[shuffled], stable=True).indices]
