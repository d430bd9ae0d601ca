"""What a network is made of: frozen layers, a one-line notation, and the arithmetic of shapes. No torch here.

An architecture is one readable line, layers first, options behind a bar:

    c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05

    cN      3×3 convolution to N channels         dN    depthwise-separable convolution to N channels
    kK      kernel K×K                            M     2×2 max-pool
    sS      stride S                              G     global average pool
    pP      padding P                             |     options follow
    +b      with a bias                           act-norm       activation before the normalisation
    r       activation, no normalisation          dropout=R      rate R after every convolution but the last
    -       bare: nothing follows                 elementwise    dropout of elements instead of channels
                                                  hardswish      x·min(max(x + 3, 0), 6) / 6 instead of ReLU
                                                  deskew         the image made upright before the first layer

Suffixes stand in the order k, s, p, +b, then r or -. A depthwise-separable convolution is a depthwise K×K convolution,
normalisation, activation, and a 1×1 convolution. Convolutions after `G` act on a 1×1 map: they are the dense layers.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from nas_mnist.errors import ArchitectureError

INPUT_CHANNELS = 1
INPUT_SIDE = 28
N_CLASSES = 10
MAX_CHANNELS = 1024  # far above any network worth the name; keeps a typing mistake from filling the memory
MAX_LAYERS, MAX_LINE = 100, 5000  # layers, characters; the same


Activation = Literal["relu", "hardswish"]
ACTIVATION_NAMES = {"relu": "ReLU", "hardswish": "hard-swish"}


@dataclass(frozen=True)
class Conv:
    """A convolution and what follows it. `activation` without `norm` is allowed, `norm` without `activation` is not."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    separable: bool = False
    bias: bool = False
    norm: bool = True
    activation: bool = True

    def __post_init__(self) -> None:
        if self.norm and not self.activation:
            raise ArchitectureError(
                "a convolution with a norm needs an activation: leave out the norm or add the activation"
            )
        for name, low, high in (
            ("channels", 1, MAX_CHANNELS),
            ("kernel", 1, 28),
            ("stride", 1, 28),
            ("padding", 0, 27),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ArchitectureError(f"{name} must be {low} to {high}, not {value}")

    def __str__(self) -> str:
        parts = ["d" if self.separable else "c", str(self.channels)]
        parts += [f"k{self.kernel}"] * (self.kernel != 3)
        parts += [f"s{self.stride}"] * (self.stride != 1)
        parts += [f"p{self.padding}"] * (self.padding != 0)
        parts += ["+b"] * self.bias
        parts += ["" if self.norm else "r" if self.activation else "-"]
        return "".join(parts)


@dataclass(frozen=True)
class MaxPool:
    """A 2×2 max-pool with stride 2; an odd last row or column is dropped."""

    kernel = 2
    stride = 2
    padding = 0

    def __str__(self) -> str:
        return "M"


@dataclass(frozen=True)
class GlobalPool:
    """The mean over the whole map: what is left is 1×1."""

    def __str__(self) -> str:
        return "G"


Layer = Conv | MaxPool | GlobalPool


class LayerShape(NamedTuple):
    """One line of the receptive-field table, and what the layer costs.

    `side` n is the side of the output map in pixels, `jump` j the distance in input pixels between neighbouring
    outputs, `receptive_field` r the side of the input square one output sees. After a global pool j stays as it was.
    """

    layer: Layer
    in_channels: int
    in_side: int
    channels: int
    side: int
    jump: int
    receptive_field: int
    kernel: int
    stride: int
    padding: int
    n_parameters: int
    n_macs: int

    @property
    def ram(self) -> int:
        """Bytes of the maps that are alive at once in int8: one that is read, one that is written.

        A separable convolution is two layers, with the depthwise one's map between them.
        """
        read, between, written = self.in_channels * self.in_side**2, self._between, self.channels * self.side**2
        return max(read + between, between + written) if between else read + written

    @property
    def n_activations(self) -> int:
        """Numbers in the maps that it writes for one image."""
        return self._between + self.channels * self.side**2

    @property
    def _between(self) -> int:
        """Numbers in the depthwise convolution's map of a separable one."""
        separable = isinstance(self.layer, Conv) and self.layer.separable
        return self.in_channels * self.side**2 if separable else 0


@dataclass(frozen=True)
class Architecture:
    """A network, complete: `str(a)` is its line, and `parse(str(a)) == a`.

    Raises `ArchitectureError` if a map shrinks below 1×1 or the end is not 10 values on a 1×1 map.
    """

    layers: tuple[Layer, ...]
    norm_first: bool = True
    dropout: float = 0.0
    elementwise_dropout: bool = False
    activation: Activation = "relu"  # hardswish: A. Howard et al., Searching for MobileNetV3, 2019, arXiv 1905.02244
    # Without parameters, see `data.deskew`. After Y. LeCun et al., Gradient-Based Learning Applied to Document
    # Recognition, 1998, whose linear classifiers, neighbours and dense networks gain by it.
    deskewed: bool = False

    def __post_init__(self) -> None:
        if self.activation != "relu" and not self.norm_first:
            raise ArchitectureError(f"act-norm is for ReLU: {self.activation} stands behind the norm, leave out one")
        if not 0 <= self.dropout < 1:
            raise ArchitectureError(f"dropout rate must be at least 0 and below 1, not {self.dropout:g}")
        if not self.layers:
            raise ArchitectureError("an architecture needs at least one layer, such as `c10k28-`")
        if len(self.layers) > MAX_LAYERS:
            raise ArchitectureError(f"an architecture has at most {MAX_LAYERS} layers, not {len(self.layers):,}")
        last = self.shapes[-1]
        if (last.channels, last.side) != (N_CLASSES, 1):
            raise ArchitectureError(
                f"the network must end with {N_CLASSES} channels on a 1×1 map; `{self.line}` ends with "
                f"{last.channels} on {last.side}×{last.side}: end it with `G c{N_CLASSES}k1-`"
            )

    def __str__(self) -> str:
        options = ["act-norm"] * (not self.norm_first)
        options += [f"dropout={self.dropout!r}"] * (self.dropout > 0)
        options += ["elementwise"] * self.elementwise_dropout
        options += [self.activation] * (self.activation != "relu")
        options += ["deskew"] * self.deskewed
        return " | ".join([self.line, " ".join(options)] if options else [self.line])

    @property
    def line(self) -> str:
        """The layers alone, without the options."""
        return " ".join(map(str, self.layers))

    @cached_property
    def shapes(self) -> tuple[LayerShape, ...]:
        """One `LayerShape` for each layer, in order."""
        shapes, channels, side, jump, field = [], INPUT_CHANNELS, INPUT_SIDE, 1, 1
        for position, layer in enumerate(self.layers, 1):
            shape = _shape(layer, channels, side, jump, field)
            if shape.side < 1:
                raise ArchitectureError(
                    f"layer {position} `{layer}` shrinks the {side}×{side} map below 1×1: remove a layer or add padding"
                )
            shapes.append(shape)
            channels, side, jump, field = shape.channels, shape.side, shape.jump, shape.receptive_field
        return tuple(shapes)

    @property
    def last_conv(self) -> int:
        """The place of the convolution whose channels are the classes."""
        return max(i for i, layer in enumerate(self.layers) if isinstance(layer, Conv))

    @property
    def n_parameters(self) -> int:
        """Trainable parameters, by arithmetic; `network.count_parameters` counts the built network."""
        return sum(shape.n_parameters for shape in self.shapes)

    @property
    def n_macs(self) -> int:
        """Multiply-adds of the convolutions for one image."""
        return sum(shape.n_macs for shape in self.shapes)

    @property
    def n_activations(self) -> int:
        """Numbers in all maps for one image: what a training step's time mostly goes by."""
        return sum(shape.n_activations for shape in self.shapes)

    @property
    def ram(self) -> int:
        """Bytes of int8 maps that are alive at once, in the layer where these are most; weights are in flash."""
        return max(shape.ram for shape in self.shapes)

    @property
    def receptive_field(self) -> int:
        """Side in pixels of the input square that one output sees."""
        return self.shapes[-1].receptive_field


@dataclass(frozen=True)
class Limits:
    """What a network may take besides its parameters: multiply-adds and bytes of int8 maps at most, None for any."""

    max_macs: int | None = None
    max_ram: int | None = None

    def excess(self, architecture: Architecture) -> dict[str, int]:
        """By how much each limit that there is was exceeded; nothing of 0 or less is."""
        taken = {"macs": (architecture.n_macs, self.max_macs), "ram": (architecture.ram, self.max_ram)}
        return {name: n - limit for name, (n, limit) in taken.items() if limit is not None}

    def admit(self, architecture: Architecture) -> bool:
        return all(excess <= 0 for excess in self.excess(architecture).values())


NO_LIMITS = Limits()


def _shape(layer: Layer, channels: int, side: int, jump: int, field: int) -> LayerShape:
    if isinstance(layer, GlobalPool):
        field += (side - 1) * jump
        return LayerShape(layer, channels, side, channels, 1, jump, field, side, 1, 0, 0, 0)
    kernel, stride, padding = layer.kernel, layer.stride, layer.padding
    out_side = (side + 2 * padding - kernel) // stride + 1
    field += (kernel - 1) * jump
    out_channels, n_parameters, n_macs = channels, 0, 0
    if isinstance(layer, Conv):
        out_channels = layer.channels
        n_weights = _weights(layer, channels)
        n_parameters = n_weights + layer.bias * out_channels + 2 * layer.norm * out_channels
        if layer.separable:  # the norm between the depthwise and the pointwise convolution
            n_parameters += 2 * channels * layer.norm
        n_macs = n_weights * out_side**2
    return LayerShape(
        layer,
        channels,
        side,
        out_channels,
        out_side,
        jump * stride,
        field,
        kernel,
        stride,
        padding,
        n_parameters,
        n_macs,
    )


def _weights(conv: Conv, in_channels: int) -> int:
    if conv.separable:
        return in_channels * conv.kernel**2 + in_channels * conv.channels
    return in_channels * conv.channels * conv.kernel**2


_NUMBER = "[0-9]{1,6}"  # no longer: Python would take minutes over a number of a million digits
_CONV = re.compile(
    rf"(?P<kind>[cd])(?P<channels>{_NUMBER})(k(?P<kernel>{_NUMBER}))?(s(?P<stride>{_NUMBER}))?(p(?P<padding>{_NUMBER}))?"
    r"(?P<bias>\+b)?(?P<end>[r-])?"
)


def parse(text: str) -> Architecture:
    """The architecture that a line denotes.

    Raises `ArchitectureError`, with the position (counted from 1) of the token that does not fit.
    """
    if len(text) > MAX_LINE:
        raise ArchitectureError(f"an architecture is a line of at most {MAX_LINE:,} characters, not {len(text):,}")
    line, bar, options = text.partition("|")
    layers = tuple(_parse_layer(token, position) for token, position in _tokens(line, 0))
    architecture = Architecture(layers)
    for token, position in _tokens(options, len(line) + len(bar)):
        architecture = _parse_option(architecture, token, position)
    return architecture


def _tokens(text: str, offset: int) -> list[tuple[str, int]]:
    return [(match[0], match.start() + offset + 1) for match in re.finditer(r"\S+", text)]


def _parse_layer(token: str, position: int) -> Layer:
    if token == "M":
        return MaxPool()
    if token == "G":
        return GlobalPool()
    match = _CONV.fullmatch(token)
    if not match:
        raise ArchitectureError(
            f"`{token}` at position {position} is no layer: write cN or dN with k, s, p, +b, r or - behind it, M, or G"
        )
    given = {name: int(match[name]) for name in ("channels", "kernel", "stride", "padding") if match[name]}
    try:
        return Conv(
            **given,
            separable=match["kind"] == "d",
            bias=bool(match["bias"]),
            norm=not match["end"],
            activation=match["end"] != "-",
        )
    except ArchitectureError as error:
        raise ArchitectureError(f"`{token}` at position {position}: {error}") from None


def _parse_option(architecture: Architecture, token: str, position: int) -> Architecture:
    if token == "act-norm":
        return replace(architecture, norm_first=False)
    if token == "elementwise":
        return replace(architecture, elementwise_dropout=True)
    if token == "hardswish":
        return replace(architecture, activation="hardswish")
    if token == "deskew":
        return replace(architecture, deskewed=True)
    name, _, value = token.partition("=")
    if name == "dropout" and re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]{1,3})?", value):
        return replace(architecture, dropout=float(value))
    raise ArchitectureError(
        f"`{token}` at position {position} is no option: write act-norm, elementwise, hardswish, deskew, or "
        "dropout=RATE (0 <= RATE < 1)"
    )
