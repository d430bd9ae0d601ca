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
    return n_fold_images(dataset, N_FOLDS)


def n_fold_images(dataset: Dataset, n_folds: int) -> int:
    """How many images there are to train on, whichever of the folds is held out."""
    return dataset.n_train_images - math.ceil(dataset.n_train_images / n_folds)


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
    return split if n_train_images is None else Split(spread(split.train, n_train_images), split.val)


def spread(images: Images, n: int) -> Images:
    """`n` of the images, evenly from first to last: of a fold, as many of each class, to within one.

    Raises `DataError` if there are not that many.
    """
    check_number(n, len(images))
    return images.part(images.indices[torch.arange(n) * len(images) // n])


def check_number(n: int, n_images: int) -> None:
    """Raise `DataError` if `n` of so many images cannot be trained on."""
    if not 2 <= n <= n_images:
        raise DataError(f"there are 2 to {n_images:,} training images to choose from, not {n:,}", "train_images")


def _by_class(images: Images, seed: int) -> Tensor:
    """The indices shuffled, then grouped by class, so that every n-th of them is a stratified sample."""
    shuffled = images.indices[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    return shuffled[torch.sort(images.labels[shuffled], stable=True).indices]
