"""MNIST as tensors: unpacked once, memory-mapped by every process, split by a fixed seed.

torchvision's own dataset class checks and reads the files; this package's folder stands before its mirrors. The images
are then kept as `.npy` files in a cache folder and mapped copy-on-write, so that all workers of a machine share one
copy of them in memory and none waits for another.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from nas_mnist.errors import DataError

DATASET = "mnist"
MEAN, STD = 0.1307, 0.3081  # of the 60,000 training images, as fractions of white: the field's customary figures
N_TRAIN_IMAGES, N_TEST_IMAGES = 60_000, 10_000
N_FOLDS = 6  # 50,000 images to train, 10,000 to validate
SEARCH_PARTITION, CONFIRM_PARTITION = 0, 1  # seeds: what the search was chosen on is not what it is confirmed on

_PACKAGED = Path(__file__).parent / "mnist"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Images:
    """Labelled images, or the part of them that `indices` names; nothing is copied.

    `pixels` (N, 28, 28) uint8 with 0 the background, `labels` (N,) int64, `indices` (M,) int64.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The images at these positions of the part: pixels (B, 28, 28) uint8 and labels (B,)."""
        chosen = self.indices[positions]
        return self.pixels[chosen], self.labels[chosen]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in batches of `size` and a last smaller one; shuffled if there is a generator."""
        order = torch.arange(len(self), device=self.indices.device)
        if generator is not None:
            order = torch.randperm(len(self), generator=generator, device=self.indices.device)
        for positions in order.split(size):
            yield self.select(positions)

    def part(self, indices: Tensor) -> "Images":
        return Images(self.pixels, self.labels, indices.to(self.indices.device))

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device), self.indices.to(device))


@dataclass(frozen=True)
class Split:
    """Images to train on and images to validate on; they have none in common."""

    train: Images
    val: Images


def default_data_dir() -> Path:
    """`$NAS_MNIST_DATA`, or `nas-mnist` in the user's cache folder."""
    if "NAS_MNIST_DATA" in os.environ:
        return Path(os.environ["NAS_MNIST_DATA"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nas-mnist"


def prepare(data_dir: Path) -> None:
    """Unpack the data set into `data_dir` unless it is there; safe when many processes do so at once.

    Raises `DataError` if a file is damaged or the folder cannot be written.
    """
    folder = data_dir / DATASET
    try:
        if not folder.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(data_dir / f"{DATASET}.lock"):
                if not folder.exists():
                    _unpack(data_dir, folder)
    except OSError as error:
        raise DataError(
            f"the data folder must be writable; {data_dir}: {error.strerror or error}: name another with --data-dir"
        ) from error
    _verify(folder)


def load_train(data_dir: Path) -> Images:
    """The 60,000 training images, memory-mapped."""
    return _load(data_dir / DATASET, "train")


def load_test(data_dir: Path) -> Images:
    """The 10,000 test images. Only `retrain`, `evaluate` and `export` may read them, after the choice is made;
    and `baselines`, which chooses nothing.
    """
    return _load(data_dir / DATASET, "test")


def checksums(data_dir: Path) -> dict[str, str]:
    """The md5 of each array file, as written when the data was unpacked."""
    lines = (data_dir / DATASET / "md5").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


def fold(images: Images, number: int, *, partition: int, n_folds: int = N_FOLDS) -> Split:
    """Fold `number` of a stratified partition: every class is spread evenly over the folds, to within one image.

    With 6 folds of 60,000 images a fold validates on 10,000. `partition` seeds the shuffle.
    """
    order = _by_class(images, partition)
    held_out = torch.arange(len(order)) % n_folds == number
    return Split(images.part(order[~held_out]), images.part(order[held_out]))


def search_split(images: Images, n_train_images: int | None = None) -> Split:
    """The fixed split that the search sees: 50,000 to train (or `n_train_images`, stratified) and 10,000 to validate.

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


def _unpack(data_dir: Path, folder: Path) -> None:
    """Into a temporary folder, then renamed: a folder that exists is whole."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{DATASET}-", dir=data_dir))
    try:
        own_files = (data_dir / "MNIST" / "raw").exists()  # files the user put there, in torchvision's layout
        if not own_files:
            # torchvision cannot fetch from file:// (it asks for a length), but takes what lies there if its md5 fits.
            shutil.copytree(_PACKAGED, temporary / "MNIST" / "raw", ignore=shutil.ignore_patterns("README.md"))
        unpacked = temporary / DATASET
        unpacked.mkdir()
        for train, name in ((True, "train"), (False, "test")):
            images, labels = _read_with_torchvision(data_dir if own_files else temporary, train)
            np.save(unpacked / f"{name}_images.npy", images)
            np.save(unpacked / f"{name}_labels.npy", labels)
        (unpacked / "md5").write_text("".join(f"{_md5(unpacked / f'{n}.npy')}  {n}.npy\n" for n in _ARRAYS))
        unpacked.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_with_torchvision(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import MNIST  # 4 s to import, and needed once

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            dataset = MNIST(root, train=train, download=True)
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the MNIST files must be the four original ones; reading them failed ({reason}): "
            f"install nas-mnist again, or put them into {root / 'MNIST' / 'raw'}"
        ) from error
    if len(dataset) != (N_TRAIN_IMAGES if train else N_TEST_IMAGES):
        raise DataError(
            f"MNIST in {root} has {len(dataset):,} images, not the original number: delete {root / 'MNIST'}"
        )
    return dataset.data.numpy(), dataset.targets.numpy()


def _verify(folder: Path) -> None:
    try:
        lines = (folder / "md5").read_text().splitlines()
        damaged = [name for digest, name in map(str.split, lines) if _md5(folder / name) != digest]
        damaged += ["md5"] * (len(lines) != len(_ARRAYS))
    except (OSError, ValueError) as error:
        damaged = [getattr(error, "filename", None) or "md5"]
    if damaged:
        raise DataError(f"MNIST in {folder} is damaged ({Path(damaged[0]).name}): delete that folder and run again")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _load(folder: Path, name: str) -> Images:
    try:
        pixels = np.load(folder / f"{name}_images.npy", mmap_mode="c")
        labels = np.load(folder / f"{name}_labels.npy")
    except (OSError, ValueError) as error:
        raise DataError(f"MNIST in {folder} cannot be read ({error}): delete that folder and run again") from error
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels), torch.arange(len(labels)))
