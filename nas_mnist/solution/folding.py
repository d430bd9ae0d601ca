"""A trained network at rest: convolutions with a bias and an activation or none, pools; the norms are folded.

A norm before the activation goes into the convolution before it. Of a norm behind the activation the size of the
factors goes there, too, through the ReLU: so the channels of a map are of one size, as int8 needs it, which has one
scale for all of them (M. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, 2019,
arXiv 1906.04721). Signs and shifts go into the next convolution: a mean lets them pass, a max-pool too where no sign is
negative. A convolution with padding cannot take them, as its padding is 0 behind the norm and not before: there they
become a depthwise 1×1 convolution.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nas_mnist.model.architecture import Activation
from nas_mnist.model.network import Network
from nas_mnist.solution.walk import Convolution, Pool, walk

NORM_EPS = 1e-5  # of nn.BatchNorm2d


@dataclass(frozen=True)
class FoldedConvolution:
    """y = Σ x·weight + bias, then the activation. Weight (C', C / groups, K, K) and bias (C',), float64."""

    name: str
    weight: np.ndarray
    bias: np.ndarray
    groups: int
    stride: int
    padding: int
    activation: Activation | None
    in_side: int
    side: int

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def is_norm(self) -> bool:
        """Whether it is a norm that no convolution could take: each value becomes one of its own."""
        return self.name.startswith(("norm", "depthwise_norm"))

    @property
    def kernel(self) -> int:
        return self.weight.shape[2]


FoldedStep = FoldedConvolution | Pool


@dataclass(frozen=True)
class Norm:
    """A batch norm at rest, y = x·scale + shift for each channel, in float64."""

    name: str
    scale: np.ndarray
    shift: np.ndarray


def fold(network: Network) -> list[FoldedStep]:
    """The steps of the network, in the order in which they are computed, with every norm folded."""
    architecture, state = network.architecture, network.state_dict()
    steps: list[FoldedStep] = []
    pending: Norm | None = None
    for step in (step for steps in walk(architecture) for step in steps):
        if pending and not _takes(step, pending):
            steps.append(_as_convolution(pending, step.in_side))
            pending = None
        if isinstance(step, Pool):
            steps.append(step)
            continue
        behind, rest = read_norm(step, state), None
        if behind and not architecture.norm_first:
            behind, rest = _split(behind)
        steps.append(_fold(step, state, pending, behind, architecture.activation if step.activation else None))
        pending = rest
    if pending:
        steps.append(_as_convolution(pending, 1))
    return steps


def _takes(step: Convolution | Pool, norm: Norm) -> bool:
    """Whether a norm before the step can be one behind it, or be folded into it."""
    if isinstance(step, Convolution):
        return step.padding == 0
    return not step.is_max or bool((norm.scale > 0).all())


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def read_norm(step: Convolution, state: Mapping[str, Tensor]) -> Norm | None:
    """The norm behind a convolution at rest, from the network's state; None if there is none."""
    if step.norm is None:
        return None
    weight, bias, mean, var = (
        _numpy(state[f"{step.norm_source}.{field}"]) for field in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(var + NORM_EPS)
    return Norm(step.norm, scale, bias - mean * scale)


def _split(norm: Norm) -> tuple[Norm, Norm]:
    """A norm behind a ReLU as one before it, of the factors' size, and one behind it, of their signs and the shifts."""
    size, sign = np.abs(norm.scale), np.where(norm.scale < 0, -1.0, 1.0)
    return Norm(norm.name, size, np.zeros_like(size)), Norm(norm.name, sign, norm.shift)


def _fold(
    step: Convolution,
    state: Mapping[str, Tensor],
    before: Norm | None,
    behind: Norm | None,
    activation: Activation | None,
) -> FoldedConvolution:
    weight = _numpy(state[f"{step.source}.weight"])
    bias = _numpy(state[f"{step.source}.bias"]) if step.bias else np.zeros(step.channels)
    if before:
        channels = (slice(None), np.newaxis) if step.groups > 1 else (np.newaxis, slice(None))
        bias = bias + (weight * before.shift[channels][..., None, None]).sum((1, 2, 3))
        weight = weight * before.scale[channels][..., None, None]
    if behind:
        weight = weight * behind.scale[:, None, None, None]
        bias = bias * behind.scale + behind.shift
    return FoldedConvolution(
        step.name, weight, bias, step.groups, step.stride, step.padding, activation, step.in_side, step.side
    )


def _as_convolution(norm: Norm, side: int) -> FoldedConvolution:
    weight = norm.scale[:, None, None, None]
    return FoldedConvolution(norm.name, weight, norm.shift, len(norm.scale), 1, 0, None, side, side)
