import contextlib
import os
import sqlite3
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from nas_mnist.data.datasets import DATASETS, MNIST
from nas_mnist.errors import StudyError
from nas_mnist.study import ownership, studies
from nas_mnist.study.records import CONSTRAINT, TrialCounts
from nas_mnist.study.shared import SharedStudy, recover, until_trained
from nas_mnist.study.storage import Storage


@pytest.fixture
def storage(tmp_path):
    storage = Storage.parse(str(tmp_path / "s.db"))
    studies.create(storage.open(create=True), "s", metric="m", attributes={"identity": {"max_params": 8000}})
    return storage


def shared(storage, demand, worker=0):
    return SharedStudy(storage, "s", n_may_start=demand, seed=0, worker=worker, pruner=optuna.pruners.NopPruner())


def states(storage):
    return [trial.state for trial in studies.load(storage.open(), "s").get_trials()]


def draw(trial):
    return trial.suggest_float("x", 0, 1)


def test_exactly_the_asked_number_is_trained_and_over_budget_draws_do_not_count(storage):
    def objective(trial):
        x = draw(trial)
        trial.set_constraint(CONSTRAINT, 1 if trial.number % 2 else -1)
        if trial.number % 2:
            raise optuna.TrialPruned
        return x

    shared(storage, until_trained(4)).optimize(objective)
    trials = studies.load(storage.open(), "s").get_trials()
    now = TrialCounts.of(trials)
    assert (now.trained, now.over_budget, now.running, now.failed) == (4, 3, 0, 0)
    shared(storage, until_trained(4)).optimize(objective)
    assert len(studies.load(storage.open(), "s").get_trials()) == len(trials)
    shared(storage, until_trained(5)).optimize(objective)
    assert TrialCounts.of(studies.load(storage.open(), "s").get_trials()).trained == 5


def test_pruned_early_counts_as_trained(storage):
    def objective(trial):
        trial.report(draw(trial), 1)
        raise optuna.TrialPruned

    shared(storage, until_trained(2)).optimize(objective)
    now = TrialCounts.of(studies.load(storage.open(), "s").get_trials())
    assert (now.trained, now.pruned) == (2, 2)


def test_queue_is_worked_off_and_nothing_more(storage):
    queue = studies.load(storage.open(), "s")
    for x in (0.1, 0.2, 0.3):
        queue.enqueue_trial({"x": x})
    shared(storage, lambda now: now.waiting).optimize(draw)
    assert [t.params["x"] for t in studies.load(storage.open(), "s").get_trials()] == [0.1, 0.2, 0.3]


_CRASHING = """
import os, sys
import optuna
from nas_mnist.study.records import CONSTRAINT
from nas_mnist.study.shared import SharedStudy, until_trained
from nas_mnist.study.storage import Storage
storage = Storage.parse(sys.argv[1])
def objective(trial):
    trial.suggest_float("x", 0, 1)
    trial.set_constraint(CONSTRAINT, -1)
    os.kill(os.getpid(), 9)
shared = SharedStudy(storage, "s", n_may_start=until_trained(1), seed=0, worker=0,
                           pruner=optuna.pruners.NopPruner())
shared.optimize(objective)
"""


def crash(storage):
    subprocess.run([sys.executable, "-c", _CRASHING, str(storage.path)], check=False, env={**os.environ})


def test_candidate_of_a_killed_process_is_tried_again_twice_and_then_no_more(storage):
    for crashes, expected in enumerate(
        (
            [TrialState.RUNNING],
            [TrialState.FAIL, TrialState.RUNNING],
            [TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING],
        ),
        start=1,
    ):
        crash(storage)
        assert states(storage) == expected, crashes
    shared(storage, until_trained(1)).optimize(draw)
    trials = studies.load(storage.open(), "s").get_trials()
    assert [t.state for t in trials] == [TrialState.FAIL] * 3 + [TrialState.COMPLETE]
    assert len({t.params["x"] for t in trials[:3]}) == 1 and trials[3].params["x"] != trials[0].params["x"]


def test_retried_candidate_is_the_same_with_its_constraint(storage):
    crash(storage)
    shared(storage, until_trained(1)).optimize(draw)
    failed, again = studies.load(storage.open(), "s").get_trials()
    assert failed.params == again.params and again.constraints == {CONSTRAINT: -1}
    assert again.state == TrialState.COMPLETE


def test_trial_of_a_process_that_lives_is_left_alone(storage):
    mine = shared(storage, until_trained(1))
    with contextlib.suppress(Warning):
        mine._thread_local.in_optimize_loop = True
        mine.ask()
    assert recover(mine) == 0
    assert states(storage) == [TrialState.RUNNING]


def test_trial_of_a_process_whose_number_was_given_to_another_is_taken_back(storage):
    mine = shared(storage, until_trained(1))
    mine._thread_local.in_optimize_loop = True
    trial = mine.ask()
    host, pid, started = trial.user_attrs[ownership.OWNER]
    assert pid == os.getpid() and ownership._started(pid) == started
    trial.set_user_attr(ownership.OWNER, [host, pid, started - 1000])
    assert recover(mine) == 1
    assert states(storage) == [TrialState.FAIL, TrialState.WAITING]


_WORKING = """
import sys, time
from pathlib import Path
import optuna
from nas_mnist.study.shared import SharedStudy, until_trained
from nas_mnist.study.storage import Storage
storage = Storage.parse(sys.argv[1])
shared = SharedStudy(storage, "s", n_may_start=until_trained(12), seed=0, worker=int(sys.argv[2]),
                           pruner=optuna.pruners.NopPruner())
def objective(trial):
    (storage.path.parent / f"{sys.argv[2]}.begun").touch()
    end = time.monotonic() + 120  # until each process has a trial: one that starts late might find none left
    while len(list(storage.path.parent.glob("*.begun"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    return trial.suggest_float("x", 0, 1)
shared.optimize(objective)
"""


def test_processes_together_train_exactly_the_asked_number_and_each_queued_trial_once(storage):
    queue = studies.load(storage.open(), "s")
    for i in range(6):
        queue.enqueue_trial({"x": i / 10})
    processes = [subprocess.Popen([sys.executable, "-c", _WORKING, str(storage.path), str(i)]) for i in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    trials = studies.load(storage.open(), "s").get_trials()
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 12
    assert sorted(t.params["x"] for t in trials)[:1] == [0.0]
    assert len({t.params["x"] for t in trials}) == 12
    assert len({t.user_attrs[ownership.OWNER][1] for t in trials}) == 3


def test_workers_and_resumed_runs_draw_different_candidates(storage):
    draws = []
    for worker in (0, 1):
        shared(storage, until_trained(worker + 1), worker).optimize(lambda t: draws.append(draw(t)) or 0.0)
    shared(storage, until_trained(3), 0).optimize(lambda t: draws.append(draw(t)) or 0.0)
    assert len(set(draws)) == 3


def test_study_of_another_identity_is_refused_with_both_values(storage):
    with pytest.raises(StudyError, match=r"max_params 8000, not 1000.*another study"):
        studies.create(storage.open(), "s", metric="m", attributes={"identity": {"max_params": 1000}})


def test_missing_study_lists_those_there_are(storage):
    with pytest.raises(StudyError, match=r"no study 'x'.*there: s"):
        studies.load(storage.open(), "x")


def test_dataset_is_that_of_the_study_and_the_one_asked_for_can_only_repeat_it(tmp_path):
    storage, kmnist = Storage.parse(str(tmp_path / "s.db")), DATASETS["kmnist"]
    assert studies.dataset_of(storage, "mine") == MNIST and studies.dataset_of(storage, "mine", kmnist) == kmnist
    assert not storage.path.exists()
    studies.create(storage.open(create=True), "mine", metric="m", attributes={"identity": {"dataset": "kmnist"}})
    assert studies.dataset_of(storage, "mine") == studies.dataset_of(storage, "mine", kmnist) == kmnist
    with pytest.raises(StudyError, match="'mine' was made with dataset 'kmnist', not 'mnist'"):
        studies.dataset_of(storage, "mine", MNIST)


def test_missing_database_is_not_made(tmp_path):
    with pytest.raises(StudyError, match="nas-mnist search"):
        Storage.parse(str(tmp_path / "none.db")).open()
    assert list(tmp_path.iterdir()) == []


def _text(path):
    path.write_text("no database at all, but long enough to have a header to read")


def _other_program(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


def _cut_short(path):
    studies.create(Storage.parse(str(path)).open(create=True), "s", metric="m", attributes={})
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("make", [_text, _other_program, _cut_short])
@pytest.mark.parametrize("create", [False, True])
def test_file_that_is_no_optuna_database_is_refused_and_not_changed(tmp_path, make, create):
    path = tmp_path / "other.db"
    make(path)
    for leftover in tmp_path.glob("other.db-*"):
        leftover.unlink()
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"must be .*database.*name another") as error:
        Storage.parse(str(path)).open(create=create)
    assert path.read_bytes() == before and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["postgresql+nodriver://u:secret@localhost/x", "postgresql+pg8000://u:secret@localhost/x"]
)
def test_driver_that_is_not_installed_is_named_without_the_password(url):
    with pytest.raises(StudyError, match="not installed") as error:
        Storage.parse(url).open()
    assert "secret" not in str(error.value)


def test_password_is_hidden():
    storage = Storage.parse("postgresql+psycopg://u:secret@localhost/x")
    assert "secret" not in f"{storage} {storage!r}" and "localhost" in str(storage)


@pytest.mark.parametrize(
    "text", ["://", "", "sqlite://", "sqlite:///:memory:", "postgresql://host:port/x", "mysql://u@h/x"]
)
def test_storage_that_names_no_database_is_refused(text):
    with pytest.raises(StudyError, match="SQLAlchemy URL"):
        Storage.parse(text)


def test_sqlite_writes_ahead_and_waits_for_other_programs(storage):
    opened = storage.open()
    with opened.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_lock_is_held_by_one_at_a_time(storage):
    script = (
        "import sys, time\nfrom nas_mnist.study.storage import Storage\n"
        "with Storage.parse(sys.argv[1]).lock():\n print(1, flush=True)\n time.sleep(1)\n open(sys.argv[2], 'w')"
    )
    mark = storage.path.with_name("done")
    with subprocess.Popen([sys.executable, "-c", script, storage.path, mark], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with storage.lock():
            assert mark.exists()


def test_progress_counts_each_state_once():
    trials = [
        optuna.trial.create_trial(state=TrialState.COMPLETE, value=1.0),
        optuna.trial.create_trial(state=TrialState.PRUNED),
        optuna.trial.create_trial(state=TrialState.PRUNED, constraints={CONSTRAINT: 5.0}),
        optuna.trial.create_trial(state=TrialState.FAIL),
    ]
    assert TrialCounts.of(trials) == TrialCounts(trained=2, pruned=1, running=0, waiting=0, over_budget=1, failed=1)
