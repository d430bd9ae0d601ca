"""The tables of `doctor`."""

from collections.abc import Iterator
from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.table import Table

from nas_mnist.training.self_check import TOLERANCE
from nas_mnist.workers.doctor import Checked, Machine

GB = 1e9


def machine_table(machine: Machine) -> Table:
    """What this machine is to us: a line each."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(machine):
        table.add_row(name, value)
    return table


def _lines(machine: Machine) -> Iterator[tuple[str, str]]:
    caches = ", ".join(f"{level} {size}" for level, size in machine.caches.items())
    yield "processor", machine.processor + (f"; caches of a core: {caches}" if caches else "")
    yield "cores", f"{machine.cores} for workers" + _of(machine.cores, machine.cores_there)
    yield "vectors", f"{machine.kernel_vector_bits} bits in our kernels; PyTorch uses {machine.torch_capability}"
    limit = f", of which a container is given {machine.memory_limit / GB:.1f}" if machine.memory_limit else ""
    yield (
        "memory",
        f"{machine.memory_bytes / GB:.1f} GB{limit}; {machine.free_bytes / GB:.1f} free: "
        f"enough for {machine.workers_in_memory} workers",
    )
    gpus = [f"{g.device} {g.name}, {g.memory_bytes / GB:.0f} GB, driver {g.driver}" for g in machine.gpus]
    yield "GPUs", "\n".join(gpus) or "none that PyTorch can use: networks train on the CPU"
    yield "versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    yield "extras", ", ".join(f"{name}{'' if there else ' (not installed)'}" for name, there in machine.extras.items())
    unpacked = [name for name, there in machine.datasets.items() if there]
    yield "data", f"{machine.data_dir}: {', '.join(unpacked) or 'nothing'} unpacked"
    state = "compiled" if machine.is_compiled else "will be compiled when first used, in up to a minute"
    yield "kernels", f"{state}; cache: {machine.kernel_cache}"


def _of(some: int, there: int) -> str:
    return f", of {there} that the machine has" if some != there else ""


def check_table(checks: list[Checked]) -> Table:
    """Fast steps against plain ones, a line for each network and device."""
    title = "the fast training steps against plain PyTorch's: 20 steps of 64 images from the same seed"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("device", "optimizer", "network"):
        table.add_column(name, header_style="dim", overflow="fold")
    for name in ("largest difference", "speed-up", ""):
        table.add_column(name, header_style="dim", justify="right", no_wrap=True)
    for checked in checks:
        for comparison in checked.comparisons:
            table.add_row(
                checked.device,
                comparison.optimizer,
                comparison.line,
                f"{comparison.difference:.1e}",
                f"{comparison.speedup:.1f}×",
                "[green]same" if comparison.agrees else "[red]DIFFERS",
            )
    return table


def verdict_line(checks: list[Checked]) -> str:
    """What follows from the comparisons."""
    wrong = [checked.device for checked in checks if not checked.agrees]
    if not wrong:
        return f"the fast steps are right here: losses within {TOLERANCE:.0e} of plain PyTorch's, relative"
    names = ", ".join(wrong)
    advice = "do not train there, and please report it" if "cpu" in wrong else "training there takes plain steps"
    return f"the fast steps are wrong on {names}: losses differ by more than {TOLERANCE:.0e}, relative: {advice}"


def values(machine: Machine, checks: list[Checked]) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "machine": asdict(machine),
        "tolerance": TOLERANCE,
        "checks": [
            {
                "device": checked.device,
                **asdict(comparison),
                "difference": comparison.difference if isfinite(comparison.difference) else None,
                "agrees": comparison.agrees,
            }
            for checked in checks
            for comparison in checked.comparisons
        ],
    }
