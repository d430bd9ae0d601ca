import os
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic import new_study

from nas_mnist.study import studies
from nas_mnist.study.artifacts import Artifacts
from nas_mnist.study.snapshot import copied, reason_to_copy
from nas_mnist.study.storage import Storage

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def storage(tmp_path):
    new_study(path=tmp_path / "s.db")
    return Storage.parse(str(tmp_path / "s.db"))


def test_database_of_a_search_may_be_changed(storage):
    assert reason_to_copy(storage) is None


@needs_git
def test_database_that_git_tracks_stays_as_it_is_and_one_beside_it_does_not(storage, tmp_path):
    git(tmp_path, "init")
    assert reason_to_copy(storage) is None
    git(tmp_path, "add", "s.db")
    assert reason_to_copy(storage) == "git tracks it"
    new_study(path=tmp_path / "other.db")
    assert reason_to_copy(Storage.parse(str(tmp_path / "other.db"))) is None


def test_database_that_cannot_be_written_stays_as_it_is(storage, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert reason_to_copy(storage) == "it cannot be written"


def test_copy_holds_what_is_not_yet_in_the_file_and_nothing_that_is_added_comes_back(storage):
    """A search that runs keeps its last trials in the write-ahead log."""
    original = studies.load(storage.open(), "nas-mnist")
    original.enqueue_trial({})
    artifact_id = Artifacts(original, storage.artifacts).add(original.trials[0], "a.txt", b"a")
    with copied(storage) as copy:
        study = studies.load(copy.open(), "nas-mnist")
        artifacts = Artifacts(study, copy.artifacts)
        assert len(study.trials) == 1 and artifacts.read(artifact_id) == b"a"
        artifacts.add(study.trials[0], "b.txt", b"b")
        artifacts.remove(study.trials[0], artifact_id)
        study.enqueue_trial({})
    assert not copy.path.parent.exists()
    assert len(studies.load(storage.open(), "nas-mnist").trials) == 1
    assert [path.name for path in storage.artifacts.iterdir()] == [artifact_id]
