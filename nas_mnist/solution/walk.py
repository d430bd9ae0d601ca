"""The walk over a network that every writer shares: PyTorch module, page, ONNX and C see the same steps and names."""

from dataclasses import dataclass

from nas_mnist.model.architecture import Architecture, Conv, LayerShape, MaxPool


@dataclass(frozen=True)
class Convolution:
    """One convolution of the built network with what follows it; a separable convolution has two."""

    name: str
    source: str  # its name in the state dict of the built network, "3.0"
    norm: str | None
    norm_source: str
    in_channels: int
    channels: int
    groups: int
    kernel: int
    stride: int
    padding: int
    bias: bool
    activation: bool
    in_side: int
    side: int

    @property
    def is_depthwise(self) -> bool:
        """Of a separable convolution the first; with a single channel it is a plain one, too."""
        return self.name.startswith("depthwise")

    @property
    def n_parameters(self) -> int:
        """Of the convolution alone, without the norm behind it."""
        return self.in_channels // self.groups * self.channels * self.kernel**2 + self.bias * self.channels


@dataclass(frozen=True)
class Pool:
    """A 2×2 max-pool, or the mean over the whole map."""

    is_max: bool
    channels: int
    in_side: int
    side: int


Step = Convolution | Pool


def walk(architecture: Architecture) -> list[list[Step]]:
    """The steps of each token of the line, in order: two for a separable convolution, one for any other."""
    steps, number = [], 0
    for index, shape in enumerate(architecture.shapes):
        if isinstance(shape.layer, Conv):
            number += 1
            steps.append(_convolutions(index, number, shape))
        else:
            steps.append([Pool(isinstance(shape.layer, MaxPool), shape.channels, shape.in_side, shape.side)])
    return steps


def _convolutions(index: int, number: int, shape: LayerShape) -> list[Step]:
    """The steps of the `number`-th convolution, which is child `index` of the built network."""
    conv: Conv = shape.layer

    def step(name: str, norm: str, position: int, in_side: int, **size: int) -> Convolution:
        return Convolution(
            name=f"{name}{number}",
            source=f"{index}.{position}",
            norm=f"{norm}{number}" if conv.norm else None,
            norm_source=f"{index}.{position + 1}.norm",
            in_channels=shape.in_channels,
            activation=conv.activation,
            in_side=in_side,
            side=shape.side,
            **size,
        )

    size = {"kernel": conv.kernel, "stride": conv.stride, "padding": conv.padding}
    if not conv.separable:
        return [step("conv", "norm", 0, shape.in_side, channels=conv.channels, groups=1, bias=conv.bias, **size)]
    c = shape.in_channels
    one = {"kernel": 1, "stride": 1, "padding": 0}
    return [
        step("depthwise", "depthwise_norm", 0, shape.in_side, channels=c, groups=c, bias=False, **size),
        step(
            "pointwise",
            "norm",
            1 + conv.activation,
            shape.side,
            channels=conv.channels,
            groups=1,
            bias=conv.bias,
            **one,
        ),
    ]
