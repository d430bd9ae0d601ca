"""A search under fire: many short real trials, and every few seconds a fault. `make soak ROUNDS=20`

A round asks for a few trials more of one study, injects faults while they are trained, and starts the same command
again whenever it ended, as whoever uses it would. After each fault every finished trial must still be there as it was,
and SQLite find no damage; after each round exactly the asked number is trained, none is left running, and each
interrupted candidate was queued again, at most twice. Then the solution is exported and the export killed at some
moment: its folder is whole or absent. The exit code is 1 if anything was lost.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

import faked_clock
from processes import workers_of

from nas_mnist.errors import NasMnistError
from nas_mnist.solution import predict
from nas_mnist.study import ownership, studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.shared import MAX_RETRIES
from nas_mnist.study.storage import Storage

TRIALS_A_ROUND, FAULTS_A_ROUND, WORKERS, EPOCHS = 5, 4, 2, 2
DISK_BYTES = 32_000_000
PATIENCE_SECONDS = 600  # for one run of the command to begin its first trial, or to end


@dataclass
class Search:
    """The search command, and the processes of its last run."""

    folder: Path
    process: subprocess.Popen | None = None
    n_runs: int = 0
    exits: list[int] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def storage(self) -> Storage:
        return Storage.parse(str(self.disk / "soak.db"))

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def clock(self) -> Path:
        return self.folder / "clock"

    def start(self, n_trials: int) -> None:
        options = {"--trials": n_trials, "--epochs": EPOCHS, "--train-images": 1000, "--workers": WORKERS}
        self.n_runs += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*nas_mnist("search", self.storage), *(str(part) for option in options.items() for part in option)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._faked_clock(),
                start_new_session=True,
            )

    def _faked_clock(self) -> dict[str, str]:
        return faked_clock.environment(self.clock) if faked_clock.IS_INSTALLED else {}

    @property
    def workers(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return workers_of(self.process)
        return []

    def ended(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            self.exits.append(self.process.returncode)
            self.process = None
        return self.process is None

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until it has ended, or `until` holds."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.ended() and not until():
            if time.monotonic() > end:
                raise SystemExit(f"the search neither goes on nor ends: see {self.log}")
            time.sleep(0.1)


def nas_mnist(command: str, storage: Storage) -> list[str]:
    return [sys.executable, "-m", "nas_mnist", command, "--storage", storage.url]


def trials_of(search: Search) -> list[FrozenTrial]:
    if not search.storage.path.exists():
        return []
    opened = search.storage.open()
    if "nas-mnist" not in studies.names(opened):
        return []
    return studies.load(opened, "nas-mnist").get_trials(deepcopy=False)


def n_running(search: Search) -> int:
    """Trials that have begun; read without Optuna, which takes longer than a trial."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(search.storage.path)) as connection:
        return connection.execute("SELECT count(*) FROM trials WHERE state = 'RUNNING'").fetchone()[0]
    return 0


# --- faults ----------------------------------------------------------------------------------------------------------


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_worker(search: Search, rng: random.Random) -> None:
    _kill(rng.sample(search.workers, 1) if search.workers else [])


def kill_workers(search: Search, rng: random.Random) -> None:
    _kill(search.workers)


def kill_parent(search: Search, rng: random.Random) -> None:
    search.process.kill()


def kill_all(search: Search, rng: random.Random) -> None:
    os.killpg(search.process.pid, signal.SIGKILL)


def terminate(search: Search, rng: random.Random) -> None:
    search.process.terminate()


def terminate_all(search: Search, rng: random.Random) -> None:
    os.killpg(search.process.pid, signal.SIGTERM)


def ctrl_c(search: Search, rng: random.Random) -> None:
    os.killpg(search.process.pid, signal.SIGINT)


def ctrl_c_twice(search: Search, rng: random.Random) -> None:
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(search.process.pid, signal.SIGINT)
        time.sleep(rng.uniform(0.01, 0.5))


def starve_worker(search: Search, rng: random.Random) -> None:
    """Its next allocation fails, by an error of Python, of PyTorch or of the C library."""
    for worker in rng.sample(search.workers, 1) if search.workers else []:
        limit = worker.memory_info().vms
        worker.rlimit(resource.RLIMIT_AS, (limit, limit))


def freeze_worker(search: Search, rng: random.Random) -> None:
    for worker in rng.sample(search.workers, 1) if search.workers else []:
        worker.suspend()
        time.sleep(rng.uniform(1, 5))
        worker.resume()


def lock_database(search: Search, rng: random.Random) -> None:
    """Another program, which keeps it for up to 30 s."""
    script = (
        "import sqlite3, sys, time\n"
        "connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)\n"
        "connection.execute('BEGIN EXCLUSIVE')\n"
        "time.sleep(float(sys.argv[2]))"
    )
    seconds = rng.choice([2, 10, 30])
    subprocess.run([sys.executable, "-c", script, search.storage.path, str(seconds)], check=True)


def fill_disk(search: Search, rng: random.Random) -> None:
    filling = search.disk / "filling"
    with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    search.wait()
    filling.unlink()


def set_clock(search: Search, rng: random.Random) -> None:
    search.clock.write_text(f"{rng.choice('+-')}{rng.randint(1, 4000)}h")


FAULTS = {
    "worker, kill −9": kill_worker,
    "both workers, kill −9": kill_workers,
    "parent, kill −9": kill_parent,
    "all at once, kill −9": kill_all,
    "SIGTERM to the parent": terminate,
    "SIGTERM to all": terminate_all,
    "Ctrl-C": ctrl_c,
    "Ctrl-C twice": ctrl_c_twice,
    "worker out of memory": starve_worker,
    "worker frozen for seconds": freeze_worker,
    "database locked, 2 to 30 s": lock_database,
}


# --- what must hold --------------------------------------------------------------------------------------------------


def fingerprint(trial: FrozenTrial) -> str:
    """All that a finished trial is, as text."""
    return repr((trial.state, trial.values, trial.params, trial.intermediate_values, trial.user_attrs))


def finished(trials: list[FrozenTrial]) -> dict[int, str]:
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return {trial.number: fingerprint(trial) for trial in trials if trial.state in ended}


def lost(before: dict[int, str], trials: list[FrozenTrial]) -> list[int]:
    """The numbers of the trials that were finished and are not there any more, or not as they were."""
    now = finished(trials)
    return [number for number, was in before.items() if now.get(number) != was]


def history(trial: FrozenTrial) -> list[int]:
    return trial.system_attrs.get("retry_history", [])


def tried_again(trials: list[FrozenTrial]) -> set[int]:
    return {history(trial)[-1] for trial in trials if history(trial)}


def violations(trials: list[FrozenTrial], n_trials: int) -> Iterator[str]:
    """What is wrong with a study whose search has ended by itself."""
    now = TrialCounts.of(trials)
    if now.trained != n_trials:
        yield f"{now.trained} trials are trained, not {n_trials}"
    if now.running:
        yield f"{now.running} trials are left running"
    for trial in trials:
        if len(history(trial)) > MAX_RETRIES:
            yield f"trial {trial.number} is the {len(history(trial))}th repetition of one candidate"
        given_up = len(history(trial)) >= MAX_RETRIES
        if trial.state == TrialState.FAIL and not given_up and trial.number not in tried_again(trials):
            yield f"trial {trial.number} was interrupted and never queued again"
        if trial.state == TrialState.COMPLETE and len(trial.intermediate_values) != EPOCHS:
            yield f"trial {trial.number} is complete with {len(trial.intermediate_values)} of {EPOCHS} epochs"
    doubles = [number for number, n in Counter(history(t)[-1] for t in trials if history(t)).items() if n > 1]
    if doubles:
        yield f"trials {doubles} were queued again twice"


def damage(path: Path) -> str | None:
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
            found = connection.execute("PRAGMA integrity_check").fetchall()
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if found == [("ok",)] else f"integrity_check: {found[:3]}"


# --- rounds ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Of one kind of fault: how often, and what it did."""

    injected: int = 0
    interrupted: int = 0
    tried_again: int = 0
    epochs: int = 0
    lost: int = 0


@dataclass
class Soak:
    search: Search
    rng: random.Random
    faults: dict[str, Callable]
    tallies: dict[str, Tally]
    n_trials: int = 0
    deck: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def round(self) -> None:
        self.n_trials += TRIALS_A_ROUND
        for _ in range(FAULTS_A_ROUND):
            self._go_on()
            self.search.wait(lambda: n_running(self.search) > 0)
            if not self.search.ended():
                time.sleep(self.rng.uniform(0, 3))
                self._inject()
        for _ in range(10):
            self._go_on()
            self.search.wait()
            if self.search.exits[-1] == 0:
                break
        else:
            self.complaints.append("the search does not come to its end, and nobody disturbs it")
        self.complaints += violations(trials_of(self.search), self.n_trials)

    def _go_on(self) -> None:
        if self.search.ended():
            self.search.start(self.n_trials)

    def _inject(self) -> None:
        name = self._draw()
        tally, before = self.tallies[name], trials_of(self.search)
        if self.search.ended():
            return
        tally.injected += 1
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            self.faults[name](self.search, self.rng)
        self._settle()
        after = trials_of(self.search)
        known = {trial.number for trial in before if trial.state == TrialState.FAIL}
        failed = [t for t in after if t.state == TrialState.FAIL and t.number not in known]
        tally.interrupted += len(failed)
        tally.tried_again += sum(trial.number in tried_again(after) for trial in failed)
        tally.epochs += sum(len(trial.intermediate_values) for trial in failed)
        tally.lost += len(gone := lost(finished(before), after))
        self.complaints += [f"{name}: trial {number} was finished, and is lost" for number in gone]
        if broken := damage(self.search.storage.path):
            self.complaints.append(f"{name}: {broken}")

    def _draw(self) -> str:
        """Every kind of fault once, in any order, before the first comes again."""
        if not self.deck:
            self.deck = self.rng.sample(list(self.faults), len(self.faults))
        return self.deck.pop()

    def _settle(self) -> None:
        """Until somebody has come across what the fault left behind: the parent's other worker, or the next run."""
        time.sleep(1)
        self._go_on()
        study = studies.load(self.search.storage.open(), "nas-mnist")
        running = (TrialState.RUNNING,)
        self.search.wait(lambda: not any(map(ownership.is_orphan, study.get_trials(deepcopy=False, states=running))))

    def export(self) -> None:
        """Killed at some moment; the folder is a whole solution, this one's or an earlier one's, or it is not there."""
        tally = self.tallies.setdefault("export, kill −9", Tally(injected=0))
        out = self.search.disk / "solution"
        arguments = ["--out", str(out), *(["--force"] if out.exists() else [])]
        process = subprocess.Popen(
            [*nas_mnist("export", self.search.storage), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.rng.uniform(2, 25))
        tally.injected += process.poll() is None
        process.kill()
        process.wait()
        if out.exists():
            try:
                predict.check(out)
            except NasMnistError as error:
                tally.lost += 1
                self.complaints.append(f"export: {error}")


def retrain(search: Search) -> None:
    """What there is to export: a small network, trained for a moment."""
    network = ["--architecture", "c8 M c12 M c16 G c10k1-", "--epochs", "1", "--train-images", "500", "--seeds", "1"]
    subprocess.run([*nas_mnist("retrain", search.storage), *network], check=True, stdout=subprocess.DEVNULL)


def report(soak: Soak, n_rounds: int, seconds: float) -> Table:
    n_said = soak.search.log.read_text().count("is started again")
    table = Table(
        title=f"{n_rounds} rounds, {soak.n_trials} trials asked for and trained, {seconds / 60:.0f} minutes",
        caption=f"the command was started {soak.search.n_runs} times, and replaced {n_said} workers and said so; "
        "a candidate is queued again twice, then given up",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("fault", no_wrap=True)
    for name in ("injected", "inter-\nrupted", "queued\nagain", "epochs\nrepeated", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    total = Tally()
    for name, tally in soak.tallies.items():
        table.add_row(name, *map(str, vars(tally).values()))
        for key, value in vars(tally).items():
            setattr(total, key, getattr(total, key) + value)
    table.add_section()
    table.add_row("all", *map(str, vars(total).values()), style="bold")
    return table


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A disk of its own for the folder, if one can be mounted here."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments (default: %(default)s)")
    arguments = parser.parse_args()
    console, start = Console(), time.monotonic()
    search = Search(Path(tempfile.mkdtemp(prefix="nas-mnist-soak-")))
    search.disk.mkdir()
    search.clock.write_text("+0")
    with small_disk(search.disk) as mounted:
        faults = (
            FAULTS
            | ({"disk full": fill_disk} if mounted else {})
            | ({"clock set": set_clock} if faked_clock.IS_INSTALLED else {})
        )
        soak = Soak(search, random.Random(arguments.seed), faults, {name: Tally() for name in faults})
        try:
            _run(soak, arguments.rounds, console)
        finally:
            if search.process is not None:
                os.killpg(search.process.pid, signal.SIGKILL)
                search.process.wait()
        if "Traceback" in search.log.read_text():
            soak.complaints.append(f"a traceback was printed: see {search.log}")
        console.print(report(soak, arguments.rounds, time.monotonic() - start))
    for complaint in soak.complaints:
        console.print(f"✗ {complaint}", style="red", highlight=False)
    console.print("✗ something was lost" if soak.complaints else "✓ nothing was lost", style="bold")
    return 1 if soak.complaints else 0


def _run(soak: Soak, n_rounds: int, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rounds", total=n_rounds)
        for number in range(n_rounds):
            soak.round()
            if number == 0:
                retrain(soak.search)
            soak.export()
            now = TrialCounts.of(trials_of(soak.search))
            console.print(
                f"round {number + 1}: {now.trained} trials trained, {now.failed} interrupted so far, "
                f"{len(soak.complaints)} complaints",
                highlight=False,
            )
            progress.advance(task)


if __name__ == "__main__":
    sys.exit(main())
