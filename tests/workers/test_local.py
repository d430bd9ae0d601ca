import os
import signal
import sys
import threading
import time
from functools import partial

import psutil
import pytest

from nas_mnist.errors import DeviceError, NasMnistError
from nas_mnist.workers import local, machine
from nas_mnist.workers.events import Completed, Progress, Worker, WorkerDied, WorkerFailed
from nas_mnist.workers.local import plan_workers, run_workers

TWO = [Worker(0, "cpu"), Worker(1, "cpu")]
HEAVY = {"torch", "optuna", "numba", "nas_mnist.stages.search"}


def collect(work, on_event=None, which=TWO):
    events = []

    def note(worker, event):
        if worker is not None:
            events.append((worker.index, event))
            if on_event:
                on_event(worker, event)

    run_workers(work, which, note)
    return events


def _count(worker, send):
    for number in range(3):
        send(number)


def test_events_of_every_worker_arrive_in_order():
    events = collect(_count)
    for index in (0, 1):
        assert [event for i, event in events if i == index] == [0, 1, 2]


def _die_once(folder, worker, send):
    mark = folder / str(worker.index)
    if worker.index == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    send("done")


def test_killed_worker_is_replaced_and_said_so(tmp_path):
    events = collect(partial(_die_once, tmp_path))
    assert (0, WorkerDied("killed by signal 9")) in events
    assert sorted(i for i, event in events if event == "done") == [0, 1]


def _kill_the_server_once(folder, worker, send):
    if not (folder / "killed").exists():
        (folder / "killed").touch()
        psutil.Process(os.getpid()).parent().kill()
    send("done")


@pytest.mark.skipif(sys.platform == "darwin", reason="on macOS workers are not forked")
def test_server_that_workers_are_forked_from_is_started_again_when_it_is_killed(tmp_path):
    """How the worker ended, nobody knows then: it is replaced, as after any death."""
    events = collect(partial(_kill_the_server_once, tmp_path), which=TWO[:1])
    assert events == [(0, "done"), (0, WorkerDied("exit code 255")), (0, "done")]


def _report_process(worker, send):
    send((psutil.Process(os.getpid()).parent().pid, os.environ.get("OF_THIS_RUN"), sorted(HEAVY & sys.modules.keys())))


@pytest.mark.skipif(sys.platform == "darwin", reason="on macOS workers are not forked")
def test_workers_have_todays_environment_and_a_parent_that_has_imported_what_is_heavy(monkeypatch):
    said = []
    for value in "ab":
        monkeypatch.setenv("OF_THIS_RUN", value)
        said += [event for _, event in collect(_report_process)]
    assert [value for _, value, _ in said] == ["a", "a", "b", "b"]
    assert len({parent for parent, _, _ in said}) == 1 and all(modules == sorted(HEAVY) for _, _, modules in said)


def _raise(worker, send):
    raise RuntimeError("a bug")


def test_worker_that_keeps_dying_ends_the_run_with_the_reason():
    with pytest.raises(WorkerFailed, match=r"died 4 times in a row(.|\n)*RuntimeError: a bug"):
        collect(_raise, which=TWO[:1])


def _raise_after_an_event(worker, send):
    send("started")
    raise RuntimeError("a bug")


def test_event_that_is_no_progress_does_not_keep_a_dying_worker_going():
    with pytest.raises(WorkerFailed, match="died 4 times in a row"):
        collect(_raise_after_an_event, which=TWO[:1])


def _die_after_progress(folder, worker, send):
    send(Progress())
    marks = len(list(folder.iterdir()))
    if marks < 6:
        (folder / str(marks)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_worker_that_gets_on_is_replaced_as_often_as_it_is_killed(tmp_path):
    events = collect(partial(_die_after_progress, tmp_path), which=TWO[:1])
    assert sum(isinstance(event, WorkerDied) for _, event in events) == 6


def _raise_after(event, worker, send):
    send(event)
    raise MemoryError


def test_exception_after_the_first_epoch_of_every_trial_ends_the_run():
    with pytest.raises(WorkerFailed, match="died 4 times in a row"):
        collect(partial(_raise_after, Progress()), which=TWO[:1])


def _raise_after_a_trial(folder, worker, send):
    marks = len(list(folder.iterdir()))
    if marks < 5:
        (folder / str(marks)).touch()
        _raise_after(Completed(), worker, send)


def test_worker_that_completes_trials_is_replaced_as_often_as_it_raises(tmp_path):
    events = collect(partial(_raise_after_a_trial, tmp_path), which=TWO[:1])
    assert sum(isinstance(event, WorkerDied) for _, event in events) == 5


def _bad_input(worker, send):
    raise NasMnistError("rule, value, next step")


def test_error_the_user_caused_is_not_tried_again():
    with pytest.raises(WorkerFailed) as error:
        collect(_bad_input, which=TWO[:1])
    assert str(error.value) == "rule, value, next step"


def _sleep(worker, send):
    send(os.getpid())
    time.sleep(60)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stop_ends_every_worker_at_once(stop):
    pids, stopped = [], []

    def interrupt(worker, pid):
        pids.append(pid)
        if len(pids) == 2:
            stopped.append(time.monotonic())
            os.kill(os.getpid(), stop)

    with pytest.raises(KeyboardInterrupt):
        collect(_sleep, interrupt)
    assert time.monotonic() - stopped[0] < 20  # they would sleep for a minute
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_stop_while_workers_start_ends_those_that_have(monkeypatch):
    """It reaches this process while the second worker is started, and is put off until that has."""
    started, start = [], local._start

    def interrupted(running, *arguments, **named):
        if started:
            os.kill(os.getpid(), signal.SIGINT)
        started.append(running)
        start(running, *arguments, **named)

    monkeypatch.setattr(local, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(_sleep)
    assert len(started) == 1 and [p.process.is_alive() for p in started[0]] == [False]


def _parent(connection):
    run_workers(_sleep, TWO, lambda worker, event: connection.send(event) if worker else None)


def test_workers_end_when_their_parent_is_killed():
    context = local.multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    parent = context.Process(target=_parent, args=(sending,))
    parent.start()
    processes = [psutil.Process(receiving.recv()) for _ in TWO]
    parent.kill()
    _, alive = psutil.wait_procs(processes, timeout=10)
    parent.join()
    assert not alive


def test_runs_outside_the_main_thread_too():
    events = []
    thread = threading.Thread(target=lambda: events.extend(collect(_count, which=TWO[:1])))
    thread.start()
    thread.join()
    assert len(events) == 3


def test_default_is_one_worker_for_each_core_where_there_is_memory_for_them(monkeypatch):
    said = []
    monkeypatch.setattr(machine, "n_cores", lambda: 6)
    monkeypatch.setattr(machine, "free_bytes", lambda: 64 * 10**9)
    assert plan_workers(None, ["cpu"], said.append) == [Worker(i, "cpu") for i in range(6)] and not said
    monkeypatch.setattr(machine, "free_bytes", lambda: 1_300_000_000)
    assert plan_workers(None, ["cpu"], said.append) == TWO
    assert said == ["2 of 6 workers: there are 1.3 GB of memory for them, and each takes 0.4"]
    assert len(plan_workers(4, ["cpu"], said.append)) == 4 and len(said) == 1  # who says how many has them
    monkeypatch.setattr(machine, "free_bytes", lambda: 100)
    assert len(plan_workers(None, ["cpu"])) == 1


def test_workers_are_spread_over_the_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [w.device for w in plan_workers(5, None)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert [w.device for w in plan_workers(2, ["cpu", "cuda:1"])] == ["cpu", "cuda:1"]


@pytest.mark.parametrize(("n", "devices"), [(None, ["cuda:7"]), (None, ["tpu"]), (0, None), (10_000, None)])
def test_what_is_not_there_is_refused(n, devices):
    with pytest.raises(DeviceError, match=r"name one of them|choose 1 to"):
        plan_workers(n, devices)
