"""How fast candidates train, against the way the reference systems do it: `make bench`.

The reference way: torchvision's data set, transforms on each image, a DataLoader in the training process, NCHW maps,
element-wise dropout. Both ways fill the machine with one process of one thread for each core, augment, and take turns.
Prints a table and writes `build/bench.json`; asserts nothing, because times depend on the machine and its neighbours.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import nas_mnist
from nas_mnist.data import datasets
from nas_mnist.data import images as data
from nas_mnist.data.unpacking import prepare
from nas_mnist.model.architecture import Architecture, Conv, MaxPool, parse
from nas_mnist.model.network import build
from nas_mnist.training.augmentation import Augmentation, augment
from nas_mnist.training.loop import train
from nas_mnist.training.optimizers import make_optimizer
from nas_mnist.training.recipe import Recipe

NORMALISATION = datasets.MNIST.normalisation

NETWORKS = {
    "step-by-step": "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05",
    "era1a7": "c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G | act-norm",
    "small": "c4 c8 M c8k1 c8 c10 G c10k1- | dropout=0.05",
}
WAYS = ("reference", "package")
BATCH_SIZE = 128
REFERENCE_STEPS, PACKAGE_STEPS, SHARE_STEPS = 20, 80, 40  # of one turn: some two seconds each
MATRIX_SIDE = 1024


def main() -> None:
    arguments = parse_arguments()
    root = Path(tempfile.mkdtemp(prefix="nas-mnist-bench-"))
    try:
        prepare(root)
        shutil.copytree(Path(nas_mnist.__file__).parent / "data" / "mnist", root / "MNIST" / "raw")
        import torchvision.datasets  # not at the top: the package's workers, whose memory is measured, do without

        torchvision.datasets.MNIST(root, download=True)  # unpacks what lies there
        result = measure(root, arguments.repeats)
    finally:
        shutil.rmtree(root)
    show(result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2))
    print(f"written to {arguments.output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    return parser.parse_args()


def measure(root: Path, repeats: int) -> dict:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * os.cpu_count()
    crews = {way: Crew(root, cores) for way in WAYS}
    try:
        result = machine(len(cores)) | {"repeats": repeats, "batch_size": BATCH_SIZE}
        peaks = [sum(crews["package"].do("peak", None)) for _ in range(repeats)]
        result["matmul_gflops"] = spread(peaks)
        result["networks"] = {
            name: measure_network(crews, name, repeats, statistics.median(peaks)) for name in NETWORKS
        }
        memory = crews["package"].do("memory", None)
        result["resident_mb_a_worker"], result["own_mb_a_worker"] = (max(mb) for mb in zip(*memory, strict=True))
    finally:
        for crew in crews.values():
            crew.dismiss()
    return result


def measure_network(crews: dict[str, "Crew"], name: str, repeats: int, peak_gflops: float) -> dict:
    images_a_second = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way in WAYS if repeat % 2 else WAYS[::-1]:
            rate = sum(crews[way].do(way, name))
            if repeat > 0:  # the first turn warms up
                images_a_second[way].append(rate)
    architecture = parse(NETWORKS[name])
    gflop_an_image = architecture.n_macs * 3 * 2 / 1e9  # forward, and backward for the input and for the weights
    floor = peak_gflops / gflop_an_image  # images a second
    return {
        "architecture": str(architecture),
        "n_parameters": architecture.n_parameters,
        "images_a_second": {way: spread(rates) for way, rates in images_a_second.items()},
        "ms_a_step": {
            way: BATCH_SIZE * crew.size / statistics.median(images_a_second[way]) * 1e3 for way, crew in crews.items()
        },
        "speedup": statistics.median(p / r for r, p in zip(*images_a_second.values(), strict=True)),
        "floor_ratio": floor / statistics.median(images_a_second["package"]),
        "shares": {way: crew.do(f"{way} shares", name)[0] for way, crew in crews.items()},
    }


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine(n_cores: int) -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {name: version(name) for name in ("torch", "torchvision", "numba", "numpy")}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "capability": capability, "n_cores": n_cores, "python": platform.python_version()} | versions


class Crew:
    """One process for each core; all do the same at the same time.

    Each way has a crew of its own: what one does to its process (`keep_memory`) must not help the other.
    """

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

    def do(self, task: str, name: str | None) -> list:
        for connection in self.connections:
            connection.send((task, name))
        return [connection.recv() for connection in self.connections]

    def dismiss(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.join(5)


def work(connection, root: Path, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    trainers = {}
    while True:
        try:
            task, name = connection.recv()
        except EOFError:
            return
        way, *shares = task.split()
        if way == "peak":
            connection.send(matmul_gflops())
        elif way == "memory":  # all that is resident, and what no other process shares: libraries, images
            memory = psutil.Process().memory_full_info()
            connection.send((memory.rss / 1e6, memory.uss / 1e6))
        else:
            if (way, name) not in trainers:
                trainers[way, name] = (Reference if way == "reference" else Package)(root, parse(NETWORKS[name]))
            trainer = trainers[way, name]
            connection.send(trainer.shares() if shares else trainer.images_a_second())


def matmul_gflops() -> float:
    a, b = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * MATRIX_SIDE**3 / statistics.median(times) / 1e9


class Clock:
    """Seconds spent in each stage of a step, in turn."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + now - self.last
        self.last = now

    def shares(self) -> dict:
        return {stage: seconds / sum(self.seconds.values()) for stage, seconds in self.seconds.items()}


class Reference:
    def __init__(self, root: Path, architecture: Architecture):
        from torch.utils.data import DataLoader
        from torchvision import transforms
        from torchvision.datasets import MNIST

        ranges = Augmentation()
        transform = transforms.Compose(
            [
                transforms.RandomAffine(
                    ranges.rotation_degrees,
                    translate=(ranges.translation, ranges.translation),
                    scale=(1 - ranges.scale, 1 + ranges.scale),
                    shear=ranges.shear_degrees,
                ),
                transforms.ToTensor(),
                transforms.Normalize((NORMALISATION.mean,), (NORMALISATION.std,)),
            ]
        )
        self.loader = DataLoader(MNIST(root, transform=transform), batch_size=BATCH_SIZE, shuffle=True)
        self.network = reference_network(architecture)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.9)

    def images_a_second(self) -> float:
        batches = iter(self.loader)
        start = time.perf_counter()
        self.step(batches, REFERENCE_STEPS)
        return REFERENCE_STEPS * BATCH_SIZE / (time.perf_counter() - start)

    def shares(self) -> dict:
        return self.step(iter(self.loader), SHARE_STEPS)

    def step(self, batches, n_steps: int) -> dict:
        clock = Clock()
        for _ in range(n_steps):
            x, labels = next(batches)
            clock.lap("data and augmentation")
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.network(x).flatten(1), labels)
            clock.lap("forward")
            loss.backward()
            clock.lap("backward")
            self.optimizer.step()
            clock.lap("optimizer")
        return clock.shares()


def reference_network(architecture: Architecture) -> nn.Sequential:
    """The same layers from PyTorch's own modules, as a tutorial writes them."""

    def follow(layer: Conv, channels: int, rate: float) -> list[nn.Module]:
        if not layer.activation:
            return []
        modules = [nn.BatchNorm2d(channels)] * layer.norm + [nn.ReLU()]
        return (modules if architecture.norm_first else modules[::-1]) + [nn.Dropout(rate)] * (rate > 0)

    modules = []
    for layer, shape in zip(architecture.layers, architecture.shapes, strict=True):
        if not isinstance(layer, Conv):
            modules.append(nn.MaxPool2d(2) if isinstance(layer, MaxPool) else nn.AdaptiveAvgPool2d(1))
            continue
        c, size = shape.in_channels, (layer.kernel, layer.stride, layer.padding)
        if layer.separable:
            modules += [nn.Conv2d(c, c, *size, groups=c, bias=False), *follow(layer, c, 0.0)]
            size = (1,)
        modules += [nn.Conv2d(c, layer.channels, *size, bias=layer.bias)]
        modules += follow(layer, layer.channels, architecture.dropout)
    return nn.Sequential(*modules)


class Package:
    def __init__(self, root: Path, architecture: Architecture):
        images = data.load_train(root)
        self.images = images.part(torch.arange(PACKAGE_STEPS * BATCH_SIZE))
        self.recipe = Recipe(epochs=1000, batch_size=BATCH_SIZE)
        self.network = build(architecture, seed=0)
        self.epochs = train(self.network, self.recipe, self.images, images.part(torch.arange(BATCH_SIZE)), seed=0)

    def images_a_second(self) -> float:
        return len(self.images) / next(self.epochs).train_seconds

    def shares(self) -> dict:
        generator = torch.Generator().manual_seed(0)
        optimizer = make_optimizer(self.network.train(), self.recipe)
        batches = self.images.shuffled(BATCH_SIZE, generator)
        clock = Clock()
        for _ in range(SHARE_STEPS):
            pixels, labels = self.images.select(next(batches))
            clock.lap("data")
            x = augment(pixels, self.recipe.augmentation, NORMALISATION, generator)
            clock.lap("augmentation")
            loss = F.cross_entropy(self.network(x), labels)
            clock.lap("forward")
            optimizer.zero_grad()
            loss.backward()
            clock.lap("backward")
            optimizer.prepare()
            optimizer.step(self.recipe.learning_rate)
            clock.lap("optimizer")
        return clock.shares()


def show(result: dict) -> None:
    peak = result["matmul_gflops"]["median"]
    title = f"{result['cpu']}, {result['n_cores']} cores, {peak:.0f} GFLOP/s in a matrix product"
    table = Table("", "way", "images/s", "ms/step", "speedup", "× floor", "shares of a step", title=title)
    for name, network in result["networks"].items():
        for way, rates in network["images_a_second"].items():
            ours = way == "package"
            table.add_row(
                "" if ours else f"{name}\n{network['n_parameters']:,} parameters",
                way,
                f"{rates['median']:,.0f}\n({rates['min']:,.0f} – {rates['max']:,.0f})",
                f"{network['ms_a_step'][way]:.1f}",
                f"{network['speedup']:.1f}" if ours else "",
                f"{network['floor_ratio']:.1f}" if ours else "",
                ", ".join(f"{stage} {share:.0%}" for stage, share in network["shares"][way].items()),
                end_section=ours,
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
