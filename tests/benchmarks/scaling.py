"""How throughput grows with the number of workers, and what one `ask` costs: `make scaling`.

A trial has a known length: it sleeps for a second and reports five times. So what is lost is the study's: the lock, the
sampler, the database. SQLite, and PostgreSQL where its server is installed (a fresh one, which syncs to the disk).
Prints two tables and writes `build/scaling.json`; asserts nothing, because times depend on the machine.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import optuna
from rich.console import Console
from rich.table import Table

from nas_mnist.study import space, studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.shared import SharedStudy, until_trained
from nas_mnist.study.storage import Storage

sys.path.append(str(Path(__file__).parents[1]))
import postgresql

TRIAL_SECONDS, REPORTS = 1.0, 5
N_WORKERS = (1, 2, 4, 8)
TRIALS_PER_WORKER = 12
STUDY_SIZES = (100, 1_000)
ASKS = 15


def objective(trial: optuna.Trial) -> float:
    parameters = space.suggest(trial, "sgd")
    for step in range(1, REPORTS + 1):
        time.sleep(TRIAL_SECONDS / REPORTS)
        trial.report(parameters["dropout"], step)
    return parameters["dropout"]


def shared(storage: Storage, name: str, n_trials: int, worker: int) -> SharedStudy:
    demand, pruner = until_trained(n_trials), optuna.pruners.NopPruner()
    return SharedStudy(storage, name, n_may_start=demand, seed=0, worker=worker, pruner=pruner)


def work(storage: Storage, name: str, n_trials: int, worker: int, barrier) -> None:
    mine = shared(storage, name, n_trials, worker)
    barrier.wait()
    mine.optimize(objective)


def measure_throughput(storage: Storage, n_workers: int) -> float:
    """Trained trials a second, from the moment that all workers have started."""
    name, n_trials = f"scaling-{n_workers}", TRIALS_PER_WORKER * n_workers
    studies.create(storage.open(create=True), name, metric="m", attributes={})
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(n_workers + 1)
    processes = [context.Process(target=work, args=(storage, name, n_trials, i, barrier)) for i in range(n_workers)]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - start
    trained = TrialCounts.of(studies.load(storage.open(), name).get_trials()).trained
    if trained != n_trials:
        raise RuntimeError(f"{trained} trials instead of {n_trials}")
    return n_trials / seconds


def measure_ask(storage: Storage, n_trials: int) -> dict[str, float]:
    """Medians, in milliseconds, with so many trials there: an `ask`, nearly all of it under the lock; its share on this
    processor; and the drawing and writing down of the parameters after it.
    """
    name = f"ask-{n_trials}"
    studies.create(storage.open(create=True), name, metric="m", attributes={})
    mine = shared(storage, name, n_trials + ASKS, 0)
    fill(mine, n_trials)
    mine._thread_local.in_optimize_loop = True  # as within `optimize`: trials are read once, then kept
    times = {"ask": [], "ask_cpu": [], "sample": []}
    for _ in range(ASKS):
        start, start_cpu = time.perf_counter(), time.process_time()
        trial = mine.ask()
        asked, asked_cpu = time.perf_counter(), time.process_time()
        space.suggest(trial, "sgd")
        times["sample"].append(time.perf_counter() - asked)
        times["ask"].append(asked - start)
        times["ask_cpu"].append(asked_cpu - start_cpu)
        mine.tell(trial, 0.5)
    mine._storage._backend.engine.dispose()
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def fill(study: optuna.Study, n_trials: int) -> None:
    sampler = optuna.samplers.RandomSampler(seed=0)
    template = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(n_trials):
        trial = template.ask()
        space.suggest(trial, "sgd")
        template.tell(trial, sampler._rng.rng.random())
    study.add_trials(template.trials)


def measure(storages: dict[str, Storage], sizes: tuple[int, ...]) -> dict:
    return {
        "throughput": {
            name: {n: measure_throughput(storage, n) for n in N_WORKERS} for name, storage in storages.items()
        },
        "ask": {name: {n: measure_ask(storage, n) for n in sizes} for name, storage in storages.items()},
    }


def show(result: dict) -> None:
    throughput = Table("storage", "workers", "trials/s", "efficiency")
    for name, rates in result["throughput"].items():
        for n, rate in rates.items():
            throughput.add_row(name, str(n), f"{rate:.2f}", f"{rate * TRIAL_SECONDS / n:.0%}")
    ask = Table("storage", "trials in the study", "ask, ms", "of it processor, ms", "draw, ms")
    for name, times in result["ask"].items():
        for n, milliseconds in times.items():
            ask.add_row(name, f"{n:,}", *(f"{milliseconds[key]:.0f}" for key in ("ask", "ask_cpu", "sample")))
    Console().print(throughput, ask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/scaling.json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=STUDY_SIZES, help="trials in the study, for `ask`")
    arguments = parser.parse_args()
    binaries = postgresql.find_binaries()
    server = postgresql.Server(binaries, fsync=True) if binaries else None
    with tempfile.TemporaryDirectory(prefix="nas-mnist-scaling-") as folder:
        try:
            storages = {"SQLite": Storage.parse(f"{folder}/s.db")}
            if server:
                storages["PostgreSQL"] = Storage.parse(server.new_database())
            result = measure(storages, tuple(arguments.sizes))
        finally:
            if server:
                server.remove()
    show(result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
