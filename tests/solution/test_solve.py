"""The whole way in one command, and that it goes on at any stage."""

import json
from pathlib import Path

import pytest

from nas_mnist.cli import main as cli
from nas_mnist.stages import retrain

TINY = ["solve", "--trials", "1", "--epochs", "1", "--train-images", "300", "--max-params", "400", "--top", "1"]
TINY += ["--folds", "2", "--seeds", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def solved(tmp_path_factory, data_dir):
    """A folder in which the command was stopped in its third stage and then given again, and what it printed."""
    folder, told = tmp_path_factory.mktemp("solved"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NAS_MNIST_DATA", str(data_dir))
        for stopped in (True, False):
            with pytest.MonkeyPatch.context() as stop:
                if stopped:
                    stop.setattr(retrain, "run_planned", _stopped)
                told.append(_run())
    return folder, told


def _stopped(*_, **__):
    raise KeyboardInterrupt


def _run(*more):
    """Exit code and lines of the command, run in this process with its output in a file."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*TINY, *more])
    return code, out.getvalue(), err.getvalue()


def test_command_that_was_stopped_says_its_stage_and_how_to_go_on(solved):
    _, ((code, out, err), _) = solved
    assert code == 130 and "nas-mnist solve" in err
    assert [f"stage {n} of 4" in out for n in (1, 2, 3, 4)] == [True, True, True, False]


def test_same_command_does_what_is_left_and_ends_with_the_verdict(solved):
    folder, (_, (code, out, err)) = solved
    assert (code, err) == (0, "")
    assert "trial 0:" not in out and "fold 1" not in out, "neither searched nor confirmed again"
    assert "fewer than 8,000" in out and "99.40% in each of the last two epochs" in out
    record = json.loads((folder / "solution" / "solution.json").read_text())
    assert record["n_parameters"] < 400 and len(record["runs"]) == 2


def test_all_done_is_not_done_again_and_a_verdict_of_no_is_exit_code_1_if_asked(solved, monkeypatch, data_dir):
    monkeypatch.chdir(solved[0])
    monkeypatch.setenv("NAS_MNIST_DATA", str(data_dir))
    before = {path: path.stat().st_mtime_ns for path in Path("solution").rglob("*")}
    code, out, _ = _run("--check")
    assert code == 1 and "seed 0:" not in out
    assert {path: path.stat().st_mtime_ns for path in Path("solution").rglob("*")} == before


def test_a_folder_that_is_not_whole_is_exported_again(solved, monkeypatch, data_dir):
    monkeypatch.chdir(solved[0])
    monkeypatch.setenv("NAS_MNIST_DATA", str(data_dir))
    weights = Path("solution", "weights.safetensors").read_bytes()
    Path("solution", "weights.safetensors").unlink()
    assert _run()[0] == 0
    assert Path("solution", "weights.safetensors").read_bytes() == weights


def test_folder_in_the_way_is_refused_before_anything_is_trained(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    Path("solution").mkdir()
    Path("solution", "letter.txt").write_text("mine")
    code, out, err = _run()
    assert code == 2 and err.count("\n") == 1 and "solution" in err and "trial" not in out
    assert Path("solution", "letter.txt").read_text() == "mine" and not Path("studies").exists()
