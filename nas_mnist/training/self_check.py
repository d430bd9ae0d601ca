"""Whether the fast training steps are those of plain PyTorch on this machine: compiled on a CPU, captured on a GPU.

Processors, GPUs and drivers differ, and whoever wrote the fast steps has seen few of them.
"""

import contextlib
import json
import math
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch.nn import functional as F

from nas_mnist.data.datasets import Normalisation
from nas_mnist.data.images import Images
from nas_mnist.data.unpacking import default_data_dir
from nas_mnist.files import whole_file
from nas_mnist.kernels.compilation import digest
from nas_mnist.model.architecture import INPUT_SIDE, Architecture, parse
from nas_mnist.model.network import Network, build
from nas_mnist.training.evaluation import evaluate, predict
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import PlainSteps, Steps, make_steps

N_STEPS, BATCH_SIZE, SEED = 20, 64, 0
TOLERANCE = 1e-4
NORMALISATION = Normalisation(0.25, 0.3)  # about that of the images
VERDICTS = "self-checks.json"
_STEPS_DIGEST = digest(Path(__file__).parent)


@dataclass(frozen=True)
class Check:
    """A network and an optimizer. The rate is small: a large one would magnify what rounding alone makes differ."""

    line: str
    optimizer: Literal["sgd", "adamw", "soap"]
    learning_rate: float


CHECKS = (
    Check("c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05", "sgd", 2e-4),
    Check("c20 d24 d44 M c22k1- d24 d36 d44 c10k1- G | dropout=0.05", "soap", 1e-5),
    Check("c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G | act-norm dropout=0.05", "adamw", 1e-5),
    Check("c9 c7k1 M d10 d14 d18 d24 G c10k1- | dropout=0.05 hardswish", "soap", 1e-5),
)


@dataclass(frozen=True)
class Comparison:
    """What the fast steps and the plain ones came to, from the same seed."""

    line: str
    optimizer: str
    difference: float  # relative, the largest: of the loss of a step, or of all images in evaluation after them
    speedup: float

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE  # and is no NaN


@dataclass(frozen=True)
class _Training:
    losses: list[float]  # of each step, and of all images in evaluation after them
    seconds: float  # of as many steps again


def compare_all(device: torch.device) -> list[Comparison]:
    """All checks on this device: seconds, and where the kernels are not compiled yet up to a minute for that."""
    return [compare(check, device) for check in CHECKS]


def compare(check: Check, device: torch.device) -> Comparison:
    """Twenty steps of 64 images, augmented, and an evaluation: fast and plain."""
    plain = _train(check, device, _plain_steps, _evaluate_plainly)
    fast = _train(check, device, make_steps, evaluate)
    differences = [abs(a - b) / abs(b) for a, b in zip(fast.losses, plain.losses, strict=True)]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    return Comparison(str(_architecture(check, device)), check.optimizer, largest, plain.seconds / fast.seconds)


def _architecture(check: Check, device: torch.device) -> Architecture:
    """Without dropout on a CPU: there the compiled steps draw masks of their own."""
    architecture = parse(check.line)
    return replace(architecture, dropout=0.0) if device.type == "cpu" else architecture


def _train(
    check: Check, device: torch.device, make: Callable[..., Steps], judge: Callable[..., tuple[float, ...]]
) -> _Training:
    """The steps one by one, and as many again at once, which are timed."""
    network = build(_architecture(check, device), seed=SEED, device=device)
    recipe = Recipe(batch_size=BATCH_SIZE, optimizer=check.optimizer, learning_rate=check.learning_rate)
    rates, images, generator = [check.learning_rate] * N_STEPS, _images(device), torch.Generator(device)
    steps = make(network, recipe, images, generator, rates * 2)
    generator.manual_seed(SEED)  # some have drawn from it already
    positions = torch.arange(len(images), device=device)
    batches = zip(positions.split(BATCH_SIZE), rates, strict=True)
    losses = [steps.run(batch, [rate])[0] / BATCH_SIZE for batch, rate in batches]
    losses.append(judge(network, images)[0])
    start = time.perf_counter()
    steps.run(positions, rates)
    return _Training(losses, time.perf_counter() - start)


def _plain_steps(
    network: Network, recipe: Recipe, images: Images, generator: torch.Generator, rates: Sequence[float]
) -> Steps:
    return PlainSteps(network, recipe, images, generator)


@torch.no_grad()
def _evaluate_plainly(network: Network, images: Images) -> tuple[float]:
    losses = [F.cross_entropy(logits, labels, reduction="sum").item() for logits, labels in predict(network, images)]
    return (sum(losses) / len(images),)


def _images(device: torch.device) -> Images:
    """Noise in ten densities: the numbers matter, not what they show, and nothing has to be unpacked."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(10, (N_STEPS * BATCH_SIZE,), generator=generator)
    noise = torch.rand((len(labels), INPUT_SIDE, INPUT_SIDE), generator=generator)
    pixels = (noise * 255 * (noise < (labels[:, None, None] + 1) / 11)).to(torch.uint8)
    return Images(pixels, labels, torch.arange(len(labels)), NORMALISATION).to(device)


def is_trusted(device: torch.device) -> bool:
    """Whether training may use the fast steps here. A GPU is checked once; if it differs, a warning says so then."""
    if device.type == "cpu":
        return True
    known = recall(device)
    return _is_small(_found_here(device) if known is None else known)


@cache  # where nothing can be remembered, once a process
def _found_here(device: torch.device) -> float:
    difference = find_out(device)
    if not _is_small(difference):
        warnings.warn(distrust(device, difference), stacklevel=4)
    return difference


def tell(devices: Collection[str], say: Callable[[str], None]) -> None:
    """Check those of the GPUs that have not been, in a process of its own; a line for each that differs."""
    for device in map(torch.device, dict.fromkeys(devices)):
        if device.type == "cpu":
            continue
        difference = recall(device)
        if difference is None:
            with get_context("spawn").Pool(1) as pool:  # what it takes of the GPU is free again afterwards
                difference = pool.apply(find_out, (device,))
        if not _is_small(difference):
            say(distrust(device, difference))


def distrust(device: torch.device, difference: float) -> str:
    """The line about a GPU whose captured steps are not those of plain PyTorch."""
    return (
        f"{device}: captured steps differ from plain ones by {difference:.1e} of their value, so training there takes "
        "plain ones, which are slower; see `nas-mnist doctor`"
    )


def _is_small(difference: float) -> bool:
    return difference <= TOLERANCE


def find_out(device: torch.device) -> float:
    """The largest difference of all checks, inf for a NaN; other processes wait for it, and it is remembered."""
    with _one_at_a_time():
        known = recall(device)
        return remember(device, compare_all(device)) if known is None else known


def recall(device: torch.device) -> float | None:
    """What was found once on this GPU, with this driver, PyTorch and code."""
    return _read().get(identity(device))


def remember(device: torch.device, comparisons: Collection[Comparison]) -> float:
    """The largest difference, inf for a NaN; kept beside the data, where that can be written."""
    difference = max(math.inf if math.isnan(c.difference) else c.difference for c in comparisons)
    path = default_data_dir() / VERDICTS
    with contextlib.suppress(OSError):
        known = _read() | {identity(device): difference}
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(known, indent=2) + "\n")
    return difference


def _read() -> dict[str, float]:
    """Whatever else is in the file counts as nothing."""
    try:
        found = json.loads((default_data_dir() / VERDICTS).read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, float)} if isinstance(found, dict) else {}


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    try:
        default_data_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(default_data_dir() / f"{VERDICTS}.lock")
        lock.acquire()
    except OSError:  # cannot be written
        yield
        return
    with lock:
        lock.release()
        yield


def identity(device: torch.device) -> str:
    """The GPU, its driver, PyTorch, and this version of the steps."""
    gpu = torch.cuda.get_device_properties(device)
    unique = getattr(gpu, "uuid", "")
    return f"{gpu.name} {unique}, driver {driver_version()}, torch {torch.__version__}, steps {_STEPS_DIGEST}"


@cache
def driver_version() -> str:
    """As NVIDIA's own tool tells it; `unknown` without that."""
    if not (tool := shutil.which("nvidia-smi")):
        return "unknown"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split("\n")[0].strip() or "unknown"
