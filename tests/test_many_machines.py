"""Several hosts on one PostgreSQL server, and a server that goes away."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import host
import optuna
import psutil
import pytest
from host import wait_for
from optuna.trial import TrialState
from postgresql import PASSWORD

from nas_mnist.cli import main as cli
from nas_mnist.errors import StudyError
from nas_mnist.study import ownership, studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.shared import SharedStudy, recover, until_trained
from nas_mnist.study.storage import STORAGE_ERRORS, Outage, OutageEnded, Storage, _PatientConnect
from nas_mnist.workers.events import Worker, WorkerDied
from nas_mnist.workers.local import run_workers

# Every epoch is validated on 12,000 images, so it is the network that must be small.
QUICK = ["--max-params", "400", "--epochs", "2", "--train-images", "300", "--workers", "1", "--no-warm-start"]
QUICK += ["--trials", "2"]


@pytest.fixture
def storage(postgresql_server):
    storage = Storage(postgresql_server.new_database(), host.HEARTBEAT_SECONDS, host.GRACE_SECONDS)
    studies.create(storage.open(create=True), "s", metric="m", attributes={})
    return storage


def trials_of(storage, name="s", states=None):
    return studies.load(storage.open(), name).get_trials(states=states)


@contextlib.contextmanager
def hosts_ended(*processes):
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def start_host(storage, n_trials, folder, name=None):
    """A parent with two workers, all in one process group; on a host of its own if it has a name."""
    command = [sys.executable, host.__file__, storage.url, str(n_trials), str(folder)]
    if name and os.geteuid() == 0 and shutil.which("unshare"):
        command = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
    elif name:
        command.append(name)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True, env=environment)


def started_on(storage, name):
    """The trials that a host is training; "" is the one of these tests."""
    running = trials_of(storage, states=(TrialState.RUNNING,))
    name = name or socket.gethostname()
    return [t for t in running if t.user_attrs.get(ownership.OWNER, [""])[0].startswith(f"{name} ") and "x" in t.params]


def test_host_that_is_killed_whole_loses_nothing_and_the_other_finishes(storage, tmp_path):
    hold = tmp_path / host.HOLD
    hold.touch()
    lost, survivor = start_host(storage, 10, tmp_path, "lost-host"), start_host(storage, 10, tmp_path)
    with hosts_ended(lost, survivor):
        wait_for(lambda: len(started_on(storage, "")) == 2)
        interrupted = wait_for(lambda: len(found := started_on(storage, "lost-host")) == 2 and found)
        os.killpg(lost.pid, signal.SIGKILL)
        hold.unlink()
        assert survivor.communicate(timeout=300)[0] == "10\n"
    trials = trials_of(storage)
    now = TrialCounts.of(trials)
    assert (now.trained, now.running, now.waiting) == (10, 0, 0)
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert [t.number for t in failed] == [t.number for t in interrupted]
    for trial in failed:
        assert trial.user_attrs[ownership.OWNER][0].startswith("lost-host ")
        (again,) = [t for t in trials if t.system_attrs.get("retry_history") == [trial.number]]
        assert again.state == TrialState.COMPLETE and again.params == trial.params
    host.assert_each_ran_once(trials, tmp_path)


def test_two_hosts_that_begin_at_once_on_an_empty_database_join_one_study(postgresql_server, data_dir):
    url = postgresql_server.new_database()
    command = [sys.executable, "-m", "nas_mnist", "search", *QUICK, "--trials", "4", "--epochs", "1", "--storage", url]
    hosts = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        for _ in range(2)
    ]
    with hosts_ended(*hosts):
        outputs = [host.communicate(timeout=600)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    trials = trials_of(Storage.parse(url), "nas-mnist")
    now = TrialCounts.of(trials)
    assert (now.trained, now.running, now.waiting, now.failed) == (4, 0, 0, 0)


def test_server_that_restarts_in_the_middle_of_trials_costs_no_trial_of_the_count(postgresql_server, storage, tmp_path):
    events, reporting, hold = [], set(), tmp_path / host.HOLD
    hold.touch()

    def restart_once(worker, event):
        """The server is away for as long as it takes a worker to notice, however slow the machine."""
        events.append(event)
        if isinstance(event, host.Progress) and worker.index not in reporting:
            reporting.add(worker.index)
            if len(reporting) == 2:
                postgresql_server.stop()
        elif isinstance(event, Outage) and hold.exists():
            postgresql_server.start()
            hold.unlink()

    patient = Storage(storage.url)  # as by default
    work = partial(host.work, patient, 8, tmp_path, None)
    run_workers(work, [Worker(0, "cpu"), Worker(1, "cpu")], restart_once)
    trials = trials_of(storage)
    now = TrialCounts.of(trials)
    assert (now.trained, now.running, now.waiting) == (8, 0, 0)
    assert any(isinstance(event, OutageEnded) for event in events)
    assert now.failed <= sum(isinstance(event, WorkerDied) for event in events)
    host.assert_each_ran_once(trials, tmp_path)


def test_search_waits_for_a_server_that_restarts_and_says_so(postgresql_server, data_dir):
    url = postgresql_server.new_database()
    command = [sys.executable, "-u", "-m", "nas_mnist", "search", *QUICK, "--verbose", "--storage", url]
    search = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with hosts_ended(search):
        lines = iter(search.stdout.readline, "")
        first = next(line for line in lines if "epoch 1/" in line)
        os.killpg(search.pid, signal.SIGSTOP)  # it might be done before the server is away
        postgresql_server.stop()
        os.killpg(search.pid, signal.SIGCONT)
        try:
            waits = next(line for line in lines if "the storage does not answer" in line)
        finally:
            postgresql_server.start()
        output = first + waits + "".join(lines)
        assert search.wait(60) == 0, output
    assert "the storage answers again after" in output
    assert "trained      2 of 2 trials" in output and "Traceback" not in output
    now = TrialCounts.of(trials_of(Storage.parse(url), "nas-mnist"))
    assert (now.trained, now.running, now.waiting) == (2, 0, 0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(
        Storage, "parse", staticmethod(lambda text: Storage(text, heartbeat_seconds=1, grace_seconds=4))
    )


def test_server_that_stays_away_is_one_line_and_the_same_command_goes_on(
    postgresql_server, data_dir, impatient, capsys, tmp_path
):
    url = postgresql_server.new_database()
    stop = threading.Thread(target=lambda: (_wait_for_a_report(Storage.parse(url)), postgresql_server.stop()))
    stop.start()
    try:
        assert cli.main(["search", *QUICK, "--storage", url]) == 2
        error = capsys.readouterr().err
    finally:
        stop.join()
        postgresql_server.start()
    assert error.count("\n") == 1 and "cannot be reached" in error and "(--storage)" in error
    assert PASSWORD not in error
    assert cli.main(["search", *QUICK, "--storage", url]) == 0
    now = TrialCounts.of(trials_of(Storage.parse(url), "nas-mnist"))
    assert (now.trained, now.running, now.waiting) == (2, 0, 0)


def _wait_for_a_report(storage):
    def reported():
        with contextlib.suppress(StudyError):
            return any(t.intermediate_values for t in trials_of(storage, "nas-mnist"))

    wait_for(reported)


def test_server_that_is_away_at_the_start_is_one_line(postgresql_server, capsys):
    url = postgresql_server.new_database().replace(f":{postgresql_server.port}/", ":1/")
    assert cli.main(["show", "--storage", url]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be reached" in error and PASSWORD not in error


@contextlib.contextmanager
def shared(storage, on_outage=lambda event: None):
    """One trial to do; the connections are closed in the end, as they are when a worker's process ends."""
    pruner = optuna.pruners.NopPruner()
    mine = SharedStudy(storage, "s", n_may_start=until_trained(1), seed=0, worker=0, pruner=pruner, on_outage=on_outage)
    yield mine
    mine._storage.remove_session()
    mine._storage._backend.engine.dispose()


def test_worker_tells_once_that_it_waits_and_once_that_it_goes_on(postgresql_server, storage):
    told, start = [], threading.Timer(1.5, postgresql_server.start)
    storage = Storage(storage.url)  # as patient as by default

    def note(event):
        told.append(event)
        if isinstance(event, Outage):
            start.start()

    with shared(storage, note) as mine:
        postgresql_server.stop()
        mine.optimize(lambda trial: trial.suggest_float("x", 0, 1))
        start.join()
    assert [type(event) for event in told] == [Outage, OutageEnded]
    assert "refused" in told[0].reason and told[0].patience_seconds == 60 and told[1].seconds > 1
    assert [t.state for t in trials_of(storage)] == [TrialState.COMPLETE]


def test_heartbeat_may_be_answered_before_the_trial_that_waits():
    class Refused(Exception):
        pass

    class Server:
        loaded_dbapi = SimpleNamespace(OperationalError=Refused)
        answers = False

        def connect(self):
            if not self.answers:
                raise Refused("connection refused")
            return "connection"

    def heartbeat():
        server.answers = True
        assert connect(server, None, (), {}) == "connection"

    def note(event):
        told.append(event)
        if isinstance(event, Outage):
            beat.start()
            beat.join()

    told, server, beat = [], Server(), threading.Thread(target=heartbeat)
    connect = _PatientConnect(Storage("postgresql+psycopg://user@host/database"), note)
    assert connect(server, None, (), {}) == "connection"
    assert [type(event) for event in told] == [Outage, OutageEnded] and told[1].seconds >= 0


def test_heartbeat_outlives_an_outage(postgresql_server, storage):
    opened = storage.open()
    postgresql_server.stop()
    try:
        opened.record_heartbeat(0)  # raises nothing
    finally:
        postgresql_server.start()


def test_lock_that_the_server_lost_does_not_pass_for_one_that_was_held(postgresql_server, storage):
    with pytest.raises(STORAGE_ERRORS), storage.lock():
        postgresql_server.restart()


def test_lock_is_held_by_one_connection_at_a_time_and_freed_by_the_death_of_its_holder(storage):
    script = (
        "import sys, time\nfrom nas_mnist.study.storage import Storage\n"
        "with Storage(sys.argv[1]).lock():\n print(1, flush=True)\n time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, storage.url], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        taken = threading.Event()

        def take():
            with storage.lock():
                taken.set()

        taking = threading.Thread(target=take)
        taking.start()
        assert not taken.wait(1)
        process.kill()
        assert taken.wait(10)
        taking.join()


def test_process_numbers_count_on_their_own_host_alone(storage):
    with shared(storage) as mine:
        mine._thread_local.in_optimize_loop = True
        trial = mine.ask()
        _, pid, started = trial.user_attrs[ownership.OWNER]
        trial.set_user_attr(ownership.OWNER, ["elsewhere", pid, started - 1000])
        assert psutil.pid_exists(pid) and recover(mine) == 0
    assert [t.state for t in trials_of(storage)] == [TrialState.RUNNING]
