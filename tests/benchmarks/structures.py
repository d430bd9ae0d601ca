"""What a wider space would buy: networks and ways to train them that the notation cannot say, in paired runs on folds.

    python tests/benchmarks/structures.py plan PART VARIANT ... [--size 2000] [--epochs 15] [--pairs 6]
    python tests/benchmarks/structures.py train [--workers 2]
    python tests/benchmarks/structures.py tables

Every variant has as many parameters as its base allows: all widths are scaled by one factor until the budget is used. A
pair is one fold and one seed; both sides are trained by plain PyTorch. `studies/structures/plan.jsonl` says what is
trained, one run a line; `runs.jsonl` what came of it. Both are only ever added to, so that `train` can be cut and continued.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chwn import Conv, Convolution, MaxPool, Norm, Soap, select
from filelock import FileLock
from scipy.stats import ttest_rel
from torch import Tensor, nn
from torch.nn import functional as F

from nas_mnist.data.folds import CONFIRM_PARTITION, N_FOLDS, Split, fold
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.study.space import reference_recipe
from nas_mnist.training.augmentation import draw_matrices
from nas_mnist.training.optimizers import one_cycle
from nas_mnist.training.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "studies" / "structures"
EVALUATION_BATCH, N_RECALIBRATION_IMAGES = 64, 5000
RATE = 0.0116  # what the winner below 2,000 parameters was trained with, about

# --- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One layer of a variant: a convolution (c, d), a pool (M), the global pool (G)."""

    kind: str
    channels: int = 0
    kernel: int = 3
    padding: int = 0
    stride: int = 1
    times: int = 1  # how often the same weights are applied, each time with norms of their own
    norm: bool = True


@dataclass(frozen=True)
class Variant:
    """A base network and what is different in it, and in its training."""

    steps: tuple[Step, ...]
    activation: str = "relu"
    inner: str = "norm relu"  # between a depthwise and its pointwise convolution: norm relu, norm, nothing
    skip: bool = False  # the source, cropped and padded with zero channels, is added to every map of the same scale
    attention: bool = False  # efficient channel attention: three weights a layer
    pool: str = "max"  # max, average, both (their mean), blur, stride
    head: str = "mean"  # mean, both (mean and maximum side by side), all (the means of all maps of the last block)
    groups: int = 1  # of the pointwise convolutions of separable layers, shuffled
    concat: bool = False  # a layer sees the image, pooled or cropped, beside the map before it
    branches: bool = False  # trained as a sum of kernels, each with a norm of its own, folded afterwards
    expand: int = 1  # a pointwise convolution is trained as a product of two, with this many times the channels between
    initial: str = "default"  # default, orthogonal, dirac
    bias_rate: float = 1.0  # times the rate, of the norms' offsets
    decay_all: bool = True  # norms too
    smoothing: float = 0.0
    tail: str = "cosine"  # cosine, linear: how the rate falls
    warmup: float = 0.2
    batches: str = "64"  # 64, growing (32, 64, 128 by thirds of the steps)
    teacher: float = 0.0  # share of the loss that is the teacher's
    temperature: float = 2.0


def act(name: str, x: Tensor) -> Tensor:
    return {
        "relu": F.relu,
        "leaky": lambda x: F.leaky_relu(x, 0.1),
        "silu": F.silu,
        "hardswish": F.hardswish,
        "relu2": lambda x: F.relu(x).square(),
        "gelu": lambda x: F.gelu(x, approximate="tanh"),
        "mish": F.mish,
        "celu": F.celu,
    }[name](x)


class Branches(nn.Module):
    """A 3×3 convolution, trained as the sum of it, its middle row, its middle column and its middle, each normed."""

    def __init__(self, conv: Conv):
        super().__init__()
        self.conv = conv
        n = len(conv.weight)
        masks = torch.zeros(4, 3, 3)
        masks[0], masks[1, 1], masks[2, :, 1], masks[3, 1, 1] = 1, 1, 1, 1
        self.register_buffer("masks", masks, persistent=False)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty_like(conv.weight)) for _ in range(3))
        self.norms = nn.ModuleList(Norm(n) for _ in range(4))
        for norm in self.norms:
            nn.init.constant_(norm.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for weight, norm, mask in zip((self.conv.weight, *self.weights), self.norms, self.masks, strict=True):
            total = total + norm(Convolution.apply(x, weight * mask, 1, self.conv.padding, self.conv.depthwise))
        return total


class Layer(nn.Module):
    """A convolution with all that belongs to it, applied once or several times."""

    def __init__(self, step: Step, n_in: int, variant: Variant):
        super().__init__()
        self.step, self.variant = step, variant
        n, times = step.channels, step.times
        size = step.kernel, step.stride, step.padding
        self.groups = 1
        if step.kind == "d":
            self.depthwise = self._branched(Conv(n_in, n_in, *size, depthwise=True))
            self.inner = nn.ModuleList(Norm(n_in) for _ in range(times if "norm" in variant.inner else 0))
            self.groups = variant.groups if n_in % variant.groups == n % variant.groups == 0 else 1
            self.pointwise = nn.ModuleList(Conv(n_in // self.groups, n // self.groups, 1) for _ in range(self.groups))
            if variant.expand > 1:
                wide = variant.expand * n
                self.pointwise = nn.ModuleList([nn.Sequential(Conv(n_in, wide, 1), Conv(wide, n, 1))])
        else:
            self.conv = self._branched(Conv(n_in, n, *size))
        self.norms = nn.ModuleList(Norm(n) for _ in range(times if step.norm else 0))
        self.attend = nn.Parameter(torch.zeros(3)) if variant.attention and step.norm else None

    def _branched(self, conv: Conv) -> nn.Module:
        return Branches(conv) if self.variant.branches and conv.weight.shape[2] == 3 and self.step.norm else conv

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.step.times):
            x = self._once(x, i)
        return x

    def _once(self, x: Tensor, i: int) -> Tensor:
        source = x
        if self.step.kind == "d":
            x = self.depthwise(x)
            if self.inner:
                x = self.inner[i](x)
            if "relu" in self.variant.inner:
                x = act(self.variant.activation, x)
            parts = [conv(part) for conv, part in zip(self.pointwise, x.chunk(self.groups), strict=True)]
            x = parts[0] if self.groups == 1 else torch.stack(parts, 1).flatten(0, 1)
        else:
            x = self.conv(x)
        if not self.step.norm:
            return x
        x = self.norms[i](x)
        if self.variant.skip and self.step.kernel > 1 and self.step.stride == 1 and len(source) > 1:
            x = x + fit(source, x)
        x = act(self.variant.activation, x)
        if self.attend is not None:
            means = F.pad(x.mean((1, 2)), (0, 0, 1, 1))
            a = self.attend
            weights = 2 * (means[:-2] * a[0] + means[1:-1] * a[1] + means[2:] * a[2]).sigmoid()
            x = x * weights[:, None, None]
        return x


def fit(source: Tensor, like: Tensor) -> Tensor:
    """The source, cropped to the middle, with zero channels behind or without its last ones."""
    source = crop(source, like)[: len(like)]
    return F.pad(source, (0, 0, 0, 0, 0, 0, 0, len(like) - len(source)))


def crop(source: Tensor, like: Tensor) -> Tensor:
    trim = (source.shape[1] - like.shape[1]) // 2
    return source[:, trim : trim + like.shape[1], trim : trim + like.shape[2]]


class Net(nn.Module):
    """A variant, built: images (1, 28, 28, B) → logits (B, 10)."""

    def __init__(self, variant: Variant):
        super().__init__()
        self.variant = variant
        self.layers = nn.ModuleList()
        n = 1
        widths: list[int] = []
        for i, step in enumerate(variant.steps):
            if step.kind in "cd":
                n_in = n + (variant.concat and n > 1 and step.kernel > 1)
                if variant.steps[i - 1].kind == "G" and i == len(variant.steps) - 1:
                    n_in = {"mean": n, "both": 2 * n, "all": sum(widths)}[variant.head]
                self.layers.append(Layer(step, n_in, variant))
                n = step.channels
                widths.append(n)
            else:
                strided = step.kind == "M" and variant.pool == "stride"
                self.layers.append(Conv(n, n, 2, 2, depthwise=True) if strided else nn.Identity())
                widths = [] if step.kind == "M" else widths

    def forward(self, x: Tensor) -> Tensor:
        image, maps = x, []
        for step, layer in zip(self.variant.steps, self.layers, strict=True):
            if step.kind == "M":
                x, image, maps = self._pool(x, layer), average(image), []
            elif step.kind == "G":
                x = self._head(x, maps)
            else:
                if self.variant.concat and len(x) > 1 and step.kernel > 1:
                    x = torch.cat((x, crop(image, x)))
                x = layer(x)
                maps.append(x)
        return x.flatten(0, 2).T

    def _head(self, x: Tensor, maps: list[Tensor]) -> Tensor:
        sources = maps if self.variant.head == "all" else [x]
        found = [source.mean((1, 2), keepdim=True) for source in sources]
        return torch.cat([*found, x.amax((1, 2), keepdim=True)] if self.variant.head == "both" else found)

    def _pool(self, x: Tensor, layer: nn.Module) -> Tensor:
        kind = self.variant.pool
        if kind == "stride":
            return layer(x)
        if kind == "average":
            return average(x)
        if kind == "both":
            return (average(x) + MaxPool.apply(x)) / 2
        if kind == "blur":  # the maximum over 2×2 at every place, a binomial filter, every second place
            x = torch.maximum(torch.maximum(x[:, :-1, :-1], x[:, :-1, 1:]), torch.maximum(x[:, 1:, :-1], x[:, 1:, 1:]))
            kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
            return Convolution.apply(x, kernel.expand(len(x), 1, 3, 3).contiguous(), 2, 1, True)
        return MaxPool.apply(x)


def quarters(x: Tensor) -> list[Tensor]:
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return [x[:, i:h:2, j:w:2] for i in (0, 1) for j in (0, 1)]


def average(x: Tensor) -> Tensor:
    a, b, c, d = quarters(x)
    return (a + b + c + d) / 4


def n_parameters(variant: Variant) -> int:
    """Of the network that is exported: branches and products are one kernel there."""
    with torch.device("meta"):
        net = Net(replace(variant, branches=False, expand=1))
    return sum(parameter.numel() for parameter in net.parameters())


def filled(variant: Variant, max_params: int) -> Variant:
    """All widths but the last times one factor, the largest that has fewer parameters than the budget; then what fits."""

    def scaled(factor: float) -> Variant:
        def width(step: Step, last: bool) -> Step:
            return step if step.kind in "MG" or last else replace(step, channels=max(2, round(step.channels * factor)))

        steps = variant.steps
        return replace(
            variant, steps=tuple(width(s, i == len(steps) - 1 or s.channels == 10) for i, s in enumerate(steps))
        )

    low, high = 0.2, 5.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if n_parameters(scaled(middle)) < max_params else (low, middle)
    return scaled(low)


def initialise(net: Net, seed: int) -> None:
    """PyTorch's own initialisation from the seed, and where asked orthogonal or Dirac weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            depthwise = parameter.shape[1] == 1 and len(parameter) > 1
            if net.variant.initial == "orthogonal" and not depthwise:
                nn.init.orthogonal_(parameter, gain=math.sqrt(1 / 3), generator=generator)
            if net.variant.initial == "dirac" and depthwise and parameter.shape[2] > 1:
                middle = parameter.shape[2] // 2
                parameter.data[:, 0, middle, middle] += 1


# --- training --------------------------------------------------------------------------------------------------------


def batch_sizes(variant: Variant, recipe: Recipe, n_images: int) -> list[int]:
    """The size of every batch of the whole training."""
    total = recipe.epochs * n_images
    if variant.batches == "64":
        return [64] * (recipe.epochs * (n_images // 64))
    sizes, seen = [], 0
    while seen + 128 <= total:
        size = (32, 64, 128)[min(2, int(3 * seen / total))]
        sizes.append(size)
        seen += size
    return sizes


def rates_of(variant: Variant, recipe: Recipe, n_steps: int) -> list[float]:
    rates = one_cycle(recipe.learning_rate, n_steps, variant.warmup)
    if variant.tail == "linear":
        top = max(range(n_steps), key=rates.__getitem__)
        rates = [r if i <= top else recipe.learning_rate * (n_steps - i) / (n_steps - top) for i, r in enumerate(rates)]
    return rates


def positions_of(sizes: list[int], n_images: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of these sizes, every image once before any comes again (but for those that a whole batch leaves over)."""
    left = torch.empty(0, dtype=torch.int64)
    for size in sizes:
        if len(left) < size:
            left = torch.randperm(n_images, generator=generator)
        yield left[:size]
        left = left[size:]


def train(
    variant: Variant, recipe: Recipe, split: Split, seed: int, teacher: nn.Module | None = None
) -> dict[str, float]:
    """Train one network; its losses and accuracy at the end, recalibrated."""
    net = Net(variant)
    initialise(net, seed)
    net.train()
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    rates_of_own = {id(norm.bias): variant.bias_rate for norm in norms}
    decays = {} if variant.decay_all else {id(p): 0.0 for norm in norms for p in norm.parameters()}
    optimizer = Soap(net.parameters(), recipe.weight_decay, rates_of_own, decays)
    generator = torch.Generator().manual_seed(seed)
    sizes = batch_sizes(variant, recipe, len(split.train))
    rates = rates_of(variant, recipe, len(sizes))
    losses: list[float] = []
    batches = positions_of(sizes, len(split.train), generator)
    for positions, rate in zip(batches, rates, strict=True):
        x, labels = select(split.train, positions, draw_matrices(len(positions), 28, recipe.augmentation, generator))
        logits = net(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=variant.smoothing)
        losses.append(loss.item())
        if teacher is not None:
            with torch.no_grad():
                soft = (teacher(x) / variant.temperature).softmax(1)
            other = F.cross_entropy(logits / variant.temperature, soft) * variant.temperature**2
            loss = loss * (1 - variant.teacher) + other * variant.teacher
        loss.backward()
        optimizer.step(rate)
    recalibrate(net, split.train)
    loss, accuracy = evaluate(net, split.val)
    tail = losses[-len(losses) // recipe.epochs :]
    return {"train_loss": round(statistics.mean(tail), 5), "loss": round(loss, 6), "accuracy": round(accuracy, 5)}


@torch.no_grad()
def recalibrate(net: nn.Module, images: Images) -> None:
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    net.eval()
    for norm in norms:
        norm.train().recalibrating = 1
    spread = torch.arange(EVALUATION_BATCH) * (len(images) // EVALUATION_BATCH)
    for start in range(N_RECALIBRATION_IMAGES // EVALUATION_BATCH):
        net(select(images, spread + start)[0])
    for norm in norms:
        norm.eval().recalibrating = 0


@torch.no_grad()
def evaluate(net: nn.Module, images: Images) -> tuple[float, float]:
    net.eval()
    loss, correct = 0.0, 0
    for positions in torch.arange(len(images)).split(EVALUATION_BATCH):
        n = len(positions)
        x, labels = select(images, F.pad(positions, (0, EVALUATION_BATCH - n)))  # the kernels want whole vectors
        logits, labels = net(x)[:n], labels[:n]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(images), correct / len(images)


# --- plan ------------------------------------------------------------------------------------------------------------


def steps(line: str) -> tuple[Step, ...]:
    """`c9 c7k1 M d10 d14*2p1 G c10k1-`: the notation of architectures, and `*n` for weights that are applied n times."""
    found = []
    for token in line.split():
        if token in "MG":
            found.append(Step(token))
            continue
        bare = token.endswith("-")
        numbers: dict[str, int] = {}
        name, text = "channels", ""
        for character in token[1:].rstrip("-") + " ":
            if character.isdigit():
                text += character
            else:
                numbers[name] = int(text)
                name, text = {"k": "kernel", "p": "padding", "s": "stride", "*": "times"}.get(character, ""), ""
        found.append(Step(token[0], norm=not bare, **numbers))
    return tuple(found)


BASES = {
    2000: "c9 c7k1 M d10 d14 d18 d24 G c10k1-",
    8000: "c20 d24 d44 M c22k1- d24 d36 d44 G c10k1-",
}


def k5(line: str) -> str:
    """Depthwise kernels of 5, padded so that the maps are as large as with 3."""
    return " ".join(token + "k5p1" if token[0] == "d" else token for token in line.split())


def padded(line: str) -> str:
    return " ".join(t + "p1" if t[0] in "cd" and "k1" not in t else t for t in line.split())


def repeated(line: str, times: int) -> str:
    """The last block padded, its layers but the first as wide as each other and applied several times."""
    head, _, tail = line.partition(" M ")
    return head + " M " + tail  # each size spells its own lines in VARIANTS


@dataclass(frozen=True)
class Way:
    """How a variant is made of a base line."""

    changes: dict[str, Any] = field(default_factory=dict)
    line: Callable[[str], str] = str
    lines: dict[int, str] = field(default_factory=dict)  # where the sizes differ


WAYS = {
    "base": Way(),
    "leaky": Way({"activation": "leaky"}),
    "silu": Way({"activation": "silu"}),
    "hardswish": Way({"activation": "hardswish"}),
    "squared relu": Way({"activation": "relu2"}),
    "gelu": Way({"activation": "gelu"}),
    "mish": Way({"activation": "mish"}),
    "celu": Way({"activation": "celu"}),
    "hardswish, inner norm alone": Way({"activation": "hardswish", "inner": "norm"}),
    "hardswish, nothing inside": Way({"activation": "hardswish", "inner": "nothing"}),
    "hardswish, max and average": Way({"activation": "hardswish", "pool": "both"}),
    "hardswish, average pool": Way({"activation": "hardswish", "pool": "average"}),
    "hardswish, skip": Way({"activation": "hardswish", "skip": True}),
    "hardswish, eca": Way({"activation": "hardswish", "attention": True}),
    "hardswish, shared": Way(
        {"activation": "hardswish"},
        lines={2000: "c9 c7k1 M d20 d20*3 G c10k1-", 8000: "c20 d24 d44 M c22k1- d40 d40*2 G c10k1-"},
    ),
    "inner norm alone": Way({"inner": "norm"}),
    "nothing inside": Way({"inner": "nothing"}),
    "depthwise 5": Way(line=k5),
    "skip": Way({"skip": True}),
    "eca": Way({"attention": True}),
    "average pool": Way({"pool": "average"}),
    "max and average": Way({"pool": "both"}),
    "blur pool": Way({"pool": "blur"}),
    "strided pool": Way({"pool": "stride"}),
    "head of both": Way({"head": "both"}),
    "head of all": Way({"head": "all"}),
    "groups": Way(
        {"groups": 2},
        lines={2000: "c10 c8k1 M d12 d16 d24 d32 G c10k1-", 8000: "c24 d32 d56 M c28k1- d32 d44 d60 G c10k1-"},
    ),
    "image beside": Way({"concat": True}),
    "padded": Way(line=padded),
    "padded, skip": Way({"skip": True}, line=padded),
    "shared": Way(lines={2000: "c9 c7k1 M d20 d20*3 G c10k1-", 8000: "c20 d24 d44 M c22k1- d40 d40*2 G c10k1-"}),
    "shared, skip": Way(
        {"skip": True}, lines={2000: "c9 c7k1 M d20 d20*3 G c10k1-", 8000: "c20 d24 d44 M c22k1- d40 d40*2 G c10k1-"}
    ),
    "branches": Way({"branches": True}),
    "product": Way({"expand": 4}),
    "orthogonal": Way({"initial": "orthogonal"}),
    "dirac": Way({"initial": "dirac"}),
    "offsets fast": Way({"bias_rate": 8.0}),
    "norms without decay": Way({"decay_all": False}),
    "linear tail": Way({"tail": "linear"}),
    "warmup 0.1": Way({"warmup": 0.1}),
    "warmup 0.35": Way({"warmup": 0.35}),
    "growing batches": Way({"batches": "growing"}),
    "teacher": Way({"teacher": 0.7}),
}


def make(name: str, size: int) -> Variant:
    way = WAYS[name]
    line = way.lines.get(size) or way.line(BASES[size])
    return filled(Variant(steps(line), **way.changes), size)


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    size: int
    epochs: int
    pair: int  # fold and seed

    @property
    def key(self) -> str:
        return f"{self.name}/{self.size}/{self.epochs}/{self.pair}"


def run(job: Job, images: Images) -> dict[str, Any]:
    split = fold(images, job.pair % N_FOLDS, partition=CONFIRM_PARTITION)
    recipe = replace(reference_recipe(epochs=job.epochs), learning_rate=RATE)
    start = time.process_time()
    variant = make(job.name, job.size)
    teacher = load_teacher(images, job.pair % N_FOLDS) if variant.teacher else None
    result = train(variant, recipe, split, 100 + job.pair, teacher)
    widths = [s.channels for s in variant.steps if s.channels]
    return {
        **asdict(job), **result, "n_parameters": n_parameters(variant), "widths": widths,
        "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


TEACHER = Variant(steps("c32p1 c32 M c64p1 c64 M c96 c96 G c10k1-"))


def load_teacher(images: Images, number: int) -> nn.Module:
    """A network of 200,000 parameters, trained once on the same images as its pupils, and kept."""
    path = FOLDER / f"teacher_{number}.pt"
    with FileLock(str(path) + ".lock"):
        net = Net(TEACHER)
        if not path.exists():
            raise SystemExit("train the teachers first: `teachers`")
        net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def plan(names: list[str], size: int, epochs: int, pairs: int) -> None:
    planned = {Job(**row).key for row in read(FOLDER / "plan.jsonl")}
    jobs = [Job(name, size, epochs, pair) for pair in range(pairs) for name in names]
    append(FOLDER / "plan.jsonl", [asdict(job) for job in jobs if job.key not in planned])


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    images = load_train(default_data_dir())
    while job := _claim(folder):
        result = run(job, images)
        with FileLock(folder / "lock"):
            append(folder / "runs.jsonl", [result])
        print(job.key, result["loss"], result["accuracy"], result["seconds"], flush=True)


def _claim(folder: Path) -> Job | None:
    claims = folder / "claims"
    claims.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        done = {Job(*(row[n] for n in ("name", "size", "epochs", "pair"))).key for row in read(folder / "runs.jsonl")}
        for row in read(folder / "plan.jsonl"):
            job = Job(**row)
            claim = claims / job.key.replace("/", "_")
            if job.key not in done and not (claim.exists() and Path(f"/proc/{claim.read_text()}").exists()):
                claim.write_text(str(multiprocessing.current_process().pid))
                return job
    return None


def table(rows: list[dict[str, Any]], size: int, epochs: int) -> list[str]:
    """Differences to the base of the same fold and seed: cross-entropy in thousandths, accuracy in points."""
    of = {(r["name"], r["pair"]): r for r in rows if (r["size"], r["epochs"]) == (size, epochs)}
    lines = [
        f"| below {size:,}, {epochs} epochs | n | parameters | loss − base, thousandths | p | accuracy − base, points | training loss | CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = []
    for name in dict.fromkeys(n for n, _ in of):
        pairs = [(of[name, p], of["base", p]) for n, p in of if n == name and ("base", p) in of]
        if not pairs:
            continue
        losses = [1000 * (a["loss"] - b["loss"]) for a, b in pairs]
        accuracies = [100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs]
        own = [a for a, _ in pairs]
        p = ttest_rel([a["loss"] for a, _ in pairs], [b["loss"] for _, b in pairs]).pvalue if len(pairs) > 1 else 1
        mean = statistics.mean
        lines_for = (
            f"| {name} | {len(pairs)} | {own[0]['n_parameters']:,} | {mean(losses):+.2f} ± {error(losses):.2f} | {p:.3f} "
            f"| {mean(accuracies):+.3f} ± {error(accuracies):.3f} | {mean(a['train_loss'] for a in own):.4f} "
            f"| {mean(a['seconds'] for a in own):.0f} |"
        )
        if name == "base":
            both = mean(1000 * b["loss"] for _, b in pairs), 100 * mean(b["accuracy"] for _, b in pairs)
            lines_for = f"| base | {len(pairs)} | {own[0]['n_parameters']:,} | {both[0]:.2f} | | {both[1]:.3f} | {mean(a['train_loss'] for a in own):.4f} | {mean(a['seconds'] for a in own):.0f} |"
            lines.append(lines_for)
        else:
            found.append((mean(losses), lines_for))
    return lines + [line for _, line in sorted(found)]


def error(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def teachers(number: int) -> None:
    """Train the teacher of one fold."""
    torch.set_num_threads(1)
    images = load_train(default_data_dir())
    split = fold(images, number, partition=CONFIRM_PARTITION)
    raise NotImplementedError(split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("names", nargs="+", choices=[*WAYS, "all"])
    planning.add_argument("--size", type=int, default=2000)
    planning.add_argument("--epochs", type=int, default=15)
    planning.add_argument("--pairs", type=int, default=6)
    training = commands.add_parser("train")
    training.add_argument("--workers", type=int, default=2)
    commands.add_parser("tables")
    args = parser.parse_args()
    if args.command == "plan":
        plan(list(WAYS) if "all" in args.names else args.names, args.size, args.epochs, args.pairs)
    elif args.command == "train":
        prepare(default_data_dir())
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=(FOLDER,)) for _ in range(args.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        rows = read(FOLDER / "runs.jsonl")
        for size, epochs in sorted({(r["size"], r["epochs"]) for r in rows}):
            print("\n".join(table(rows, size, epochs)), "\n")


if __name__ == "__main__":
    main()
