"""Workers on a Ray cluster, with the signatures of `workers`: Ray finds the node, and another one if that dies.

Each worker is a Ray task with a core and its share of a GPU. Ray starts it again when its process or its node dies;
what it sends comes through a queue on the driver's node. Importing this module needs Ray.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nas_mnist.errors import DeviceError, StudyError
from nas_mnist.study.storage import Storage
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker, WorkerDied, WorkerFailed
from nas_mnist.workers.local import MAX_RESTARTS, STOP_SECONDS, WORKERS_PER_GPU, Failure, attempt, is_forgiven
from nas_mnist.workers.signals import stopped_once

CONNECT_SECONDS = 10


@dataclass(frozen=True)
class _Started:
    """A worker's task begins, for the first time or again."""


@dataclass
class _Task:
    worker: Worker
    reference: ray.ObjectRef
    restarts: int  # without progress in between
    raised: bool = False  # the one before ended by an exception
    started: bool = False


@contextlib.contextmanager
def connected(address: str, storage: Storage) -> Iterator[None]:
    """Be a driver of the cluster at this address; `auto` is the one this machine belongs to.

    Raises `StudyError` for a storage that is a file, and `DeviceError` if there is no such cluster.
    """
    if storage.path:
        raise StudyError(
            f"workers on a Ray cluster need a storage that every node reaches, and {storage} is a file here: "
            "give one such as postgresql+psycopg://…, or leave Ray out, which adds nothing on one machine",
            "storage",
            "ray",
        )
    try:
        if address != "auto":
            _knock(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DeviceError(
            f"there must be a Ray cluster at {address!r}; {reason}: start one with `ray start --head`, or name another",
            "ray",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself would try for minutes, and say so line by line. Raises `OSError` or `ValueError`."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def plan_workers(n_workers: int | None) -> list[Worker]:
    """Several workers for each GPU of the cluster; one for each CPU core if there is none.

    Raises `DeviceError` for more workers than the cluster has room for.
    """
    resources = ray.cluster_resources()
    n_cores, n_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    room = min(n_cores, n_gpus * WORKERS_PER_GPU) if n_gpus else n_cores
    if not 1 <= (n_workers or room) <= room:
        raise DeviceError(
            f"the Ray cluster has room for {room} workers ({n_cores} cores, {n_gpus} GPUs), not {n_workers or 1}: "
            "ask for as many or fewer",
            "workers",
        )
    device = "cuda:0" if n_gpus else "cpu"  # Ray shows a task its own GPU alone
    return [Worker(index, device) for index in range(n_workers or room)]


def run_workers(work: Callable[[Worker, OnEvent], None], workers: Sequence[Worker], on_event: OnWorkerEvent) -> None:
    """As `workers.run_workers`, on the cluster that this process is connected to.

    A worker that is stopped gives its trial back itself; a node that dies leaves it to the heartbeat.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    tasks: list[_Task] = []
    with stopped_once():
        try:
            for worker in workers:  # one by one, so that a stop in between finds those that run
                tasks.append(_start(work, worker, queue, 0))
            while tasks:
                ended, _ = ray.wait([task.reference for task in tasks], timeout=0.2)
                by_index = {task.worker.index: task for task in tasks}
                for index, event in queue.get_nowait_batch(queue.qsize()):
                    if index in by_index:  # else of a node that was cut off, and is replaced and done already
                        _receive(by_index[index], event, on_event)
                for task in [task for task in tasks if task.reference in ended]:
                    tasks.remove(task)
                    tasks += _replace(work, task, queue, on_event)
                on_event(None, None)
        finally:
            _stop(tasks)
            queue.shutdown(force=True)


def _start(work, worker: Worker, queue: Queue, restarts: int, *, raised: bool = False) -> _Task:
    reference = _run.options(
        num_cpus=1,
        num_gpus=0 if worker.device == "cpu" else 1 / WORKERS_PER_GPU,
        max_retries=-1,  # `_receive` counts
        name=f"nas-mnist worker {worker.index}",
    ).remote(work, worker, queue)
    return _Task(worker, reference, restarts, raised)


@ray.remote(max_calls=1)  # the owner of a trial is a process, which must end with its worker
def _run(work, worker: Worker, queue: Queue) -> Failure | None:
    queue.put((worker.index, _Started()))
    return attempt(work, worker, lambda event: queue.put((worker.index, event)))


def _receive(task: _Task, event: Any, on_event: OnWorkerEvent) -> None:
    if not isinstance(event, _Started):
        task.restarts = 0 if is_forgiven(event, task.raised) else task.restarts
        on_event(task.worker, event)
    elif task.started:
        _count_death(task, "its process or its node is gone", on_event)
    else:
        task.started = True


def _count_death(task: _Task, reason: str, on_event: OnWorkerEvent) -> None:
    on_event(task.worker, WorkerDied(reason))
    task.restarts += 1
    if task.restarts > MAX_RESTARTS:
        raise WorkerFailed(f"worker {task.worker.index} died {task.restarts} times in a row: {reason}")


def _replace(work, task: _Task, queue: Queue, on_event: OnWorkerEvent) -> list[_Task]:
    """Ray starts again what died, but not what ended by an exception."""
    try:
        failure = ray.get(task.reference)
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise WorkerFailed(
            f"worker {task.worker.index} cannot run on this Ray cluster; {reason}: install the same nas-mnist "
            "and the same Python on every node"
        ) from error
    if failure is None:
        return []
    if failure.final:
        raise WorkerFailed(failure.message, *failure.settings)
    _count_death(task, failure.message, on_event)
    return [_start(work, task.worker, queue, task.restarts, raised=True)]


def _stop(tasks: list[_Task]) -> None:
    """Interrupt them, so that they give back their trials; then end by force what did not hear."""
    references = [task.reference for task in tasks]
    for force in (False, True):
        for reference in references:
            ray.cancel(reference, force=force)
        _, references = (
            ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS) if references else ([], [])
        )
