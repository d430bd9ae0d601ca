"""A training step captured as a CUDA graph: the host starts one thing where it would start some two hundred kernels."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3  # libraries allocate their workspaces, the optimizer its state

Step = Callable[[Tensor, float | Tensor], None]


class CapturedStep:
    """`step(positions, learning_rate)`, started by the host a few times, then captured, and replayed from then on.

    `step` must read and write tensors that stay where they are, draw from `generator` alone, and never wait for the
    GPU. Batches of another size than `batch_size`, the last of an epoch, are started by the host. If the step cannot be
    captured, it warns once and all are.
    """

    def __init__(self, step: Step, batch_size: int, generator: torch.Generator):
        self._step = step
        self._generator = generator
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=generator.device)
        self._learning_rate = torch.zeros((), device=generator.device)
        self._n_warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._can_capture = True

    def __call__(self, positions: Tensor, learning_rate: float) -> None:
        self._learning_rate.fill_(learning_rate)
        if len(positions) != len(self._positions) or not self._can_capture:
            self._step(positions, self._learning_rate)
        elif self._n_warm < WARM_UP_STEPS:
            self._n_warm += 1
            self._warm_up(positions)
        else:
            self._replay(positions)

    def _warm_up(self, positions: Tensor) -> None:
        """A step on a stream of its own, because a capture takes place on one too."""
        stream = torch.cuda.Stream(self._generator.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(positions, self._learning_rate)
        torch.cuda.current_stream().wait_stream(stream)

    def _replay(self, positions: Tensor) -> None:
        self._positions.copy_(positions)
        try:
            self._graph = self._graph or self._capture()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph, so each training step takes longer: {error}", stacklevel=2)
            self._can_capture = False
            self._step(positions, self._learning_rate)
        else:
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Nothing is computed yet: the kernels are only written down."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)  # so that every replay draws new numbers
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(self._positions, self._learning_rate)
        return graph
