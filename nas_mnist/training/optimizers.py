"""SGD, AdamW and SOAP, and the one-cycle learning rate.

The first two are the functions that torch.optim is made of: its classes, those of torch.optim.lr_scheduler and every
library's optimizers import all of torch.compile to tell it to keep out: 1.7 s and 150 MB in every process that trains.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from nas_mnist.kernels.optimizers import BETA1, BETA2, EPSILON, PRECONDITION_FREQUENCY, SOAP_BETA
from nas_mnist.model.network import Network
from nas_mnist.training.recipe import Recipe

DIV_FACTOR, FINAL_DIV_FACTOR = 25, 1e4  # of the highest rate, and of the one it starts with: OneCycleLR's defaults


class Optimizer:
    """What all have in common. No step waits for a GPU, so that it can be captured in a CUDA graph."""

    def __init__(self, parameters: Iterable[Parameter], weight_decay: float):
        self._parameters = list(parameters)
        self._weight_decay = weight_decay
        self._fused = any(parameter.device.type == "cuda" for parameter in self._parameters)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def prepare(self) -> None:
        """What the next step needs of the host. To be called before each; never captured."""

    def step(self, learning_rate: float | Tensor) -> None:
        """One step along the gradients; on a GPU the rate may be a float32 tensor () there."""
        raise NotImplementedError

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
            beta1=BETA1,
            beta2=BETA2,
            lr=learning_rate,
            weight_decay=self._weight_decay,
            eps=EPSILON,
            maximize=False,
        )


class Soap(Optimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner; AdamW for vectors (biases, and norms).

    A layer's weights are a matrix, a row for each output channel. N. Vyas et al., SOAP: Improving and Stabilizing
    Shampoo using Adam, 2024, arXiv 2409.11321; the bases are found anew by `eigh`.
    """

    def __init__(self, parameters: Iterable[Parameter], weight_decay: float):
        super().__init__(parameters, weight_decay)
        self._matrices = [_Matrix.of(parameter) for parameter in self._parameters if parameter.ndim > 1]
        self._vectors = AdamW([parameter for parameter in self._parameters if parameter.ndim < 2], weight_decay)
        self._n_prepared = 0
        self._n_steps = torch.zeros((), device=self._parameters[0].device)

    @torch.no_grad()
    def prepare(self) -> None:
        """Renew the bases where it is time; this waits for a GPU."""
        if self._n_prepared % PRECONDITION_FREQUENCY == 1:  # first after one step: before it is nothing to go by
            for matrix in self._matrices:
                renew_bases(matrix.mean, matrix.square, matrix.factors, matrix.bases)
        self._n_prepared += 1

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        """One step along the gradients; on a GPU the rate may be a float32 tensor () there."""
        self._vectors.step(learning_rate)
        self._n_steps += 1
        # Adam's corrections, for two means that both keep as much.
        rate = learning_rate / (1 - SOAP_BETA**self._n_steps).sqrt()
        for matrix in self._matrices:
            matrix.parameter.mul_(1 - learning_rate * self._weight_decay)
            matrix.step(rate)


@dataclass(frozen=True)
class _Matrix:
    """A layer's weights (C', C, K, K), taken as a matrix (R, S), and what SOAP keeps of its gradients."""

    parameter: Parameter
    mean: Tensor  # (R, S), in the eigenbases
    square: Tensor  # (R, S), in the eigenbases
    factors: tuple[Tensor, Tensor]  # (R, R) and (S, S): of rows with rows, of columns with columns
    bases: tuple[Tensor, Tensor]  # their eigenvectors, as columns

    @staticmethod
    def of(parameter: Parameter) -> "_Matrix":
        mean = torch.zeros_like(parameter.flatten(1))
        sizes = mean.shape
        factors = tuple(mean.new_zeros(n, n) for n in sizes)
        bases = tuple(torch.eye(n, dtype=mean.dtype, device=mean.device) for n in sizes)
        return _Matrix(parameter, mean, torch.zeros_like(mean), factors, bases)

    def step(self, rate: Tensor) -> None:
        gradient = self.parameter.grad.flatten(1)
        rows, columns = self.factors
        rows.lerp_(gradient @ gradient.T, 1 - SOAP_BETA)
        columns.lerp_(gradient.T @ gradient, 1 - SOAP_BETA)
        left, right = self.bases
        turned = left.T @ gradient @ right
        self.mean.lerp_(turned, 1 - SOAP_BETA)
        self.square.lerp_(turned.square(), 1 - SOAP_BETA)
        direction = self.mean / (self.square.sqrt() + EPSILON)
        self.parameter.sub_((left @ direction @ right.T).view(self.parameter.shape) * rate)


def renew_bases(mean: Tensor, square: Tensor, factors: tuple[Tensor, Tensor], bases: tuple[Tensor, Tensor]) -> None:
    """Find the eigenvectors of a matrix's factors anew, and what its moments are along them, all in place.

    Left as they are, these would be those of other directions: where a square was zero, a step would be endless.
    """
    turns = []
    for factor, basis in zip(factors, bases, strict=True):
        # In float64: where a channel has died, its values are denormal, and LAPACK may find NaN in float32.
        # Where training has diverged, any basis will do: `eigh` would raise.
        renewed = torch.linalg.eigh(factor.double().nan_to_num(0, 0, 0)).eigenvectors.to(basis.dtype)
        turns.append(renewed.T @ basis)
        basis.copy_(renewed)
    rows, columns = turns
    mean.copy_(rows @ mean @ columns.T)
    square.copy_(rows.square() @ square @ columns.square().T)  # of a sum of directions that vary each on its own


def learning_rates(recipe: Recipe, n_steps: int) -> list[float]:
    """The rate of every step of a training."""
    if recipe.schedule == "constant":
        return [recipe.learning_rate] * n_steps
    return one_cycle(recipe.learning_rate, n_steps, recipe.warmup_fraction)


def one_cycle(highest: float, n_steps: int, warmup_fraction: float) -> list[float]:
    """The rate of every step: along half a cosine up to the highest, and along another to almost nothing.

    As OneCycleLR with `n_steps` + 1 steps (L. N. Smith and N. Topin, Super-Convergence, 2018, arXiv 1708.07120).
    """
    lowest = highest / DIV_FACTOR
    last = lowest / FINAL_DIV_FACTOR
    top = max(warmup_fraction * (n_steps + 1), 2) - 1
    rise = [_cosine(lowest, highest, i / top) for i in range(math.floor(top) + 1)]
    fall = [_cosine(highest, last, (i - top) / (n_steps - top)) for i in range(len(rise), n_steps)]
    return [*rise, *fall][:n_steps]


def _cosine(start: float, end: float, way: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * way))


def make_optimizer(network: Network, recipe: Recipe) -> Optimizer:
    """The recipe's optimiser for the network's parameters."""
    if recipe.optimizer == "sgd":
        return Sgd(network.parameters(), recipe.weight_decay, recipe.momentum)
    return {"adamw": AdamW, "soap": Soap}[recipe.optimizer](network.parameters(), recipe.weight_decay)
