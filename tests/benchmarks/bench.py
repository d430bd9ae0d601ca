"""How fast candidates train, against the reference systems' way and against PyTorch done well: `make bench`.

Every way fills the machine with one process of one thread for each core, augments, and the three take turns. Prints
tables and writes `build/bench.json`; asserts nothing, because times depend on the machine and its neighbours.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

from crews import Crew
from networks import CASES, Case

import nas_mnist
from nas_mnist.data.unpacking import prepare
from nas_mnist.workers.machine import processor

WAYS = ("reference", "plain", "package")
FORWARD_AND_BACKWARD = 3  # a multiply-add of the forward pass is one more for each of the two gradients


def main() -> None:
    arguments = parse_arguments()
    if arguments.avx2:
        os.environ |= without_avx512()  # what the crews are started with
    root = Path(tempfile.mkdtemp(prefix="nas-mnist-bench-"))
    try:
        prepare(root)
        shutil.copytree(Path(nas_mnist.__file__).parent / "data" / "mnist", root / "MNIST" / "raw")
        import torchvision.datasets  # not at the top: the crews, whose memory is measured, import this module

        torchvision.datasets.MNIST(root, download=True)  # unpacks what lies there
        result = measure(root, arguments.repeats)
    finally:
        shutil.rmtree(root)
    import tables

    tables.show(result)
    if arguments.baseline:
        tables.compare(json.loads(arguments.baseline.read_text()), result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2))
    print(f"written to {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way with each network (%(default)s)")
    parser.add_argument("--avx2", action="store_true", help="as on a processor without AVX-512")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="also compare with what an earlier run wrote")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"), metavar="FILE")
    return parser.parse_args()


def without_avx512() -> dict[str, str]:
    """Environment in which numba, PyTorch's own kernels, oneDNN and MKL use AVX2; whether they do, `machine` tells."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    for name in features:
        if name.startswith("avx512"):
            features[name] = False
    return {
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": features.flatten(),
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }


def measure(root: Path, repeats: int) -> dict:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * os.cpu_count()
    crews = {way: Crew(root, cores) for way in WAYS}
    try:
        result = machine() | crews["package"].do("capability")[0] | {"n_cores": len(cores), "repeats": repeats}
        result["networks"] = {name: measure_network(crews, name, case, repeats) for name, case in CASES.items()}
        peaks = [network["matmul_gflops"]["median"] for network in result["networks"].values()]
        result["matmul_gflops"] = spread(peaks)  # of all cores together
        for kind in ("resident_mb_a_worker", "own_mb_a_worker"):
            result[kind] = max(network[kind] for network in result["networks"].values())
    finally:
        for crew in crews.values():
            crew.dismiss()
    return result


def machine() -> dict:
    versions = {name: version(name) for name in ("torch", "torchvision", "numba", "numpy")}
    return {"cpu": processor(), "python": platform.python_version()} | versions


def measure_network(crews: dict[str, Crew], name: str, case: Case, repeats: int) -> dict:
    peaks, rates = take_turns(crews, name, repeats)
    floor = [peak * 1e9 / (2 * FORWARD_AND_BACKWARD * case.architecture.n_macs) for peak in peaks]  # images a second
    shares = crews["package"].do("shares", name)
    trials = crews["package"].do("trial", name)
    resident, own = (max(mb) for mb in zip(*crews["package"].do("memory"), strict=True))
    return {
        "architecture": str(case.architecture),
        "n_parameters": case.architecture.n_parameters,
        "optimizer": case.optimizer,
        "batch_size": case.batch_size,
        "matmul_gflops": spread(peaks),
        "images_a_second": {way: spread(values) for way, values in rates.items()},
        "ms_a_step": {
            way: case.batch_size * crew.size / statistics.median(rates[way]) * 1e3 for way, crew in crews.items()
        },
        "speedup": median_ratio(rates["package"], rates["reference"]),
        "speedup_over_plain": median_ratio(rates["package"], rates["plain"]),
        "floor_ratio": median_ratio(floor, rates["package"]),
        "shares": {kind: statistics.mean(share[kind] for share in shares) for kind in shares[0]},
        "trials_an_hour": sum(3600 / trial["seconds"] for trial in trials),
        "resident_mb_a_worker": resident,
        "own_mb_a_worker": own,
        "optimizer_share": statistics.mean(share["optimizer"] for share in shares),
        "evaluation_share": statistics.mean(trial["evaluation_share"] for trial in trials),
    }


def take_turns(crews: dict[str, Crew], name: str, repeats: int) -> tuple[list[float], dict[str, list[float]]]:
    """Of each turn, the GFLOP/s of a matrix product and each way's images a second, of all cores together."""
    peaks, rates = [], {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        peak = sum(crews["package"].do("peak"))
        own = {way: sum(crews[way].do(way, name)) for way in (WAYS if repeat % 2 else WAYS[::-1])}
        if repeat > 0:  # the first turn warms up
            peaks.append(peak)
            for way, rate in own.items():
                rates[way].append(rate)
    return peaks, rates


def median_ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
