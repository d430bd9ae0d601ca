"""What this machine is to us, and whether the fast training steps are right on it."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from nas_mnist.data.datasets import DATASETS
from nas_mnist.extras import Extra
from nas_mnist.kernels import compilation
from nas_mnist.kernels.interpreter import run
from nas_mnist.kernels.vectors import LANES
from nas_mnist.training import self_check
from nas_mnist.training.self_check import Comparison
from nas_mnist.workers import machine

FLOAT_BITS = 32
PACKAGES = ("nas-mnist", "torch", "torchvision", "optuna", "numba")


@dataclass(frozen=True)
class Gpu:
    device: str
    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, vectors in bits; what a container is given counts, and is told beside what there is."""

    processor: str
    cores: int  # that workers may use
    cores_there: int
    caches: dict[str, str]  # of a core
    kernel_vector_bits: int
    torch_capability: str
    memory_bytes: int
    memory_limit: int | None
    free_bytes: int
    workers_in_memory: int
    gpus: tuple[Gpu, ...]
    versions: dict[str, str]
    extras: dict[str, bool]  # whether installed
    data_dir: str
    datasets: dict[str, bool]  # whether unpacked
    kernel_cache: str
    is_compiled: bool


@dataclass(frozen=True)
class Checked:
    """The fast steps of a device against plain PyTorch's."""

    device: str
    comparisons: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        return all(comparison.agrees for comparison in self.comparisons)


def look(data_dir: Path) -> Machine:
    """Changes nothing, and trains nothing."""
    return Machine(
        processor=machine.processor(),
        cores=machine.n_cores(),
        cores_there=os.cpu_count() or 1,
        caches=machine.cache_sizes(),
        kernel_vector_bits=FLOAT_BITS * LANES,
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        memory_bytes=psutil.virtual_memory().total,
        memory_limit=machine.memory_limit(),
        free_bytes=machine.free_bytes(),
        workers_in_memory=machine.n_workers_in_memory(on_gpu=torch.cuda.device_count() > 0),
        gpus=tuple(_gpus()),
        versions={"Python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        extras={extra.name: not extra.missing for extra in Extra},
        data_dir=str(data_dir),
        datasets={name: (data_dir / name).is_dir() for name in DATASETS},
        kernel_cache=str(compilation.cache_folder(run)),
        is_compiled=compilation.is_compiled(run),
    )


def _gpus() -> Iterator[Gpu]:
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield Gpu(f"cuda:{i}", found.name, found.total_memory, self_check.driver_version())


def check() -> Iterator[Checked]:
    """The CPU, then each GPU: seconds each, and once up to a minute while the kernels are compiled.

    Compared anew whatever was found before; a GPU's result is remembered.
    """
    torch.set_num_threads(1)  # as in a worker
    for name in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        device = torch.device(name)
        comparisons = self_check.compare_all(device)
        if device.type != "cpu":
            self_check.remember(device, comparisons)
        yield Checked(name, tuple(comparisons))
