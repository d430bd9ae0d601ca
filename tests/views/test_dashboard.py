import contextlib
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import optuna
import pytest
from optuna_dashboard import save_note
from synthetic import new_study

from nas_mnist.data.folds import search_split
from nas_mnist.data.images import load_train
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.stages import search
from nas_mnist.stages.search import SearchSettings
from nas_mnist.study import studies
from nas_mnist.study.artifacts import MISTAKES, WEIGHTS, Artifacts
from nas_mnist.study.storage import Storage
from nas_mnist.training.evaluation import evaluate, find_mistakes
from nas_mnist.views import dashboard
from nas_mnist.workers.events import Worker

CANONICAL = Path(__file__).parents[2] / "studies" / "canonical"
PICTURES = {dashboard.CURVES, dashboard.PICTURE, dashboard.DRAWING, WEIGHTS, MISTAKES}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, data_dir):
    """Three of the reference systems, trained a little, the weights of the best kept."""
    storage = Storage.parse(str(tmp_path_factory.mktemp("searched") / "s.db"))
    settings = SearchSettings(storage, n_trials=3, epochs=1, train_images=2000, data_dir=data_dir, keep_weights=1)
    search.search(settings, [Worker(0, "cpu")], lambda worker, event: None)
    dashboard.publish(storage, settings.study_name, data_dir)
    return settings


@pytest.fixture
def running(searched, unused_port):
    """The process, and where it listens."""
    command = ["dashboard", "--port", str(unused_port), "--storage", str(searched.storage)]
    with subprocess.Popen(
        [sys.executable, "-m", "nas_mnist", *command, "--data-dir", str(searched.data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert f"http://127.0.0.1:{unused_port}/" in process.stdout.readline()
            url = f"http://127.0.0.1:{unused_port}"
            fetch(f"{url}/api/studies")
            yield process, url
        finally:
            process.terminate()


@pytest.fixture
def server(running):
    return running[1]


def test_it_ends_in_the_middle_of_a_request(running):
    process, url = running
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        head = "POST /api/studies HTTP/1.1", "Host: here", "Content-Type: application/json", "Content-Length: 99"
        connection.sendall("\r\n".join((*head, "", "{")).encode())  # it waits for the rest
        time.sleep(1)
        process.terminate()
        assert process.wait(timeout=30) == 130


def fetch(url):
    """The answer's text, from a server that may still be starting."""
    for _ in range(600):
        try:
            with urlopen(url) as response:
                return response.read().decode()
        except URLError:
            time.sleep(0.1)
    raise TimeoutError(url)


def files_by_trial(settings):
    study = studies.load(settings.storage.open(), settings.study_name)
    artifacts = Artifacts(study, settings.storage.artifacts)
    return {trial.number: artifacts.of(trial) for trial in study.get_trials() if "architecture" in trial.user_attrs}


def test_best_keep_weights_and_pictures_and_every_trial_its_drawing(searched):
    files = files_by_trial(searched)
    best = studies.load(searched.storage.open(), searched.study_name).best_trial.number
    assert files[best].keys() == PICTURES
    assert all(names.keys() == {dashboard.DRAWING} for number, names in files.items() if number != best)
    on_disk = {path.name for path in searched.storage.artifacts.iterdir()}
    assert on_disk == {artifact_id for names in files.values() for artifact_id in names.values()}


def test_mistakes_of_the_best_are_those_of_its_weights(searched):
    study = studies.load(searched.storage.open(), searched.study_name)
    best, artifacts = study.best_trial, Artifacts(study, searched.storage.artifacts)
    network = build(parse(best.user_attrs["architecture"]), seed=0)
    network.load_state_dict(artifacts.weights_of(best))
    images = search_split(load_train(searched.data_dir)).val
    mistakes = artifacts.mistakes_of(best)
    assert mistakes == find_mistakes(network, images)
    assert 1 - len(mistakes) / len(images) == pytest.approx(evaluate(network, images)[1])
    assert all(images.labels[i] == label != prediction for i, label, prediction in mistakes)
    assert {i for i, _, _ in mistakes} <= set(images.indices.tolist())


def test_publishing_again_changes_nothing(searched):
    before = files_by_trial(searched)
    dashboard.publish(searched.storage, searched.study_name, searched.data_dir)
    assert files_by_trial(searched) == before


def test_leaderboard_note_and_pictures_appear_in_a_browser(searched, server, page, screenshots):
    best = studies.load(searched.storage.open(), searched.study_name).best_trial
    page.goto(f"{server}/dashboard/studies/1/note")
    page.get_by_role("heading", name="Leaderboard").wait_for()
    page.get_by_role("cell", name=f"{best.value:.2%}").wait_for()
    page.screenshot(path=screenshots / "dashboard-study-note.png")
    page.goto(f"{server}/dashboard/studies/1/trials?numbers={best.number}")
    drawing = page.locator(f"img[alt='{best.user_attrs['architecture'].partition(' |')[0]}']")
    is_loaded = "image => image.complete && image.naturalWidth > 300"
    page.wait_for_function(is_loaded, arg=drawing.element_handle())
    page.get_by_text("multiply-adds for an image").wait_for()
    curves = page.locator("img[src^='/artifacts/']").nth(1)
    curves.scroll_into_view_if_needed()
    page.wait_for_function(is_loaded, arg=curves.element_handle())
    page.set_viewport_size({"width": 1600, "height": 1900})
    page.screenshot(path=screenshots / "dashboard-trial.png")
    assert page.complaints == []


def test_reader_never_breaks_a_search_that_runs(searched, server):
    """The dashboard is polled as fast as it answers while two workers report to the same SQLite file."""
    settings, answers, stop = searched, [], threading.Event()

    def poll():
        while not stop.is_set():
            answers.append(fetch(f"{server}/api/studies/1?after=0"))

    client = threading.Thread(target=poll)
    client.start()
    try:
        while len(answers) <= 20 and client.is_alive():  # once, unless the answers come slowly
            settings = replace(settings, n_trials=settings.n_trials + 4)
            summary = search.search(settings, [Worker(0, "cpu"), Worker(1, "cpu")], lambda worker, event: None)
    finally:
        stop.set()
        client.join()
    assert summary.counts.trained == settings.n_trials and summary.counts.running == summary.counts.failed == 0
    assert len(answers) > 20 and all('"trials"' in answer for answer in answers)
    assert all(trial.state != optuna.trial.TrialState.RUNNING for trial in summary.best)


def test_drawing_that_is_missing_is_drawn_again_and_its_entry_stays(searched, tmp_path):
    """As where a database was copied without the folder beside it."""
    dashboard.publish(searched.storage, searched.study_name, searched.data_dir)
    copy = Storage.parse(str(tmp_path / "s.db"))
    with (
        contextlib.closing(sqlite3.connect(searched.storage.path)) as source,
        contextlib.closing(sqlite3.connect(copy.path)) as target,
    ):
        source.backup(target)
    settings = replace(searched, storage=copy)
    entries, before = files_by_trial(settings), kept_for_the_dashboard(settings)
    dashboard.publish(copy, searched.study_name, searched.data_dir)
    assert files_by_trial(settings) == entries and kept_for_the_dashboard(settings) == before
    for names in entries.values():
        assert "<svg" in (copy.artifacts / names[dashboard.DRAWING]).read_text()
        assert dashboard.CURVES not in names or (copy.artifacts / names[dashboard.CURVES]).read_bytes()[1:4] == b"PNG"


def kept_for_the_dashboard(settings):
    """The names of notes and entries of files."""
    attributes = study_attributes(settings.storage.open(), settings.study_name)
    return {key for key in attributes if "artifacts" in key or "note" in key}


def study_attributes(storage, name):
    return storage.get_study_system_attrs(storage.get_study_id_from_name(name))


@pytest.fixture
def served(monkeypatch):
    """What the server is given: the attributes of every study, looked at while it would run."""
    seen = []

    def run_server(storage, **options):
        seen.append({name: study_attributes(storage, name) for name in studies.names(storage)})

    monkeypatch.setattr("optuna_dashboard.run_server", run_server)
    return seen


def test_studies_of_others_in_the_same_database_are_served_and_stay_as_they_are(
    tmp_path, data_dir, served, unused_port
):
    path = tmp_path / "s.db"
    new_study(name="ours", path=path)
    storage = Storage.parse(str(path))
    opened = storage.open()
    theirs = optuna.create_study(study_name="theirs", storage=opened, directions=["minimize", "maximize"])
    theirs.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
    save_note(theirs, "my note")
    before = study_attributes(opened, "theirs")
    dashboard.serve(storage, "127.0.0.1", unused_port, data_dir)
    assert served[0].keys() == {"ours", "theirs"}
    assert served[0]["theirs"] == study_attributes(opened, "theirs") == before
    assert any("note" in key for key in served[0]["ours"])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_tracked_database_is_shown_in_a_copy_and_stays_byte_for_byte_as_it_is(
    tmp_path, data_dir, served, unused_port, capsys
):
    """The committed study lists the drawings of 340 trials, whose files are not committed."""
    path = Path(shutil.copy(CANONICAL / "canonical.db", tmp_path))
    for arguments in (["init"], ["add", path.name]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    before = path.read_bytes()
    dashboard.serve(Storage.parse(str(path)), "127.0.0.1", unused_port, data_dir)
    assert {"canonical", "soap", "soap-confirm"} <= served[0].keys()
    assert "git tracks it" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {".git", path.name}
