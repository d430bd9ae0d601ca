"""One process for each core, which all do the same at the same time."""

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from networks import CASES
from ways import Package, Plain, Reference

TRAINERS = {"reference": Reference, "plain": Plain, "package": Package}
MATRIX_SIDE = 1024


class Crew:
    """Each way has a crew of its own: what one does to its processes must not help another."""

    def __init__(self, root: Path, cores: list[int | None]):
        context = multiprocessing.get_context("spawn")
        self.size = len(cores)
        self.connections, self.processes = [], []
        for core in cores:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, root, core), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def do(self, task: str, name: str | None = None) -> list:
        """What each process answers; `name` is that of a network."""
        for connection in self.connections:
            connection.send((task, name))
        return [connection.recv() for connection in self.connections]

    def dismiss(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.join(5)


def work(connection: Connection, root: Path, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    current = trainer = None
    while True:
        try:
            task, name = connection.recv()
        except EOFError:
            return
        if task in MACHINE_TASKS:
            connection.send(MACHINE_TASKS[task]())
            continue
        way = task if task in TRAINERS else "package"
        if (way, name) != current:
            trainer = None  # as in a worker, there is one network at a time
            current, trainer = (way, name), TRAINERS[way](root, CASES[name])
        connection.send(trainer.images_a_second() if task in TRAINERS else getattr(trainer, task)())


def matmul_gflops() -> float:
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * MATRIX_SIDE**3 / statistics.median(times) / 1e9


def memory() -> tuple[float, float]:
    """All that is resident, and what no other process shares (libraries and images are shared), in MB."""
    info = psutil.Process().memory_full_info()
    return info.rss / 1e6, info.uss / 1e6


def capability() -> dict[str, str | int]:
    """The instructions that PyTorch and numba really use here."""
    from nas_mnist.kernels.vectors import LANES

    return {"torch_capability": torch.backends.cpu.get_cpu_capability(), "kernel_vector_bits": 32 * LANES}


MACHINE_TASKS = {"peak": matmul_gflops, "memory": memory, "capability": capability}
