"""SGD and AdamW, as the functions that torch.optim is made of, and the one-cycle learning rate.

The classes of torch.optim and torch.optim.lr_scheduler import all of torch.compile to tell it to keep out: 1.7 s and
150 MB in every process that trains.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

START_DIVISOR, END_DIVISOR = 25, 1e4  # of the highest rate, and of the one it starts with: OneCycleLR's defaults


class Optimizer:
    """What both have in common. Nothing here waits for a GPU, so that a step can be captured in a CUDA graph."""

    def __init__(self, parameters: Iterable[Parameter], weight_decay: float):
        self._parameters = list(parameters)
        self._weight_decay = weight_decay
        self._fused = self._parameters[0].device.type == "cuda"

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _gradients(self) -> list[Tensor]:
        """Every parameter is used in every step, so each has one."""
        return [parameter.grad for parameter in self._parameters]


class Sgd(Optimizer):
    """SGD with Nesterov momentum, as `torch.optim.SGD`."""

    def __init__(self, parameters: Iterable[Parameter], weight_decay: float, momentum: float):
        super().__init__(parameters, weight_decay)
        self._momentum = momentum
        self._momenta: list[Tensor | None] = [None] * len(self._parameters)

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        """One step along the gradients; on a GPU the rate may be a float32 tensor () there."""
        sgd(
            self._parameters,
            self._gradients(),
            self._momenta,
            foreach=False,
            fused=self._fused,
            weight_decay=self._weight_decay,
            momentum=self._momentum,
            lr=learning_rate,
            dampening=0,
            nesterov=True,
            maximize=False,
        )


class AdamW(Optimizer):
    """AdamW with its usual constants, as `torch.optim.AdamW`."""

    def __init__(self, parameters: Iterable[Parameter], weight_decay: float):
        super().__init__(parameters, weight_decay)
        self._means = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._n_steps = [torch.zeros((), device=parameter.device) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        """One step along the gradients; on a GPU the rate may be a float32 tensor () there."""
        adamw(
            self._parameters,
            self._gradients(),
            self._means,
            self._squares,
            [],
            self._n_steps,
            foreach=False,
            fused=self._fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )


def one_cycle(highest: float, n_steps: int, warmup_fraction: float) -> list[float]:
    """The rate of every step: along half a cosine up to the highest, and along another to almost nothing.

    As OneCycleLR with `n_steps` + 1 steps (L. N. Smith and N. Topin, Super-Convergence, 2018, arXiv 1708.07120).
    """
    lowest = highest / START_DIVISOR
    last = lowest / END_DIVISOR
    top = max(warmup_fraction * (n_steps + 1), 2) - 1
    rise = [_cosine(lowest, highest, i / top) for i in range(math.floor(top) + 1)]
    fall = [_cosine(highest, last, (i - top) / (n_steps - top)) for i in range(len(rise), n_steps)]
    return [*rise, *fall][:n_steps]


def _cosine(start: float, end: float, way: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * way))
