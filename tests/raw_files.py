"""Small datasets in the formats of the original files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch

from nas_mnist.data.datasets import Dataset


def make(dataset: Dataset, seed: int = 0) -> list[np.ndarray]:
    """Images (N, 28, 28) and labels (N,) to train and to test: a hundred random images, again and again."""
    generator, arrays = np.random.default_rng(seed), []
    for n in (dataset.n_train_images, dataset.n_test_images):
        images = generator.integers(0, 256, (100, 28, 28), dtype=np.uint8)
        arrays += [np.resize(images, (n, 28, 28)), np.resize(generator.permutation(100) % 10, n)]
    return arrays


def write(dataset: Dataset, data_dir: Path, arrays: list[np.ndarray], *, packed: bool = False) -> Path:
    """Write the four files where torchvision looks for them, as their authors made them."""
    raw = data_dir / dataset.loader / "raw"
    raw.mkdir(parents=True)
    for name, array in zip(dataset.files, arrays, strict=True):
        content = idx(stored(dataset, array))
        (raw / f"{name}.gz").write_bytes(gzip.compress(content, 1)) if packed else (raw / name).write_bytes(content)
    return raw


def stored(dataset: Dataset, array: np.ndarray) -> np.ndarray:
    """As the files have it: images perhaps on their side, and labels of QMNIST with seven more figures behind."""
    if array.ndim == 3:
        return array.transpose(0, 2, 1) if dataset.name == "emnist-digits" else array
    if dataset.name == "qmnist":
        return np.stack([array, *(1000 * i + array for i in range(1, 8))], 1).astype(">i4")
    return array.astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The format of http://yann.lecun.com/exdb/mnist/."""
    kind = {"|u1": 8, ">i4": 12}[array.dtype.str]
    return struct.pack(f">{1 + array.ndim}I", kind * 256 + array.ndim, *array.shape) + array.tobytes()


def as_written(arrays: list[np.ndarray], images, part: int) -> bool:
    """Whether the images that were loaded are those that were made (part 0 to train, 1 to test)."""
    expected, labels = (torch.from_numpy(array) for array in arrays[2 * part : 2 * part + 2])
    return torch.equal(images.pixels, expected) and torch.equal(images.labels, labels)
