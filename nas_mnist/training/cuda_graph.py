"""A training step captured as a CUDA graph: the host starts one thing where it would start some two hundred kernels."""

import gc
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3  # libraries allocate their workspaces, the optimizer its state

Step = Callable[[Tensor, float | Tensor], None]


class CapturedStep:
    """`step(positions, learning_rate)`, started by the host a few times, then captured, and replayed from then on.

    Each call takes the next of the `learning_rates`; that too is done by the GPU. The step is the same in every call.
    It must read and write tensors that stay where they are, draw from `generator` alone, and never wait for the GPU.
    Batches of another size than `batch_size`, the last of an epoch, are started by the host. If the step cannot be
    captured, it warns once and all are.
    """

    def __init__(self, batch_size: int, generator: torch.Generator, learning_rates: list[float]):
        device = generator.device
        self._generator = generator
        self._positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._learning_rates = torch.tensor(learning_rates, device=device)
        self._learning_rate = torch.zeros((), device=device)
        self._n_steps = torch.zeros(1, dtype=torch.int64, device=device)  # so far
        self._stream: torch.cuda.Stream | None = None  # one for the warm-up and the capture: each has its workspaces
        self._n_warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._can_capture = True

    # The step is no attribute: it holds this object, and a cycle would keep the graphs of earlier trials in memory.
    def __call__(self, step: Step, positions: Tensor) -> None:
        whole = len(positions) == len(self._positions)
        if whole and self._n_warm < WARM_UP_STEPS:
            self._n_warm += 1
            self._warm_up(step, positions)
        elif whole and self._is_captured(step):
            self._positions.copy_(positions)
            self._graph.replay()
        else:
            self._run(step, positions)

    def _run(self, step: Step, positions: Tensor) -> None:
        """The step with the next rate. Started or captured; it does not wait for the GPU."""
        self._learning_rate.copy_(self._learning_rates.index_select(0, self._n_steps)[0])
        self._n_steps += 1
        step(positions, self._learning_rate)

    def _warm_up(self, step: Step, positions: Tensor) -> None:
        """A step on a stream of its own, because a capture takes place on one too."""
        with torch.cuda.device(self._generator.device):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run(step, positions)
            torch.cuda.current_stream().wait_stream(self._stream)

    def _is_captured(self, step: Step) -> bool:
        if self._graph is None and self._can_capture:
            try:
                self._graph = self._capture(step)
            except RuntimeError as error:
                self._can_capture = False
                warnings.warn(f"no CUDA graph, so each training step takes longer: {error}", stacklevel=3)
        return self._graph is not None

    def _capture(self, step: Step) -> torch.cuda.CUDAGraph:
        """Nothing is computed yet: the kernels are only written down."""
        gc.collect()  # the end of another graph in the middle of a capture would break it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._generator.device):
            stream, state = torch.cuda.current_stream(), self._generator.clone_state()
            if torch.__version__ < (2, 14):  # since then a graph knows every generator itself
                graph.register_generator_state(self._generator)  # so that each replay draws new numbers
            try:
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._run(step, self._positions)
            except RuntimeError:  # older PyTorch leaves both as they were during the capture
                torch.cuda.set_stream(stream)
                self._generator.graphsafe_set_state(state)
                raise
        return graph
