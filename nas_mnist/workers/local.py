"""Worker processes over devices: start them, listen to them, replace the ones that die.

A worker owns nothing that matters: what it has finished is in the study's storage. So stopping is killing, and whoever
comes next finds the trials of dead workers by their owner's process (see `study.recover`).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from nas_mnist.errors import DeviceError, NasMnistError, explain, is_final
from nas_mnist.workers import machine
from nas_mnist.workers.events import Completed, OnEvent, OnWorkerEvent, Progress, Worker, WorkerDied, WorkerFailed
from nas_mnist.workers.signals import blocked_for_children, stopped_once

Work = Callable[[Worker, OnEvent], None]
Context = SpawnContext | ForkServerContext

MAX_RESTARTS = 3  # of one worker, without progress in between
STOP_SECONDS = 5
WORKERS_PER_GPU = 8
MAX_WORKERS_PER_CORE = 4
PRELOADED = ["nas_mnist.stages.search"]  # and with it PyTorch, Optuna, numba: 3 s and 0.5 GB


@dataclass(frozen=True)
class Failure:
    """What a worker says before it ends because of an exception; `message` alone if the user caused it."""

    message: str
    final: bool
    settings: tuple[str, ...] = ()  # as those of the error


@dataclass
class _Process:
    worker: Worker
    process: BaseProcess
    connection: Connection
    restarts: int
    raised: bool  # the one before ended by an exception
    failure: Failure | None = None


def plan_workers(
    n_workers: int | None, devices: Sequence[str] | None, say: Callable[[str], None] = lambda line: None
) -> list[Worker]:
    """Workers spread over the devices in turn; by default all GPUs there are, else one worker for each CPU core.

    Where there is not memory for as many by default, there are fewer, and `say` is told so in one line. Raises
    `DeviceError` if a device is not there, or for more workers than can be of use.
    """
    devices = list(devices) if devices else _visible_devices()
    for device in devices:
        _check_device(device)
    n_cores = machine.n_cores()
    n_gpus = sum(device != "cpu" for device in devices)
    default = max(1, min(n_cores, n_gpus * WORKERS_PER_GPU)) if n_gpus else n_cores
    limit = max(MAX_WORKERS_PER_CORE * n_cores, n_gpus * WORKERS_PER_GPU)
    if n_workers is not None and not 1 <= n_workers <= limit:
        raise DeviceError(
            f"{n_workers} workers make no sense on {n_cores} cores and {n_gpus} GPUs: choose 1 to {limit}", "workers"
        )
    if n_workers is None:
        n_workers = _fitting_memory(default, say, on_gpu=n_gpus > 0)
    return [Worker(i, devices[i % len(devices)]) for i in range(n_workers)]


def _fitting_memory(n_workers: int, say: Callable[[str], None], *, on_gpu: bool) -> int:
    fitting = machine.n_workers_in_memory(on_gpu=on_gpu)
    if fitting < n_workers:
        say(
            f"{fitting} of {n_workers} workers: there are {machine.free_bytes() / 1e9:.1f} GB of memory for them, "
            f"and each takes {machine.worker_bytes(on_gpu=on_gpu) / 1e9:.1f}"
        )
    return min(fitting, n_workers)


def _visible_devices() -> list[str]:
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def _check_device(device: str) -> None:
    import torch

    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in there:
        raise DeviceError(
            f"device must be one of {', '.join(there)} on this machine, not {device!r}: name one of them", "devices"
        )


def run_workers(work: Work, workers: Sequence[Worker], on_event: OnWorkerEvent) -> None:
    """Run `work(worker, on_event)` in one process each until all have returned; `work` is picklable.

    What a worker hands to its own `on_event` reaches `on_event(worker, event)` here; `on_event(None, None)` is called a
    few times a second besides, for a display. A worker that dies is replaced. Ctrl-C or SIGTERM ends all workers at
    once and raises `KeyboardInterrupt`. Raises `WorkerFailed` if a worker dies again and again.
    """
    context = _context()
    running: list[_Process] = []
    with stopped_once():
        try:
            for worker in workers:
                _start(running, context, work, worker, 0, raised=False)
            while running:
                ready = wait([p.connection for p in running], timeout=0.2)
                for process in [p for p in running if p.connection in ready]:
                    if not _receive(process, on_event):
                        running.remove(process)
                        _replace(running, context, work, process, on_event)
                on_event(None, None)
        finally:
            _stop(running)


def _context() -> Context:
    """Workers are forked from a server that has imported what they need: they start at once, and share its memory.

    The server has neither threads nor a GPU. macOS forbids forks of a process that has loaded its frameworks.
    """
    if sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _receive(process: _Process, on_event: OnWorkerEvent) -> bool:
    """Handle one message; False when the process has closed its end."""
    try:
        event = process.connection.recv()
    except (EOFError, OSError):  # OSError: killed in the middle of a message
        return False
    if isinstance(event, Failure):
        process.failure = event
    else:
        process.restarts = 0 if is_forgiven(event, process.raised) else process.restarts
        on_event(process.worker, event)
    return True


def is_forgiven(event: Any, raised: bool) -> bool:
    """Whether earlier deaths of a worker count no longer: a kill when it gets on, an exception when it completes."""
    return isinstance(event, Completed if raised else Progress)


def _replace(running: list[_Process], context: Context, work: Work, process: _Process, on_event: OnWorkerEvent) -> None:
    process.process.join()
    process.connection.close()
    code, failure = process.process.exitcode, process.failure
    if code == 0:
        return
    if failure and failure.final:
        raise WorkerFailed(failure.message, *failure.settings)
    ended = f"exit code {code}" if code is None or code > 0 else f"killed by signal {-code}"
    reason = failure.message if failure else ended
    on_event(process.worker, WorkerDied(reason))
    if process.restarts >= MAX_RESTARTS:
        raise _hopeless(process.worker, reason)
    _start(running, context, work, process.worker, process.restarts + 1, raised=failure is not None)


def _hopeless(worker: Worker, reason: str) -> WorkerFailed:
    *_, last = reason.splitlines()
    error = WorkerFailed(f"worker {worker.index} died {MAX_RESTARTS + 1} times in a row: {last}")
    if reason != last:
        error.add_note(reason)
    return error


def _start(
    running: list[_Process], context: Context, work: Work, worker: Worker, restarts: int, *, raised: bool
) -> None:
    """Add it to those that run before a stop can come in between, which would leave it running."""
    receiving, sending = context.Pipe(duplex=False)
    arguments = (dict(os.environ), work, worker, sending)
    process = context.Process(target=_main, args=arguments, name=f"nas-mnist worker {worker.index}")
    with blocked_for_children():  # a stop may reach the whole group; the parent decides
        process.start()
        running.append(_Process(worker, process, receiving, restarts, raised))
        sending.close()  # so that the end of the worker is the end of the pipe


def _stop(running: list[_Process]) -> None:
    for process in running:
        process.process.terminate()
    for process in running:
        process.process.join(STOP_SECONDS)
        if process.process.is_alive():
            process.process.kill()
            process.process.join()
        process.connection.close()


def _main(environment: dict[str, str], work: Work, worker: Worker, connection: Connection) -> None:
    """A worker's life, in the environment that its parent has now; the server that it was forked from may be older."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _end_with_parent()
    try:
        if failure := attempt(work, worker, connection.send):
            with contextlib.suppress(Exception):  # there may be no memory even for that
                connection.send(failure)
            raise SystemExit(1)
    except BrokenPipeError:
        raise SystemExit(1) from None


def attempt(work: Work, worker: Worker, on_event: OnEvent) -> Failure | None:
    """Do the work in this process, and return what went wrong, if anything."""
    if worker.device == "cpu":
        import torch

        torch.set_num_threads(1)  # two processes of one thread beat one process of two
    try:
        work(worker, on_event)
    except BrokenPipeError:  # nobody listens any more
        raise
    except Exception as error:
        return _failure(error)
    return None


def _failure(error: Exception) -> Failure:
    if isinstance(error, NasMnistError):
        return Failure(str(error), final=True, settings=error.settings)
    explanation = explain(error)
    return Failure(explanation or traceback.format_exc().strip(), is_final(explanation))


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too, at once: nothing is left running."""

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
