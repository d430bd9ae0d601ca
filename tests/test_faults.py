"""Faults, injected for real: what is killed, filled, locked or set wrong, and what is left afterwards.

Processes that are started here import this file. What a search does not need is therefore imported where it is needed.
"""

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import faked_clock
import optuna
import psutil
import pytest
from host import wait_for
from optuna.trial import TrialState
from processes import workers_of

from nas_mnist import errors
from nas_mnist.study import ownership, studies
from nas_mnist.study.artifacts import Artifacts
from nas_mnist.study.records import PLANNED_RUN, TrialCounts, write_epochs
from nas_mnist.study.shared import MAX_RETRIES, SharedStudy, _retry_history, recover, until_trained
from nas_mnist.study.storage import LOCK_TIMEOUT_SECONDS, Storage, experimental
from nas_mnist.training.loop import EpochResult
from nas_mnist.workers.events import Progress, Worker, WorkerDied, WorkerFailed
from nas_mnist.workers.local import run_workers
from nas_mnist.workers.signals import stopped_once

TWO = [Worker(0, "cpu"), Worker(1, "cpu")]


# --- a search whose trials are moments, or last until a gate is opened -----------------------------------------------


@pytest.fixture
def storage(tmp_path):
    return make(tmp_path / "s.db")


def make(path):
    storage = Storage.parse(str(path))
    studies.create(storage.open(create=True), "s", metric="m", attributes={})
    return storage


def open_gate(storage):
    storage.path.with_name("gate").touch()


def _free(trial):
    """Nothing is in the way of this trial."""


def _gated(path, n_free, trial):
    while trial.number >= n_free and not path.with_name("gate").exists():
        time.sleep(0.02)


def _objective(trial, fault, send):
    x = trial.suggest_float("x", 0, 1)
    trial.set_user_attr("filling", "x" * 2000)
    trial.report(x, 1)
    send(Progress())
    fault(trial)
    trial.report(x, 2)
    return x


def work(storage, n_trials, fault=_free, worker=TWO[0], send=lambda event: None):
    """What a worker does, of which there may be one in this process too."""
    demand, pruner = until_trained(n_trials), optuna.pruners.NopPruner()
    shared = SharedStudy(storage, "s", n_may_start=demand, seed=0, worker=worker.index, pruner=pruner)
    shared.optimize(lambda trial: _objective(trial, fault, send))


def search(storage, n_trials, fault=_free, *, workers=TWO):
    """As `search.search` does it, without training; returns why workers died."""
    reasons = []
    with stopped_once():
        try:
            run_workers(
                partial(work, storage, n_trials, fault),
                workers,
                lambda worker, event: reasons.append(event.reason) if isinstance(event, WorkerDied) else None,
            )
        finally:
            with storage.lock():
                recover(studies.load(storage.open(), "s"))
    return reasons


def _parent(storage, n_trials, n_free):
    os.setpgid(0, 0)
    search(storage, n_trials, partial(_gated, storage.path, n_free))


def start(storage, n_trials, n_free=0):
    """A search in a group of processes, with two trials before the gate and `n_free` that were not held up."""
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(storage, n_trials, n_free))
    parent.start()
    begun = "SELECT count(*) FROM trial_intermediate_values JOIN trials USING (trial_id) WHERE number >= ?"
    wait_for(lambda: query(storage, begun, n_free) == [(2,)])
    return parent


def query(storage, sql, *values):
    with contextlib.closing(sqlite3.connect(storage.path, timeout=60)) as connection, connection:
        return connection.execute(sql, values).fetchall()


def trials_of(storage, name="s"):
    return studies.load(storage.open(), name).get_trials(deepcopy=False)


def states(trials):
    return "".join(trial.state.name[0] for trial in trials)  # C, P, F, R, W


def check(storage, n_trials, name="s"):
    """Exactly the asked number, nothing left running, what failed tried again at most twice, the database sound."""
    trials = trials_of(storage, name)
    now = TrialCounts.of(trials)
    assert (now.trained, now.running, now.waiting) == (n_trials, 0, 0)
    retries = {_retry_history(trial)[-1]: trial for trial in trials if _retry_history(trial)}
    for trial in trials:
        assert len(_retry_history(trial)) <= MAX_RETRIES
        if trial.state == TrialState.FAIL and len(_retry_history(trial)) < MAX_RETRIES:
            assert retries[trial.number].params.items() >= trial.params.items()
    assert query(storage, "PRAGMA integrity_check") == [("ok",)]
    return trials


# --- killed ----------------------------------------------------------------------------------------------------------


def _killed(n, trial):
    if trial.number < n:
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_workers_are_replaced_their_candidates_tried_again_and_the_count_is_exact(storage):
    assert search(storage, 5, partial(_killed, 3)) == ["killed by signal 9"] * 3
    assert states(check(storage, 5)).count("F") == 3


@pytest.mark.parametrize("who", ["parent", "worker and parent", "all"])
def test_killed_parent_or_all_at_once_and_the_same_search_goes_on(storage, who):
    parent = start(storage, 5, n_free=1)
    finished = {t.number: t.value for t in trials_of(storage) if t.state == TrialState.COMPLETE}
    children = psutil.Process(parent.pid).children(recursive=True)
    if who == "all":
        os.killpg(parent.pid, signal.SIGKILL)
    else:
        os.kill(parent.pid, signal.SIGSTOP)  # it must not replace the worker in between
        for process in workers_of(parent)[: who != "parent"]:
            process.kill()
        parent.kill()
    parent.join()
    assert not psutil.wait_procs(children, timeout=60)[1]
    work(storage, 5)
    trials = check(storage, 5)
    assert finished and finished.items() <= {t.number: t.value for t in trials}.items()
    assert states(trials).count("F") == 2


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGINT, signal.SIGTERM] * 20])
def test_stopped_once_or_in_a_hurry_leaves_nothing_running(storage, signals):
    parent = start(storage, 4)
    children = psutil.Process(parent.pid).children(recursive=True)
    for which in signals:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, which)  # as a terminal does
        time.sleep(0.02)
    parent.join()
    assert parent.exitcode and states(trials_of(storage)) == "FFWW"
    assert not psutil.wait_procs(children, timeout=60)[1]
    work(storage, 4)
    check(storage, 4)


def test_process_that_nobody_asked_after_is_dead(storage):
    """In a container without an init, killed workers of a killed parent stay in the process table for ever."""
    process = subprocess.Popen(["sleep", "60"])
    owner = [ownership.owner()[0], process.pid, ownership._started(process.pid)]
    found, trial = ask(storage)
    trial.set_user_attr(ownership.OWNER, owner)
    assert recover(found) == 0
    process.kill()
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    assert recover(found) == 1
    process.wait()


@pytest.mark.parametrize("step", ["tell", "add_trial"])
def test_recovery_that_is_killed_between_failing_and_queueing_is_made_up_for(storage, step, monkeypatch):
    found, trial = ask(storage)
    trial.suggest_float("x", 0, 1)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(found, step, killed)
        recover(found)
    assert states(trials_of(storage)) == ("R" if step == "tell" else "F")
    for _ in range(2):
        recover(found)
        assert states(trials_of(storage)) == "FW"
    work(storage, 1)
    check(storage, 1)


def test_failed_job_that_another_trial_has_done_is_not_done_again(storage):
    study = studies.load(storage.open(), "s")
    study._thread_local.in_optimize_loop = True
    for state in (TrialState.FAIL, TrialState.COMPLETE):
        study.enqueue_trial({}, user_attrs={PLANNED_RUN: {"seed": 1}})
        study.tell(study.ask(), 1.0 if state == TrialState.COMPLETE else None, state)
    recover(study)
    assert states(trials_of(storage)) == "FC"


def test_retry_takes_neither_owner_nor_file_nor_result_along(storage):
    found, trial = ask(storage)
    trial.set_user_attr(ownership.OWNER, [ownership.owner()[0], 1, -1.0])
    trial.set_user_attr("architecture", "c10k28-")
    write_epochs(trial, [EpochResult(7, *[0.1] * 7)])
    artifacts = Artifacts(found, storage.artifacts)
    artifacts.add(trial, "weights.safetensors", b"1")
    recover(found)
    _, retry = found.get_trials()
    assert retry.user_attrs == {"architecture": "c10k28-"}
    assert artifacts.of(trial) and not artifacts.of(retry)


# --- out of memory ---------------------------------------------------------------------------------------------------


def _hungry(trial):
    """The first three trials need more memory than there is."""
    if trial.number > 2:
        return
    limit = psutil.Process().memory_info().vms + 50_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if trial.number == 0:
        bytearray(1_000_000_000)
    elif trial.number == 1:
        import torch

        torch.zeros(1_000_000_000)
    os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does


def test_worker_out_of_memory_is_replaced_and_its_candidate_tried_again(storage):
    # The third trial is the first one's second try, and the fourth and fifth those of the others.
    reasons = search(storage, 2, _hungry, workers=TWO[:1])
    assert states(check(storage, 2))[:3] == "FFF"
    assert reasons[0] == errors.NO_MEMORY and len(reasons) == 3


@pytest.fixture
def memory_group():
    """A control group of 300 MB, made for this test."""
    for folder, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(folder, f"nas-mnist-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text("300000000")
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        yield group
        wait_for(lambda group=group: not (group / "cgroup.procs").read_text())
        group.rmdir()
        return
    pytest.skip("no control group for memory can be made here: be root on a machine that has them")


def _kept_in(group, trial):
    if trial.number == 0:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        bytearray(2_000_000_000)


def test_worker_that_the_kernel_kills_for_its_memory_is_replaced(storage, memory_group):
    assert search(storage, 2, partial(_kept_in, memory_group), workers=TWO[:1]) == ["killed by signal 9"]
    assert states(check(storage, 2)) == "FCC"


def _always_hungry(trial):
    raise MemoryError


def test_memory_that_never_suffices_is_one_clear_line(storage):
    with pytest.raises(WorkerFailed, match="not enough memory") as error:
        search(storage, 2, _always_hungry, workers=TWO[:1])
    assert "\n" not in str(error.value) and not hasattr(error.value, "__notes__")
    work(storage, 2)
    check(storage, 2)


# --- locked by another program ---------------------------------------------------------------------------------------

_LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("BEGIN EXCLUSIVE")
print(1, flush=True)
time.sleep(float(sys.argv[2]))
connection.execute("COMMIT")
"""


@contextlib.contextmanager
def locked(storage, seconds):
    command = [sys.executable, "-c", _LOCK, str(storage.path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        yield other


def test_database_that_another_program_locks_for_a_while_costs_nothing(storage):
    assert LOCK_TIMEOUT_SECONDS > 30  # the soak locks for 30 s
    parent = start(storage, 4)
    with locked(storage, 8):
        open_gate(storage)
    parent.join()
    assert parent.exitcode == 0 and states(check(storage, 4)) == "CCCC"


def test_database_that_stays_locked_is_one_clear_line(storage, monkeypatch):
    monkeypatch.setattr("nas_mnist.study.storage.LOCK_TIMEOUT_SECONDS", 0.2)
    study = studies.load(storage.open(), "s")
    with locked(storage, 60) as other:
        with pytest.raises(optuna.exceptions.StorageInternalError) as error:
            study.set_user_attr("x", 1)
        other.kill()
    assert errors.explain(error.value) == errors.LOCKED


# --- a clock that jumps ----------------------------------------------------------------------------------------------


def age_heartbeats(storage, hours):
    query(storage, "UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, ?)", f"{-hours} hours")


def fail_stale_trials(storage):
    with experimental():
        optuna.storages.fail_stale_trials(studies.load(storage.open(), "s"))


def test_clock_that_jumps_takes_no_trial_from_a_living_worker(storage):
    parent = start(storage, 3)
    for hours in (24, -48):
        age_heartbeats(storage, hours)  # the same as a clock set so much later
        fail_stale_trials(storage)
    open_gate(storage)
    parent.join()
    assert parent.exitcode == 0 and states(check(storage, 3)) == "CCC"


def ask(storage):
    study = studies.load(storage.open(), "s")
    study._thread_local.in_optimize_loop = True
    return study, study.ask()


def test_trial_of_another_host_that_fell_silent_is_taken_over(storage):
    found, trial = ask(storage)
    found._storage.record_heartbeat(trial._trial_id)
    trial.set_user_attr(ownership.OWNER, ["elsewhere", 1, 1.0])
    fail_stale_trials(storage)
    assert recover(found) == 0 and states(trials_of(storage)) == "R"
    age_heartbeats(storage, 1)
    work(storage, 1)
    assert states(check(storage, 1)) == "FC"


def test_trial_is_never_handed_out_without_a_heartbeat(storage):
    """Or a host that dies at that very moment would leave it running for ever."""
    pruner = optuna.pruners.NopPruner()
    shared = SharedStudy(storage, "s", n_may_start=lambda now: 1, seed=0, worker=0, pruner=pruner)
    shared._thread_local.in_optimize_loop = True
    shared.ask()
    assert query(storage, "SELECT count(*) FROM trial_heartbeats") == [(1,)]


@pytest.mark.skipif(
    not faked_clock.IS_INSTALLED, reason="libfaketime is not installed: see your distribution's packages"
)
def test_search_goes_on_while_the_clock_is_set_to_and_fro(command, tmp_path, data_dir):
    clock = tmp_path / "clock"
    clock.write_text("+0")
    process = command(tmp_path, *SEARCH, "--trials", 4, env=faked_clock.environment(clock))
    for offset in ("+1d", "-2d", "+40d"):
        assert "trial" in process.stdout.readline()
        clock.write_text(offset)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and "4 of 4 trials" in out
    check(Storage.parse(str(tmp_path / "studies/nas_mnist.db")), 4, "nas-mnist")


# --- real searches, on disks that fill up ----------------------------------------------------------------------------

SEARCH = ["search", "--no-warm-start", "--epochs", 1, "--train-images", 300, "--max-params", 400, "--workers", 2]


@pytest.fixture
def command():
    """Starts a command in a folder, in a process group of its own, of which nothing is left after the test."""
    processes = []

    def start(folder, *arguments, env=None):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "nas_mnist", *map(str, arguments)],
                cwd=folder,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Disk:
    """A small disk of its own."""

    def __init__(self, folder):
        self.folder = folder
        self._filling = folder / "filling"

    def leave(self, n_bytes):
        """Fill it up but for so many bytes."""
        self._filling.unlink(missing_ok=True)
        with self._filling.open("wb") as file:
            size = shutil.disk_usage(self.folder).free - n_bytes
            with contextlib.suppress(OSError):
                file.write(b"\0" * max(0, size))


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("n_bytes", [0, 4_000, 60_000, 150_000, 250_000])
def test_full_disk_stops_a_search_and_it_goes_on_once_there_is_room(disk, n_bytes):
    disk.leave(n_bytes)
    path = disk.folder / "s.db"
    with pytest.raises(Exception) as error:
        work(make(path), 200)
    assert errors.FULL in (errors.explain(error.value) or str(error.value))
    finished = {}
    if path.exists():
        rows = query(Storage.parse(str(path)), "SELECT number, value FROM trials JOIN trial_values USING (trial_id)")
        finished = dict(rows)
    disk.leave(3_000_000)
    storage = make(path)
    n_trained = TrialCounts.of(trials_of(storage)).trained
    assert n_trained == len(finished)
    work(storage, n_trained + 5)
    trials = check(storage, n_trained + 5)
    assert finished.items() <= {t.number: t.value for t in trials}.items()


def _fill(disk, trial):
    if trial.number == 2:
        disk.leave(0)


def test_worker_that_finds_the_disk_full_ends_the_search_with_one_line(disk):
    storage = make(disk.folder / "s.db")
    with pytest.raises(Exception) as error:
        search(storage, 100, partial(_fill, disk))
    assert errors.FULL in (errors.explain(error.value) or str(error.value))
    disk.leave(3_000_000)
    work(storage, 8)
    check(storage, 8)


def _weigh(storage, trial):
    from nas_mnist.model.architecture import parse
    from nas_mnist.model.network import build

    network = build(parse("c8 M c12 M c16 G c10k1-"), seed=0)
    Artifacts(trial.study, storage.artifacts).add_weights(trial, network)


@pytest.mark.parametrize("n_bytes", [0, 4096])
def test_full_disk_leaves_no_part_of_the_weights(storage, disk, n_bytes):
    from nas_mnist.stages import retrain

    storage.artifacts.symlink_to(disk.folder)
    _, trial = ask(storage)
    disk.leave(n_bytes)
    with pytest.raises(OSError) as error:
        _weigh(storage, trial)
    assert errors.explain(error.value) == errors.FULL
    assert [path.name for path in disk.folder.iterdir()] == ["filling"]
    disk.leave(1_000_000)
    found, trial = ask(storage)
    _weigh(storage, trial)
    assert len(list(disk.folder.iterdir())) == 2
    assert retrain._read_weights(storage, found, found.get_trials()[1])


@pytest.mark.parametrize("n_bytes", [0, 40_000, 400_000])
def test_full_disk_leaves_no_part_of_an_export(disk, retrained, data_dir, n_bytes):
    from nas_mnist.solution import export

    disk.leave(n_bytes)
    with pytest.raises(errors.SolutionError, match=r"No space left on device.*make room"):
        export.export(retrained, export.Source("s", "nas-mnist", 1), data_dir, disk.folder / "solution")
    assert [path.name for path in disk.folder.iterdir()] == ["filling"]


def test_full_disk_leaves_no_part_of_a_figure(disk):
    from matplotlib.figure import Figure

    from nas_mnist.views import tables

    disk.leave(4096)
    figure = Figure(figsize=(20, 20))
    figure.subplots().plot([1, 2], [2, 1])
    with pytest.raises(OSError) as error:
        tables.save_figure(figure, disk.folder / "lr.png")
    assert errors.explain(error.value) == errors.FULL
    assert [path.name for path in disk.folder.iterdir()] == ["filling"]


def test_full_disk_ends_a_real_search_with_one_clear_line_and_the_same_command_goes_on(disk, command, data_dir):
    process = command(disk.folder, *SEARCH, "--trials", 4)
    assert process.stdout.readline().startswith("1/4")
    os.killpg(process.pid, signal.SIGSTOP)  # it might be done before the disk is full
    disk.leave(0)
    os.killpg(process.pid, signal.SIGCONT)
    out, err = process.communicate()
    assert process.returncode == 2 and err == f"nas-mnist: {errors.FULL}\n", (out, err)
    disk.leave(12_000_000)  # the dashboard's plots are written again every 30 s, so a slow search needs more
    process = command(disk.folder, *SEARCH, "--trials", 4)
    out, err = process.communicate()
    assert process.returncode == 0 and err == "" and "4 of 4 trials" in out
    check(Storage.parse(str(disk.folder / "studies" / "nas_mnist.db")), 4, "nas-mnist")
