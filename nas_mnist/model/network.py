"""Architecture → `torch.nn.Module`."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_mnist.model.architecture import ACTIVATION_NAMES, Activation, Architecture, Conv, MaxPool


class Dropout(nn.Module):
    """Dropout of whole channels, or of single elements, from an explicit generator: (B, C, H, W) → (B, C, H, W).

    Channels are the default: a mask of B×C numbers is drawn where an element-wise one needs B×C×H×W.
    """

    def __init__(self, rate: float, elementwise: bool):
        super().__init__()
        self.rate = rate
        self.elementwise = elementwise
        self.generator: torch.Generator | None = None

    def extra_repr(self) -> str:
        return f"rate={self.rate}, elementwise={self.elementwise}"

    def mask(self, x: Tensor) -> Tensor:
        """0 or 1/keep for each channel (B, C, 1, 1), or for each element of `x`."""
        keep = 1 - self.rate
        shape = x.shape if self.elementwise else (*x.shape[:2], 1, 1)
        mask = torch.empty(shape, device=x.device)  # float32, contiguous: the draws depend on the shape of x alone
        return mask.bernoulli_(keep, generator=self.generator).div_(keep).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x) if self.training and self.rate > 0 else x


ACTIVATIONS = {"relu": F.relu, "hardswish": F.hardswish}


class NormAct(nn.Module):
    """What follows a convolution: norm and activation in either order, then dropout: (B, C, H, W) → (B, C, H, W)."""

    def __init__(
        self,
        channels: int,
        *,
        norm: bool,
        norm_first: bool,
        dropout: float,
        elementwise: bool,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm else None
        self.norm_first = norm_first
        self.activation = activation
        self.dropout = Dropout(dropout, elementwise)

    def extra_repr(self) -> str:
        name = ACTIVATION_NAMES[self.activation]
        return f"norm → {name}" if self.norm_first else f"{name} → norm"

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.norm is None:
            y = act(x)
        elif self.norm_first:
            y = act(self.norm(x))
        else:
            y = self.norm(act(x))
        dropped: Tensor = self.dropout(y)
        return dropped


class Conv2d(nn.Conv2d):  # torchinfo counts the multiply-adds of a class by the "Conv" in its name
    """(B, C, H, W) → (B, C', H', W')."""

    def reset_parameters(self) -> None:
        """Left to `build`: PyTorch would draw from the global generator."""


class Block(nn.Sequential):
    """A convolution and what follows it, up to the next token of the line."""


class GlobalPool(nn.Module):
    """The mean over the map: (B, C, H, W) → (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Network(nn.Sequential):
    """A built architecture: images (B, 1, 28, 28), float32, normalised → logits (B, 10).

    One child for each token of the notation line, in its order.
    """

    def __init__(self, architecture: Architecture):
        super().__init__(*_children(architecture))
        self.architecture = architecture

    def forward(self, x: Tensor) -> Tensor:
        for child in self:
            x = child(x)
        return x.flatten(1)

    def draw_from(self, generator: torch.Generator) -> None:
        """Draw every dropout mask from this generator; it lives on the network's device."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.generator = generator


def _children(architecture: Architecture) -> list[nn.Module]:
    children: list[nn.Module] = []
    for i, (layer, shape) in enumerate(zip(architecture.layers, architecture.shapes, strict=True)):
        if isinstance(layer, Conv):
            dropout = 0.0 if i == architecture.last_conv else architecture.dropout
            children.append(_convolution(layer, shape.in_channels, architecture, dropout))
        else:
            children.append(nn.MaxPool2d(2) if isinstance(layer, MaxPool) else GlobalPool())
    return children


def _convolution(layer: Conv, in_channels: int, architecture: Architecture, dropout: float) -> Block:
    def norm_act(channels: int, rate: float) -> list[nn.Module]:
        if not layer.activation:
            return []
        return [
            NormAct(
                channels,
                norm=layer.norm,
                norm_first=architecture.norm_first,
                dropout=rate,
                elementwise=architecture.elementwise_dropout,
                activation=architecture.activation,
            )
        ]

    size = layer.kernel, layer.stride, layer.padding
    if not layer.separable:
        conv = Conv2d(in_channels, layer.channels, *size, bias=layer.bias)
        return Block(conv, *norm_act(layer.channels, dropout))
    depthwise = Conv2d(in_channels, in_channels, *size, groups=in_channels, bias=False)
    pointwise = Conv2d(in_channels, layer.channels, 1, bias=layer.bias)
    return Block(depthwise, *norm_act(in_channels, 0.0), pointwise, *norm_act(layer.channels, dropout))


Initialisation = Literal["default", "positive"]


def build(
    architecture: Architecture,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    initialisation: Initialisation = "default",
) -> Network:
    """The network, initialised from a seed of its own, channels-last on the device.

    By default as PyTorch does. "positive" is for a network without norms whose logits pass a ReLU: He's initialisation,
    which keeps the scale of the maps, and no negative weight in the last layer, so that every class has a gradient. (K.
    He et al., Delving Deep into Rectifiers, 2015, arXiv 1502.01852.)
    """
    network = Network(architecture)  # on the CPU, so that every device starts from the same weights
    generator = torch.Generator().manual_seed(seed)
    convs = [module for module in network.modules() if isinstance(module, Conv2d)]
    for conv in convs:
        _initialise(conv, math.sqrt(5) if initialisation == "default" else 0.0, generator)
    if initialisation == "positive":
        convs[-1].weight.data.abs_()
    return network.to(device).to(memory_format=torch.channels_last)


def _initialise(conv: nn.Conv2d, slope: float, generator: torch.Generator) -> None:
    """Uniform weights, as for a leaky ReLU of this slope: √5 is PyTorch's default, and 0 a ReLU's."""
    nn.init.kaiming_uniform_(conv.weight, a=slope, generator=generator)
    if conv.bias is not None:
        bound = 1 / math.sqrt(conv.weight[0].numel())
        nn.init.uniform_(conv.bias, -bound, bound, generator=generator)


def count_parameters(architecture: Architecture) -> int:
    """Parameters of the built network, frozen ones included, buffers not; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Network(architecture).parameters())
