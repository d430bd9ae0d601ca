"""Networks and trainings that the notation cannot say, to see what they would be worth; `structures.py` trains them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from chwn import Conv, Convolution, MaxPool, Norm
from torch import Tensor, nn
from torch.nn import functional as F

from nas_mnist.model.architecture import N_CLASSES


@dataclass(frozen=True)
class Step:
    """One layer of a variant: a convolution (c, d), shifts and a pointwise one (s), a pool (M), the global pool (G)."""

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
    taught: float = 0.0  # share of the loss that is a teacher's: four times the budget, trained on the same images
    temperature: float = 1.0  # of both in the teacher's share


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
        elif step.kind == "s":
            self.conv = Conv(n_in, n, 1)
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
            x = self.conv(shifted(x, self.step.padding) if self.step.kind == "s" else x)
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


def shifted(x: Tensor, padding: int) -> Tensor:
    """A ninth of the channels moved to each neighbour, one stays: B. Wu et al., Shift, 2018, arXiv 1711.08141."""
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    h, w = x.shape[1] - 2, x.shape[2] - 2
    places = [(1, 1), (0, 1), (1, 0), (2, 1), (1, 2), (0, 0), (2, 2), (0, 2), (2, 0)]  # the middle, cross, corners
    return torch.cat([part[:, i : i + h, j : j + w] for part, (i, j) in zip(x.tensor_split(9), places, strict=True)])


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
            if step.kind in "cds":
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
    """All widths times one factor, the largest with fewer parameters than the budget; ten channels stay ten."""

    def width(step: Step, factor: float) -> Step:
        stays = step.kind in "MG" or step.channels == N_CLASSES
        return step if stays else replace(step, channels=max(2, round(step.channels * factor)))

    def scaled(factor: float) -> Variant:
        return replace(variant, steps=tuple(width(step, factor) for step in variant.steps))

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


def steps(line: str) -> tuple[Step, ...]:
    """`c9 c7k1 M d10 d14*2p1 G c10k1-`: the notation, and `*n` for weights that are applied n times."""
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
    1000: "c6 d6 M c7k1- d7 d7 d10 d10 c10k1- G",
    2000: "c9 c7k1 M d10 d14 d18 d24 G c10k1-",
    8000: "c20 d24 d44 M c22k1- d24 d36 d44 G c10k1-",
}


def k5(line: str) -> str:
    """Depthwise kernels of 5, padded so that the maps are as large as with 3."""
    return " ".join(token + "k5p1" if token[0] == "d" else token for token in line.split())


def padded(line: str) -> str:
    return " ".join(t + "p1" if t[0] in "cd" and "k1" not in t else t for t in line.split())


def shift(line: str) -> str:
    return line.replace(" d", " s")


def shift_twice(line: str) -> str:
    """Each of them twice, the first padded."""
    return " ".join(f"s{t[1:]}p1 s{t[1:]}" if t[0] == "d" else t for t in line.split())


SHARED = {2000: "c9 c7k1 M d20 d20*3 G c10k1-", 8000: "c20 d24 d44 M c22k1- d40 d40*2 G c10k1-"}


@dataclass(frozen=True)
class Way:
    """How a variant is made of a base line."""

    changes: dict[str, Any] = field(default_factory=dict)
    line: Callable[[str], str] = str
    lines: dict[int, str] = field(default_factory=dict)  # where the sizes differ


WAYS = {
    "base": Way(),
    "leaky": Way({"activation": "leaky"}),
    "hardswish, taught": Way({"activation": "hardswish", "taught": 0.5, "temperature": 2.0}),
    "hardswish, taught more, hotter": Way({"activation": "hardswish", "taught": 0.9, "temperature": 3.0}),
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
    "hardswish, shared": Way({"activation": "hardswish"}, lines=SHARED),
    "hardswish, shift": Way({"activation": "hardswish"}, line=shift),
    "hardswish, shift twice": Way({"activation": "hardswish"}, line=shift_twice),
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
    "shared": Way(lines=SHARED),
    "shared, skip": Way({"skip": True}, lines=SHARED),
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
}


def make(name: str, size: int) -> Variant:
    way = WAYS[name]
    line = way.lines.get(size) or way.line(BASES[size])
    return filled(Variant(steps(line), **way.changes), size)
