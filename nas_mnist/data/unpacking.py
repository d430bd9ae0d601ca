"""The files of a dataset: found, checked, and unpacked once into the data folder.

torchvision's own class of the dataset downloads and reads them; those in the data folder stand before its mirrors, and
MNIST's own come with this package.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from filelock import FileLock
from platformdirs import user_cache_path

from nas_mnist.data.datasets import MNIST, Dataset, Normalisation
from nas_mnist.data.images import NORMALISATION_FILE, make_upright
from nas_mnist.errors import DataError
from nas_mnist.files import folder_beside, whole_file

_PACKAGED = Path(__file__).parent / "mnist"
_PARTS = ("train", "test")
_UPRIGHT = tuple(f"{part}_upright.npy" for part in _PARTS)
_ARRAYS = tuple(f"{part}_{kind}.npy" for part in _PARTS for kind in ("images", "labels"))


def default_data_dir() -> Path:
    """`$NAS_MNIST_DATA`, or `nas-mnist` in the user's cache folder."""
    named = os.environ.get("NAS_MNIST_DATA")
    return Path(os.path.expanduser(named)) if named else user_cache_path("nas-mnist", appauthor=False)


def prepare(data_dir: Path, dataset: Dataset = MNIST) -> None:
    """Unpack the dataset into `data_dir` unless it is there; safe when many processes do so at once.

    Raises `DataError` if a file is missing or damaged, cannot be downloaded, or the folder cannot be written.
    """
    folder = data_dir / dataset.name
    try:
        if not folder.exists() or _is_older(folder):
            data_dir.mkdir(parents=True, exist_ok=True)
            with FileLock(data_dir / f"{dataset.name}.lock"):
                if not folder.exists():
                    _unpack(dataset, data_dir, folder)
                elif _is_older(folder):
                    _verify(dataset, folder, _files(dataset))
                    _add_upright(folder)
    except OSError as error:
        raise DataError(
            f"the data folder must be writable; {data_dir}: {error.strerror or error}: name another", "data_dir"
        ) from error
    _verify(dataset, folder, (*_files(dataset), *_UPRIGHT))


def checksums(data_dir: Path, dataset: Dataset = MNIST) -> dict[str, str]:
    """The md5 of each file that the dataset is, as written when the data was unpacked."""
    lines = (data_dir / dataset.name / "md5").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines) if name not in _UPRIGHT}


def _unpack(dataset: Dataset, data_dir: Path, folder: Path) -> None:
    """Into a temporary folder, then renamed: a folder that exists is whole."""
    with folder_beside(folder) as temporary:
        _fetch(dataset, data_dir, temporary)
        unpacked = temporary / "arrays"
        unpacked.mkdir()
        for train, name in ((True, "train"), (False, "test")):
            images, labels = _read(dataset, data_dir, temporary, train)
            np.save(unpacked / f"{name}_images.npy", images)
            np.save(unpacked / f"{name}_labels.npy", labels)
            if train and dataset.normalisation is None:
                (unpacked / NORMALISATION_FILE).write_text(json.dumps(asdict(measure(images))) + "\n")
        (unpacked / "md5").write_text("".join(_md5_line(unpacked / name) for name in _files(dataset)))
        _add_upright(unpacked)
        unpacked.rename(folder)


def _is_older(folder: Path) -> bool:
    """Whether it was unpacked by a version that knew no upright images."""
    with contextlib.suppress(OSError, ValueError):  # which `_verify` tells
        return _UPRIGHT[0] not in (folder / "md5").read_text()
    return False


def _add_upright(folder: Path) -> None:
    """Make the images upright, once for all who read them; the checksums come last, so that being killed is no harm."""
    for part, name in zip(_PARTS, _UPRIGHT, strict=True):
        images = torch.from_numpy(np.load(folder / f"{part}_images.npy"))
        with whole_file(folder / name) as path:
            np.save(path, make_upright(images).numpy())
    with whole_file(folder / "md5") as path:
        path.write_text((folder / "md5").read_text() + "".join(_md5_line(folder / name) for name in _UPRIGHT))


def _fetch(dataset: Dataset, data_dir: Path, root: Path) -> None:
    """The raw files where torchvision looks for them below `root`: the user's, the package's, or its mirrors'.

    The user's are copied, because torchvision would write over those that it takes for damaged.
    """
    raw = root / dataset.loader / "raw"
    raw.mkdir(parents=True)
    own = data_dir / dataset.loader / "raw"
    there = _raw_files(dataset, own) or (_raw_files(dataset, _PACKAGED) if dataset == MNIST else {})
    if not there:
        _download(dataset, data_dir, root)
        return
    for name in dataset.files:
        if name not in there:
            raise DataError(f"{dataset.title} is not whole in {own}: {_advice(dataset, data_dir)}")
        with _explained(dataset, data_dir), _open(there[name]) as source, (raw / name).open("wb") as copy:
            shutil.copyfileobj(source, copy)


def _raw_files(dataset: Dataset, folder: Path) -> dict[str, Path]:
    """Those of the dataset's files that are in the folder, packed or not."""
    candidates = ((name, folder / f"{name}{suffix}") for name in dataset.files for suffix in (".gz", ""))
    return {name: path for name, path in candidates if path.exists()}


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _download(dataset: Dataset, data_dir: Path, root: Path) -> None:
    if sys.stderr.isatty():  # it may take minutes, and torchvision's own progress bars would run through the display
        print(f"downloading {dataset.title} …", file=sys.stderr, flush=True)
    try:
        for train in (True, False):
            _torchvision(dataset, root, train, download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        raise DataError(
            f"{dataset.title} could not be downloaded ({_reason(error)}): {_advice(dataset, data_dir)}"
        ) from error


def _read(dataset: Dataset, data_dir: Path, root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) uint8, upright, and labels (N,) int64."""
    with _explained(dataset, data_dir):
        found = _torchvision(dataset, root, train)
        images = found.data.mT if dataset.transposed else found.data
        labels = found.targets[:, 0] if found.targets.ndim == 2 else found.targets  # behind a class QMNIST has more
        n_images = dataset.n_train_images if train else dataset.n_test_images
        if images.shape != (n_images, 28, 28) or labels.shape != (n_images,):
            raise ValueError(f"{len(images):,} images and {len(labels):,} labels, not {n_images:,}")
        if not 0 <= labels.min() <= labels.max() < len(dataset.classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, not 0 to 9")
    return images.contiguous().numpy(), labels.contiguous().numpy()


def _torchvision(dataset: Dataset, root: Path, train: bool, *, download: bool = False):
    import torchvision.datasets  # 4 s to import, and needed once

    split = {"split": dataset.split} if dataset.split else {}
    with contextlib.redirect_stderr(io.StringIO()):
        return getattr(torchvision.datasets, dataset.loader)(root, train=train, download=download, **split)


@contextlib.contextmanager
def _explained(dataset: Dataset, data_dir: Path) -> Iterator[None]:
    """What torchvision and gzip say of a damaged file, as one line."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"the files of {dataset.title} must be the four original ones; reading them failed ({_reason(error)}): "
            f"{_advice(dataset, data_dir)}"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _advice(dataset: Dataset, data_dir: Path) -> str:
    *names, last = (f"{name}.gz" for name in dataset.files)
    return f"put {', '.join(names)} and {last} from {dataset.source} into {data_dir / dataset.loader / 'raw'}"


def measure(images: np.ndarray) -> Normalisation:
    """Mean and standard deviation of images (N, 28, 28) uint8, to four decimals like those of MNIST."""
    counts = sum(np.bincount(part.ravel(), minlength=256) for part in np.array_split(images, 100))
    shades = np.arange(256) / 255
    mean = np.average(shades, weights=counts)
    std = np.sqrt(np.average((shades - mean) ** 2, weights=counts))
    return Normalisation(round(float(mean), 4), round(float(std), 4))


def _files(dataset: Dataset) -> tuple[str, ...]:
    """What is in a folder of unpacked data, besides the checksums and the images made upright."""
    return _ARRAYS if dataset.normalisation else (*_ARRAYS, NORMALISATION_FILE)


def _verify(dataset: Dataset, folder: Path, names: tuple[str, ...]) -> None:
    try:
        lines = [line.split() for line in (folder / "md5").read_text().splitlines()]
        damaged = [name for digest, name in lines if _md5(folder / name) != digest]
        damaged += ["md5"] * (tuple(name for _, name in lines) != names)
    except (OSError, ValueError) as error:
        damaged = [getattr(error, "filename", None) or "md5"]
    if damaged:
        raise DataError(
            f"{dataset.title} in {folder} is damaged ({Path(damaged[0]).name}): delete that folder and run again"
        )


def _md5_line(path: Path) -> str:
    return f"{_md5(path)}  {path.name}\n"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
