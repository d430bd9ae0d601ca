"""A database that may be read and not written, and one that is only looked at."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import draw_trials, new_study

from nas_mnist.cli.main import main
from nas_mnist.study import storage as storage_module
from nas_mnist.study import studies
from nas_mnist.study.storage import Storage

LOOK = (["show", "--json"], ["report"], ["describe", "--trial", "0"])


@pytest.fixture
def database(tmp_path):
    """A finished search; its last connection is closed, so that its log is gone."""
    path = tmp_path / "database" / "s.db"
    path.parent.mkdir()
    storage = new_study(draw_trials(8), path=path)._storage._backend
    storage.remove_session()
    storage.engine.dispose()
    path.with_name("s.db.lock").unlink()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return path


def look(command, path, out):
    """The command on this database; a report is written elsewhere."""
    return main([*command, "--storage", str(path), *(["--out", str(out)] if command == ["report"] else [])])


@pytest.mark.parametrize("command", LOOK, ids=lambda command: command[0])
def test_who_only_looks_leaves_the_file_as_it_is_and_nothing_beside_it(database, tmp_path, command):
    """Whatever its journal: a database that another program made is not in write-ahead mode."""
    plain = database.with_name("plain.db")
    with storage_module.sqlite3.connect(database) as connection:
        connection.execute("VACUUM INTO ?", [str(plain)])
    connection.close()
    for path in (database, plain):
        before = path.read_bytes()
        assert look(command, path, tmp_path / f"report-{path.stem}") == 0
        assert path.read_bytes() == before
    assert {entry.name for entry in database.parent.iterdir()} == {database.name, plain.name}


@pytest.mark.parametrize("command", LOOK, ids=lambda command: command[0])
def test_database_that_cannot_be_written_can_be_looked_at(database, tmp_path, command, monkeypatch):
    monkeypatch.setattr(storage_module, "is_writable", lambda path: False)
    assert look(command, database, tmp_path / "report") == 0
    assert [entry.name for entry in database.parent.iterdir()] == [database.name]


def test_search_that_still_writes_is_seen_by_who_may_only_read(database, monkeypatch):
    """Its last trials are in the write-ahead log."""
    searching = studies.load(Storage.parse(str(database)).open(), "nas-mnist")
    n_trials = len(searching.trials)
    searching.enqueue_trial({})
    monkeypatch.setattr(storage_module, "is_writable", lambda path: False)
    reading = Storage(Storage.parse(str(database)).url, read_only=True)
    assert len(studies.load(reading.open(), "nas-mnist").trials) == n_trials + 1


def test_nothing_can_be_written_through_a_storage_that_is_read_only(database):
    opened = Storage(Storage.parse(str(database)).url, read_only=True).open()
    with pytest.raises(storage_module.STORAGE_ERRORS):
        studies.load(opened, "nas-mnist").set_user_attr("a", 1)


def test_search_of_a_database_that_cannot_be_written_is_one_line(database, monkeypatch, capsys):
    monkeypatch.setattr(storage_module, "is_writable", lambda path: False)
    assert main(["search", "--trials", "1", "--workers", "1", "--storage", str(database)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must be writable" in line and str(database) in line


def as_one_who_may_not_write() -> list[str]:
    """What to put before a command so that permissions hold for it: root passes them by."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root passes all permissions by, and there is no setpriv to take that away")
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]


def test_file_in_a_folder_without_permission_to_write_is_shown_and_not_searched(database):
    database.chmod(0o444)
    database.parent.chmod(0o555)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    prefix = [*as_one_who_may_not_write(), sys.executable, "-m", "nas_mnist"]
    try:
        shown, searched = (
            subprocess.run([*prefix, *command, "--storage", database], capture_output=True, text=True, env=environment)
            for command in (["show", "--json"], ["search", "--trials", "1", "--workers", "1"])
        )
    finally:
        database.parent.chmod(0o755)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)
    assert searched.returncode == 2 and "must be writable" in searched.stderr
    assert [entry.name for entry in database.parent.iterdir()] == [database.name]
