"""A network's training, evaluation and recalibration on a CPU as one compiled program each."""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from nas_mnist.data.images import Images
from nas_mnist.kernels.compilation import compiling
from nas_mnist.kernels.instructions import Mode
from nas_mnist.kernels.interpreter import Results, Settings, run
from nas_mnist.model.network import Network
from nas_mnist.training.plan import plan
from nas_mnist.training.recipe import Recipe

LARGE_PAGE = 2**21  # bytes
NORM_EPS, NORM_MOMENTUM = 1e-5, 0.1  # nn.BatchNorm2d's


def can_compile(network: Network) -> bool:
    """The one place where the fast path is chosen: on a CPU, in float32."""
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in network.parameters())


class Program:
    """A network's program for batches of one size, and the arena its numbers are in.

    The network's parameters and running statistics are copied in before a run, and those that it changed back after.
    """

    def __init__(self, network: Network, mode: Mode, batch_size: int, recipe: Recipe | None = None):
        self._network, self._mode = network, mode
        self.plan = plan(network.architecture, batch_size, mode, recipe.optimizer if recipe else None)
        self._arena = _aligned_zeros(self.plan.size)
        for factors in self.plan.factors:
            for basis in (factors.rows.of(self._arena)[1], factors.columns.of(self._arena)[1]):
                np.fill_diagonal(basis, 1)
        self._settings = _settings(self.plan, network, mode, batch_size, recipe or Recipe())
        self.n_steps = 0

    def run(
        self,
        images: Images,
        positions: Tensor,
        rates: Sequence[float],
        *,
        matrices: Tensor | None = None,
        seed: int = 0,
    ) -> Results:
        """A step for each of the rates, on the images at these positions, a batch a step; the last may be smaller.

        `matrices` (positions, 2, 3) transform the images. Dropout draws from the `seed` and the number of the step.
        """
        mean, std = images.normalisation.mean, images.normalisation.std
        settings = self._settings._replace(gain=1 / (255 * std), offset=mean / std)
        results = Results(np.zeros(len(rates)), np.zeros(len(rates), np.int64))
        chosen = images.indices[positions].numpy()
        transforms = np.zeros((0, 2, 3), np.float32) if matrices is None else matrices.numpy()
        self._copy(to_network=False)
        if not run.signatures:
            with compiling(run):
                self._call(images, settings, chosen[:0], transforms[:0], [], seed, results)
        self._call(images, settings, chosen, transforms, rates, seed, results)
        self.n_steps += len(rates)
        if self._mode != Mode.EVALUATE:
            self._copy(to_network=True)
            for name, buffer in self._network.named_buffers():
                if name.endswith("num_batches_tracked"):
                    buffer += len(rates)
        return results

    def _call(self, images, settings, chosen, transforms, rates, seed, results) -> None:
        pixels, labels = images.pixels.numpy(), images.labels.numpy()
        tables = self.plan.table, self.plan.activations
        rates = np.array(rates, np.float64)
        run(*tables, self._arena, pixels, labels, chosen, transforms, rates, settings, seed, self.n_steps, results)

    @torch.no_grad()
    def _copy(self, *, to_network: bool) -> None:
        tensors = self._network.state_dict(keep_vars=True)
        for name, place in self.plan.places.items():
            ours = torch.from_numpy(place.of(self._arena))
            target, source = (tensors[name], ours) if to_network else (ours, tensors[name])
            target.copy_(source)

    def array(self, name: str, *, gradient: bool = False) -> np.ndarray:
        """A parameter or a running statistic by its name in the network, or a parameter's gradient of the last step."""
        place = self.plan.places[name]
        return place.of(self._arena[self.plan.gradients if gradient else 0 :])


def _aligned_zeros(size: int) -> np.ndarray:
    """Of large pages where there are any: the maps of a step are many megabytes, and each page has to be looked up."""
    memory = mmap.mmap(-1, 4 * size + LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # where the kernel has none
            memory.madvise(mmap.MADV_HUGEPAGE)
    numbers = np.frombuffer(memory, np.float32)
    start = -numbers.ctypes.data // 4 % (LARGE_PAGE // 4)
    return numbers[start : start + size]


def _settings(plan, network: Network, mode: Mode, batch_size: int, recipe: Recipe) -> Settings:
    return Settings(
        mode=int(mode),
        batch_size=batch_size,
        n_padded=plan.n_padded,
        valid=plan.valid,
        gradients=plan.gradients,
        planes=plan.planes,
        gain=1.0,
        offset=0.0,
        eps=NORM_EPS,
        norm_momentum=NORM_MOMENTUM,
        dropout=float(network.architecture.dropout),
        smoothing=float(recipe.label_smoothing if mode == Mode.TRAIN else 0),
        weight_decay=float(recipe.weight_decay),
        momentum=float(recipe.momentum),
    )
