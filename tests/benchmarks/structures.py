"""What a wider space would buy: networks and ways to train them that the notation cannot say, in paired runs on folds.

    python tests/benchmarks/structures.py plan VARIANT … [--size 2000] [--epochs 15] [--pairs 6]
    python tests/benchmarks/structures.py train [VARIANT …] [--workers 2]
    python tests/benchmarks/structures.py tables

Every variant (`variants.py`) has as many parameters as its base: all widths are scaled by one factor until the budget
is used. A pair is a fold and a seed; both sides are trained by the same code. `studies/structures/plan.jsonl` says what
is trained, one run a line; `runs.jsonl` what came of it. Both are only ever added to, so that `train` can be cut and
continued.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chwn import Norm, Soap, select
from jobs import append, jobs_of, read, run_all, work_off
from scipy.stats import ttest_1samp
from torch import Tensor, nn
from torch.nn import functional as F
from variants import BASES, WAYS, Net, Variant, filled, initialise, make, n_parameters

from nas_mnist.data.folds import CONFIRM_PARTITION, N_FOLDS, Split, fold
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.study.space import reference_recipe
from nas_mnist.training.augmentation import draw_matrices
from nas_mnist.training.optimizers import one_cycle
from nas_mnist.training.recipe import Recipe
from nas_mnist.views.tables import markdown_table

FOLDER = Path(__file__).parents[2] / "studies" / "structures"
TEACHERS = Path(__file__).parents[2] / "build" / "teachers"
EVALUATION_BATCH, N_RECALIBRATION_IMAGES = 64, 5000
RATE = 0.0116  # what the winner below 2,000 parameters was trained with, about
# Otherwise glibc gives every large map back to the system, and each step waits for the pages of all.
MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def batch_sizes(variant: Variant, recipe: Recipe, n_images: int) -> list[int]:
    """The size of every batch of the whole training."""
    total = recipe.epochs * n_images
    if variant.batches == "64":
        return [64] * (recipe.epochs * (n_images // 64))
    sizes, seen = [], 0
    while seen + 128 <= total:
        size = (32, 64, 128)[min(2, int(3 * seen / total))]
        sizes.append(size)
        seen += size
    return sizes


def rates_of(variant: Variant, recipe: Recipe, n_steps: int) -> list[float]:
    rates = one_cycle(recipe.learning_rate, n_steps, variant.warmup)
    if variant.tail == "linear":
        top = max(range(n_steps), key=rates.__getitem__)
        rates = [r if i <= top else recipe.learning_rate * (n_steps - i) / (n_steps - top) for i, r in enumerate(rates)]
    return rates


def positions_of(sizes: list[int], n_images: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of these sizes, every image once before any comes again (but for what the last whole batch leaves)."""
    left = torch.empty(0, dtype=torch.int64)
    for size in sizes:
        if len(left) < size:
            left = torch.randperm(n_images, generator=generator)
        yield left[:size]
        left = left[size:]


def softened(logits: Tensor, teacher: Net, x: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of both at a higher temperature (Hinton et al., 2015), its gradient of the usual size."""
    with torch.no_grad():
        wanted = (teacher(x) / temperature).softmax(1)
    return F.cross_entropy(logits / temperature, wanted) * temperature**2


def teacher_of(job: "Job", split: Split) -> Net:
    """A network of four times the budget, trained on the same images, once for all that it teaches."""
    variant = filled(make("hardswish", max(BASES)), 4 * job.size)
    path = TEACHERS / f"{job.size}-{job.epochs}-{job.pair}.pt"
    net = Net(variant)
    if not path.exists():
        recipe = replace(reference_recipe(epochs=job.epochs), learning_rate=RATE)
        net, result = train(variant, recipe, split, 200 + job.pair)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
        print(f"teacher {path.stem}", result, flush=True)
    net.load_state_dict(torch.load(path))
    return net.eval()


def train(
    variant: Variant, recipe: Recipe, split: Split, seed: int, teacher: Net | None = None
) -> tuple[Net, dict[str, float]]:
    """Train one network; it, its losses and accuracy at the end, recalibrated."""
    net = Net(variant)
    initialise(net, seed)
    net.train()
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    rates_of_own = {id(norm.bias): variant.bias_rate for norm in norms}
    decays = {} if variant.decay_all else {id(p): 0.0 for norm in norms for p in norm.parameters()}
    optimizer = Soap(net.parameters(), recipe.weight_decay, rates_of_own, decays)
    generator = torch.Generator().manual_seed(seed)
    sizes = batch_sizes(variant, recipe, len(split.train))
    rates = rates_of(variant, recipe, len(sizes))
    losses: list[float] = []
    batches = positions_of(sizes, len(split.train), generator)
    for positions, rate in zip(batches, rates, strict=True):
        x, labels = select(split.train, positions, draw_matrices(len(positions), 28, recipe.augmentation, generator))
        logits = net(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=variant.smoothing)
        losses.append(loss.item())
        if teacher:
            loss = (1 - variant.taught) * loss + variant.taught * softened(logits, teacher, x, variant.temperature)
        loss.backward()
        optimizer.step(rate)
    recalibrate(net, split.train)
    loss, accuracy = evaluate(net, split.val)
    tail = losses[-len(losses) // recipe.epochs :]
    return net, {
        "train_loss": round(statistics.mean(tail), 5), "loss": round(loss, 6), "accuracy": round(accuracy, 5)
    }  # fmt: skip


@torch.no_grad()
def recalibrate(net: nn.Module, images: Images) -> None:
    norms = [module for module in net.modules() if isinstance(module, Norm)]
    net.eval()
    for norm in norms:
        norm.train().recalibrating = 1
    spread = torch.arange(EVALUATION_BATCH) * (len(images) // EVALUATION_BATCH)
    for start in range(N_RECALIBRATION_IMAGES // EVALUATION_BATCH):
        net(select(images, spread + start)[0])
    for norm in norms:
        norm.eval().recalibrating = 0


@torch.no_grad()
def evaluate(net: nn.Module, images: Images) -> tuple[float, float]:
    net.eval()
    loss, correct = 0.0, 0
    for positions in torch.arange(len(images)).split(EVALUATION_BATCH):
        n = len(positions)
        x, labels = select(images, F.pad(positions, (0, EVALUATION_BATCH - n)))  # the kernels want whole vectors
        logits, labels = net(x)[:n], labels[:n]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(images), correct / len(images)


@dataclass(frozen=True)
class Job:
    """One training."""

    name: str
    size: int
    epochs: int
    pair: int  # fold and seed

    @property
    def key(self) -> str:
        return f"{self.name}/{self.size}/{self.epochs}/{self.pair}"


def run(job: Job, images: Images) -> dict[str, Any]:
    split = fold(images, job.pair % N_FOLDS, partition=CONFIRM_PARTITION)
    recipe = replace(reference_recipe(epochs=job.epochs), learning_rate=RATE)
    variant = make(job.name, job.size)
    teacher = teacher_of(job, split) if variant.taught else None
    start = time.process_time()
    _, result = train(variant, recipe, split, 100 + job.pair, teacher)
    widths = [s.channels for s in variant.steps if s.channels]
    return {
        **asdict(job), **result, "n_parameters": n_parameters(variant), "widths": widths,
        "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def plan(names: list[str], size: int, epochs: int, pairs: int) -> None:
    planned = {job.key for job in jobs_of(FOLDER / "plan.jsonl", Job)}
    jobs = [Job(name, size, epochs, pair) for pair in range(pairs) for name in names]
    append(FOLDER / "plan.jsonl", [asdict(job) for job in jobs if job.key not in planned])


def work(folder: Path, names: list[str]) -> None:
    """Train what is planned of these variants, of all if there are none."""
    torch.set_num_threads(1)
    images = load_train(default_data_dir())

    def wanted() -> list[Job]:
        return [job for job in jobs_of(folder / "plan.jsonl", Job) if not names or job.name in names]

    work_off(folder / "runs.jsonl", Job, wanted, partial(run, images=images))


HEADER = ("", "n", "parameters", "loss, thousandths", "p", "accuracy, points", "training loss", "CPU s")
FINITE = 1.0  # nats: what ends above has diverged


def table(rows: list[dict[str, Any]], size: int, epochs: int) -> str:
    """The base, then differences to the base of the same fold and seed ± standard error, the best loss first."""
    of = {(r["name"], r["pair"]): r for r in rows if (r["size"], r["epochs"]) == (size, epochs)}
    base = {pair: r for (name, pair), r in of.items() if name == "base"}
    found = [_compared(name, of, base) for name in dict.fromkeys(n for n, _ in of) if name != "base"]
    body = [_base(list(base.values())), *(cells for _, cells in sorted(found, key=lambda item: item[0]))]
    return markdown_table((f"below {size:,}, {epochs} epochs", *HEADER[1:]), body, "l" + "r" * (len(HEADER) - 1))


def _base(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    loss, accuracy = (statistics.mean(r[key] for r in rows) for key in ("loss", "accuracy"))
    return ("base", str(len(rows)), *_own(rows)[:1], f"{1000 * loss:.2f}", "", f"{100 * accuracy:.3f}", *_own(rows)[1:])


def _own(rows: list[dict[str, Any]]) -> tuple[str, str, str]:
    train_loss, seconds = (statistics.mean(r[key] for r in rows) for key in ("train_loss", "seconds"))
    return f"{rows[0]['n_parameters']:,}", f"{train_loss:.4f}", f"{seconds:.0f}"


def _compared(name: str, of: dict, base: dict) -> tuple[float, tuple[str, ...]]:
    """The mean difference in loss, and the cells of the row."""
    own = {pair: r for (n, pair), r in of.items() if n == name and pair in base}
    ended = {pair: r for pair, r in own.items() if r["loss"] < FINITE}
    n_diverged = len(own) - len(ended)
    n = f"{len(own)}" + (f" ({n_diverged} diverged)" if n_diverged else "")
    if not ended:
        return math.inf, (name, n, *[""] * (len(HEADER) - 2))
    losses = [1000 * (r["loss"] - base[pair]["loss"]) for pair, r in ended.items()]
    accuracies = [100 * (r["accuracy"] - base[pair]["accuracy"]) for pair, r in ended.items()]
    p = f"{ttest_1samp(losses, 0).pvalue:.3f}" if len(losses) > 1 else ""
    differences = (
        f"{statistics.mean(losses):+.2f}{error_text(losses)}",
        p,
        f"{statistics.mean(accuracies):+.3f}{error_text(accuracies, 3)}",
    )
    cells = _own(list(ended.values()))
    return statistics.mean(losses), (name, n, cells[0], *differences, *cells[1:])


def error_text(values: list[float], digits: int = 2) -> str:
    return f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan")
    planning.add_argument("names", nargs="+", choices=[*WAYS, "all"])
    planning.add_argument("--size", type=int, default=2000)
    planning.add_argument("--epochs", type=int, default=15)
    planning.add_argument("--pairs", type=int, default=6)
    training = commands.add_parser("train")
    training.add_argument("names", nargs="*", metavar="VARIANT", help="those alone")
    training.add_argument("--workers", type=int, default=2)
    commands.add_parser("tables")
    args = parser.parse_args()
    if args.command == "plan":
        plan(list(WAYS) if "all" in args.names else args.names, args.size, args.epochs, args.pairs)
    elif args.command == "train":
        if not MEMORY.keys() <= os.environ.keys():
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY, "OMP_NUM_THREADS": "1"})
        prepare(default_data_dir())
        sys.exit(not run_all(work, [(FOLDER, args.names)] * args.workers))
    else:
        rows = read(FOLDER / "runs.jsonl")
        for size, epochs in sorted({(r["size"], r["epochs"]) for r in rows}):
            print(table(rows, size, epochs), "\n")


if __name__ == "__main__":
    main()
