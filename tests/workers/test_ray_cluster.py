"""A local Ray cluster of several nodes, and PostgreSQL as its storage."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import host
import pytest
from host import wait_for

from nas_mnist.cli import main as cli
from nas_mnist.errors import DeviceError, NasMnistError
from nas_mnist.study import ownership, studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.shared import requeue
from nas_mnist.study.storage import Storage
from nas_mnist.workers.events import Progress, Worker, WorkerDied, WorkerFailed

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from nas_mnist.workers import ray_cluster  # noqa: E402

TESTS = Path(__file__).parents[1]
SMALL = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, where this process is the driver, and two nodes; the second has a GPU on paper."""
    with pytest.MonkeyPatch.context() as patch:
        folders = (TESTS.parent, TESTS, Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))  # for the workers, which Ray starts
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else they wait for the tests beside these
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **SMALL})
        cluster.add_node(num_cpus=2, **SMALL)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def driver(cluster):
    with ray_cluster.connected(cluster.address, Storage("postgresql+psycopg://nobody@127.0.0.1/none")):
        yield cluster


@pytest.fixture
def storage(postgresql_server):
    storage = Storage(postgresql_server.new_database())
    studies.create(storage.open(create=True), "s", metric="m", attributes={})
    return storage


def progress(storage, name="s"):
    now = TrialCounts.of(studies.load(storage.open(), name).get_trials())
    return now.trained, now.running, now.waiting


def all_taken_back(storage, name="s"):
    """As every command does it; the processes of a stopped one may take a moment to end."""
    requeue(storage, name)
    return progress(storage, name)[1] == 0


def collect(work, n_workers=2, on_event=lambda worker, event: None, device="cpu"):
    events = []

    def note(worker, event):
        if worker is not None:
            events.append((worker.index, event))
            on_event(worker, event)

    ray_cluster.run_workers(work, [Worker(i, device) for i in range(n_workers)], note)
    return events


def _count(worker, send):
    for number in range(3):
        send(number)


def test_events_of_every_worker_arrive_in_order(driver):
    events = collect(_count)
    for index in (0, 1):
        assert [event for i, event in events if i == index] == [0, 1, 2]


def _die_once(folder, worker, send):
    mark = folder / str(worker.index)
    if worker.index == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    send("done")


def test_killed_worker_is_started_again_by_ray_and_said_so(driver, tmp_path):
    events = collect(partial(_die_once, tmp_path))
    assert (0, WorkerDied("its process or its node is gone")) in events
    assert sorted(i for i, event in events if event == "done") == [0, 1]


def _die(worker, send):
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(worker, send):
    raise RuntimeError("a bug")


@pytest.mark.parametrize(("work", "reason"), [(_die, "is gone"), (_raise, "RuntimeError: a bug")])
def test_worker_that_keeps_dying_ends_the_run_with_the_reason(driver, work, reason):
    with pytest.raises(WorkerFailed, match=rf"died 4 times in a row(.|\n)*{reason}"):
        collect(work, n_workers=1)


def _bad_input(worker, send):
    raise NasMnistError("rule, value, next step")


def test_error_the_user_caused_is_not_tried_again(driver):
    with pytest.raises(WorkerFailed) as error:
        collect(_bad_input, n_workers=1)
    assert str(error.value) == "rule, value, next step"


def _say_gpu(worker, send):
    time.sleep(3)  # so that they run at the same time
    send((os.getpid(), ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES")))


def test_workers_share_a_gpu(driver):
    node = driver.add_node(num_cpus=2, num_gpus=1, **SMALL)
    try:
        assert [worker.device for worker in ray_cluster.plan_workers(None)] == ["cuda:0"] * 4
        said = [event for _, event in collect(_say_gpu, device="cuda:0")]
    finally:
        driver.remove_node(node)
        wait_for(lambda: "GPU" not in ray.cluster_resources())  # the next test counts them
    assert len({pid for pid, _, _ in said}) == 2
    assert [(gpus, visible) for _, gpus, visible in said] == [([0], "0")] * 2


def test_default_is_one_worker_for_each_core_of_the_cluster(driver):
    assert ray_cluster.plan_workers(None) == [Worker(0, "cpu"), Worker(1, "cpu")]
    with pytest.raises(DeviceError, match="room for 2 workers"):
        ray_cluster.plan_workers(3)


def test_node_that_is_removed_in_the_middle_costs_no_trial_of_the_count(driver, storage, tmp_path):
    node = driver.add_node(num_cpus=1, **SMALL)
    reporting, hold = set(), tmp_path / host.HOLD
    hold.touch()

    def remove():
        pids = [int(path.stem.partition("-")[2]) for path in tmp_path.glob("*.started")]
        try:
            driver.remove_node(node, allow_graceful=False)
            wait_for(lambda: not all(map(ownership._started, pids)))
        finally:
            hold.unlink()

    removing = threading.Thread(target=remove)

    def remove_once(worker, event):
        """Each of three workers has a core, so one of them is on the node."""
        if isinstance(event, Progress) and worker.index not in reporting:
            reporting.add(worker.index)
            if len(reporting) == 3:
                removing.start()

    events = collect(partial(host.work, storage, 12, tmp_path, None), 3, remove_once)
    removing.join()
    assert progress(storage) == (12, 0, 0)
    trials = studies.load(storage.open(), "s").get_trials()
    assert [event for _, event in events if isinstance(event, WorkerDied)]
    failed = [t for t in trials if t.state.name == "FAIL"]
    for trial in failed:
        (again,) = [t for t in trials if t.system_attrs.get("retry_history") == [trial.number]]
        assert again.params == trial.params and again.state.name == "COMPLETE"
    host.assert_each_ran_once(trials, tmp_path)


def test_stop_cancels_every_task_and_queues_their_trials_again(driver, storage, tmp_path):
    reporting, hold = set(), tmp_path / host.HOLD
    hold.touch()

    def stop(worker, event):
        if isinstance(event, Progress) and worker.index not in reporting:
            reporting.add(worker.index)
            if len(reporting) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    work = partial(host.work, storage, 12, tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        collect(work, 2, stop)
    wait_for(lambda: all_taken_back(storage))
    hold.unlink()
    assert progress(storage) == (0, 0, 2)
    collect(work, 2)
    assert progress(storage) == (12, 0, 0)


def test_search_command_runs_on_the_cluster_and_can_be_stopped_and_continued(cluster, postgresql_server, data_dir):
    url = postgresql_server.new_database()
    options = ["--epochs", "2", "--train-images", "300", "--max-params", "400", "--no-warm-start", "--storage", url]
    options += ["--ray", cluster.address]
    command = [sys.executable, "-u", "-m", "nas_mnist", "search", *options, "--trials"]
    with subprocess.Popen([*command, "40"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as search:
        first = next(line for line in iter(search.stdout.readline, "") if line.startswith("1/40"))
        search.send_signal(signal.SIGINT)
        output = first + search.stdout.read()
    assert search.returncode == 130 and "stopped" in output and "Traceback" not in output, output
    wait_for(lambda: all_taken_back(Storage(url), "nas-mnist"))
    n_trials = progress(Storage(url), "nas-mnist")[0] + 2
    done = subprocess.run([*command, str(n_trials)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"trained      {n_trials} of {n_trials} trials" in done.stdout
    assert progress(Storage(url), "nas-mnist") == (n_trials, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray", "auto"], "need a storage that every node reaches"),
        (["--ray", "auto", "--devices", "cpu"], "leave one of them out"),
        (["--ray", "127.0.0.1:1", "--storage", "postgresql+psycopg://u@127.0.0.1:1/x"], "must be a Ray cluster at"),
    ],
)
def test_what_cannot_run_on_ray_is_refused_in_one_line(options, message, data_dir, capsys):
    assert cli.main(["search", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_ray_is_one_line(data_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nas_mnist.workers.ray_cluster", None)
    monkeypatch.delattr("nas_mnist.workers.ray_cluster", raising=False)
    assert cli.main(["search", "--ray", "auto"]) == 2
    assert capsys.readouterr().err == "nas-mnist: Ray is not installed: pip install 'nas-mnist[ray]'\n"
