import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from nas_mnist.data.images import load_test
from nas_mnist.data.unpacking import _ARRAYS
from nas_mnist.errors import BudgetError, SolutionError
from nas_mnist.model.architecture import parse
from nas_mnist.solution import export
from nas_mnist.solution.export import Source
from nas_mnist.solution.predict import accuracy_on_test_set

SOURCE = Source("studies/x.db", "nas-mnist", 100)
FILES = ["README.md", "demo.html", "model.onnx", "model.py", "model_int8.onnx", "weights.safetensors"]
FIGURES = ["augmented", "confusion", "curves", "misclassified", "samples"]


def test_folder_is_whole_and_says_what_it_is(solution, retrained):
    there = sorted(path.relative_to(solution).as_posix() for path in solution.rglob("*") if path.is_file())
    assert there == sorted([*FILES, "solution.json", *(f"figures/{name}.png" for name in FIGURES)])
    record = json.loads((solution / "solution.json").read_text())
    assert record["architecture"] == str(retrained.candidate.architecture)
    assert record["n_parameters"] == retrained.candidate.architecture.n_parameters
    assert record["test_accuracy"] == pytest.approx(retrained.runs[0].accuracy)
    assert record["task_fulfilled"] is False and len(record["runs"][0]["epochs"]) == 3
    assert set(record["data_md5"]) == set(_ARRAYS)
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((solution / name).read_bytes()).hexdigest() == digest
    assert list(solution.parent.iterdir()) == [solution]


def test_int8_accuracy_is_recorded_told_and_reproduced(solution, data_dir):
    record = json.loads((solution / "solution.json").read_text())
    assert accuracy_on_test_set(solution, data_dir, int8=True) == record["int8"]["test_accuracy"]
    assert abs(record["int8"]["test_accuracy"] - record["test_accuracy"]) < 0.01
    assert f"{record['int8']['test_accuracy']:.2%} of the test set" in (solution / "README.md").read_text()


def test_solution_evaluates_to_what_retraining_saw(solution, retrained, data_dir):
    assert accuracy_on_test_set(solution, data_dir) == retrained.runs[0].accuracy


_ONLY_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"nas_mnist", "PIL", "safetensors", "torchvision", "onnx", "matplotlib", "optuna"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import model
sys.exit(model.main(sys.argv[2:]))
"""


def run_model(solution, *arguments):
    command = [sys.executable, "-B", "-c", _ONLY_TORCH, str(solution), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_module_needs_torch_alone(solution, retrained, images, tmp_path):
    counted = run_model(solution)
    assert counted.stdout == f"{retrained.candidate.architecture.n_parameters:,} parameters\n" and not counted.stderr
    pictures = []
    for mode in ("L", "RGB", "RGBA", "LA"):
        pictures.append(tmp_path / f"{mode}.png")
        Image.fromarray(255 - images.pixels[5].numpy()).resize((90, 90)).convert(mode).save(pictures[-1])
    (tmp_path / "text.png").write_text("no picture")
    done = run_model(solution, *pictures, tmp_path / "text.png", tmp_path / "none.png")
    digits = {line.split(": ")[1].split()[0] for line in done.stdout.splitlines()}
    assert len(done.stdout.splitlines()) == 4 and len(digits) == 1
    assert done.stderr.count("\n") == 2 and "Traceback" not in done.stderr and done.returncode == 2


def test_module_with_pillow_starts_no_program_and_goes_on_after_a_bad_picture(solution, images, tmp_path, monkeypatch):
    tools, started = tmp_path / "bin", tmp_path / "started"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tools / "gs").chmod(0o755)
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    scan = (255 - images.pixels[5].numpy()).astype(np.uint16) * 257
    Image.fromarray(scan).save(tmp_path / "scan.tiff")
    Image.fromarray(255 - images.pixels[5].numpy()).save(tmp_path / "good.png")
    names = ("eps.png", "huge.png", "scan.tiff", "good.png")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    command = [sys.executable, "-B", str(solution / "model.py"), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line.split(": ")[1] for line in done.stdout.splitlines()]
    assert len(said) == 2 and said[0].split()[0] == said[1].split()[0] and done.returncode == 2
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [str(tmp_path / name) for name in names[:2]]
    assert not started.exists()


def test_a_name_that_no_folder_can_have_is_one_clear_line():
    with pytest.raises(SolutionError, match=r"cannot be written .*: name another"):
        export.check_place(Path("x" * 300), force=False)


def test_figure_of_augmented_images_shows_those_that_were_trained_on(retrained, images, monkeypatch):
    seen = []
    monkeypatch.setattr(export.figures, "augmented", lambda originals, variants: seen.append((originals, variants)))
    for line in "c4 G c10k1-", "c4 G c10k1- | deskew":
        export._augmented(replace(retrained, candidate=replace(retrained.candidate, architecture=parse(line))), images)
    (plain, variants), (same, others) = seen
    assert torch.equal(plain, same) and not torch.equal(variants[0], others[0])


@pytest.mark.parametrize("n_bytes", [None, 0, 5, 300, 2000])
def test_module_without_its_weights_counts_and_says_what_is_missing(solution, tmp_path, images, n_bytes):
    shutil.copy(solution / "model.py", tmp_path)
    if n_bytes is not None:
        (tmp_path / "weights.safetensors").write_bytes((solution / "weights.safetensors").read_bytes()[:n_bytes])
    Image.fromarray(images.pixels[5].numpy()).save(tmp_path / "digit.png")
    namespace = runpy.run_path(str(tmp_path / "model.py"))
    assert namespace["main"]([]) == 0
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert namespace["main"]([str(tmp_path / "digit.png")]) == 2
    assert err.getvalue().count("\n") == 1 and "weights.safetensors is missing or damaged" in err.getvalue()


def test_onnx_takes_any_batch_and_predicts_the_same(solution, data_dir):
    from nas_mnist.solution.predict import load
    from nas_mnist.training.augmentation import normalise

    test = load_test(data_dir)
    session = onnxruntime.InferenceSession(solution / "model.onnx")
    pixels, _ = next(test.batches(333))
    normalised = normalise(pixels, test.normalisation)
    logits = session.run(None, {"images": normalised.numpy()})[0]
    assert np.abs(logits - load(solution).network(normalised).detach().numpy()).max() < 1e-4


def test_model_card_tells_how_it_was_chosen_and_runs(solution):
    card = (solution / "README.md").read_text()
    for part in (
        "✗ not:",
        "was not confirmed",
        "trial 7",
        "nas-mnist retrain --trial 7",
        "Conv2d",
        "| 3 |",
        "figures/curves.png",
    ):
        assert part.lower() in card.lower(), part


def test_existing_folder_is_never_overwritten_without_force(solution, retrained, data_dir, tmp_path):
    with pytest.raises(SolutionError, match="allow to replace it") as error:
        export.export(retrained, SOURCE, data_dir, solution)
    assert error.value.settings == ("out", "force")
    own = tmp_path / "thesis"
    own.mkdir()
    (own / "chapter.txt").write_text("years of work")
    with pytest.raises(SolutionError, match="no exported solution"):
        export.export(retrained, SOURCE, data_dir, own, force=True)
    assert (own / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("step", ["_write_onnx", "_write_figures", "_put_in_place"])
def test_failure_midway_leaves_the_old_solution_and_nothing_else(solution, retrained, data_dir, monkeypatch, step):
    before = {path: path.read_bytes() for path in solution.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, step, fail)
    with pytest.raises(SolutionError, match=r"disk full.*name another"):
        export.export(retrained, SOURCE, data_dir, solution, force=True)
    assert {path: path.read_bytes() for path in solution.rglob("*") if path.is_file()} == before
    assert list(solution.parent.iterdir()) == [solution]


def test_foreign_file_in_an_earlier_solution_is_not_lost(solution, retrained, data_dir, tmp_path):
    out = tmp_path / "solution"
    shutil.copytree(solution, out)
    (out / "__pycache__").mkdir()  # what using model.py leaves there is nobody's
    (out / "__pycache__" / "model.pyc").touch()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SolutionError, match=r"notes\.txt"):
        export.export(retrained, SOURCE, data_dir, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    export.check_place(out, True)


def test_logits_are_held_to_the_networks_and_a_tie_may_be_broken_otherwise(images):
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 5] = 1.0, 1.0 + 2e-6
    judged = export.Judged(images, logits)
    export._check_logits("it", logits + torch.eye(10)[3] * 4e-6, judged)
    with pytest.raises(SolutionError, match=r"within 0\.0001; they differ by 0\.0002"):
        export._check_logits("it", logits + 2e-4, judged)
    with pytest.raises(SolutionError, match="nan"):
        export._check_logits("it", logits * float("nan"), judged)


def test_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    new, out = tmp_path / "new", tmp_path / "out"
    for folder in (new, out):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with pytest.raises(OSError, match="not empty"):
        export._put_in_place(new, out, False)
    assert (out / "file").read_text() == "out"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_replacing_leaves_the_new_folder_alone(tmp_path, monkeypatch, in_one_step):
    new, out = tmp_path / "new", tmp_path / "out"
    for folder in (new, out):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    if not in_one_step:
        monkeypatch.setattr(export, "_exchange", lambda *_: False)
    export._put_in_place(new, out, True)
    shutil.rmtree(new, ignore_errors=True)  # as `export` does
    assert (out / "file").read_text() == "new" and list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_whoever_looks_while_folders_change_places_finds_one_of_them(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    stop, missed, looked = threading.Event(), [], []

    def look():
        while not stop.is_set():
            looked.append(1)
            if not (tmp_path / "one" / "file").exists():
                missed.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    exchanged = []
    while len(exchanged) < 2000 or len(looked) < 100:  # it may be a while until the other thread has its turn
        exchanged.append(export._exchange(tmp_path / "one", tmp_path / "other"))
    stop.set()
    looker.join()
    assert all(exchanged) and not missed


def test_no_file_tells_where_it_was_made_and_all_can_be_read(solution):
    for path in (path for path in solution.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for place in (solution.parent, Path(export.__file__).parent, Path(sys.prefix) / "lib"):
            assert str(place).encode() not in content, path.name
        assert path.stat().st_mode & 0o444 == 0o444, path.name


def test_weights_that_are_not_those_of_the_retraining_are_refused(retrained, data_dir, tmp_path):
    other = {name: tensor.clone() for name, tensor in retrained.weights.items()}
    other["0.0.weight"].zero_()
    with pytest.raises(SolutionError, match="as retraining saw it"):
        export.export(replace(retrained, weights=other), SOURCE, data_dir, tmp_path / "solution")
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_one_clear_line(retrained, data_dir):
    with pytest.raises(SolutionError, match="cannot be written"):
        export.export(retrained, SOURCE, data_dir, Path("/proc/nothing/solution"))


def test_commit_is_this_packages_own_and_says_when_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    source = tmp_path / "export.py"
    source.write_text("")
    monkeypatch.setattr(export, "__file__", str(source))
    assert export._git_commit() is None
    git("init")
    git("commit", "--allow-empty", "-m", "another project, in which the package only lies")
    assert export._git_commit() is None
    git("add", "export.py")
    git("commit", "-m", "ours")
    assert re.fullmatch("[0-9a-f]{40}", export._git_commit())
    source.write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", export._git_commit())


def test_force_replaces_an_earlier_solution(solution, retrained, data_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_write_figures", lambda *_: None)
    monkeypatch.setattr(export, "_write_onnx", lambda *_: None)
    out = tmp_path / "solution"
    for force in (False, True):
        export.export(retrained, Source("s", "other" if force else "first", 1), data_dir, out, force=force)
    assert json.loads((out / "solution.json").read_text())["search"]["study_name"] == "other"
    assert list(tmp_path.iterdir()) == [out]


def test_module_that_does_not_give_the_logits_is_refused(retrained, data_dir, tmp_path, monkeypatch):
    right = export.generate
    monkeypatch.setattr(
        export, "generate", lambda *args: right(*args).replace("F.max_pool2d(x, 2)", "F.avg_pool2d(x, 2)")
    )
    with pytest.raises(SolutionError, match=r"model\.py must give the network's logits"):
        export.export(retrained, SOURCE, data_dir, tmp_path / "solution")
    assert list(tmp_path.iterdir()) == []


def test_network_over_the_budget_is_not_exported(retrained, data_dir, tmp_path):
    fat = replace(retrained, candidate=replace(retrained.candidate, architecture=parse("c40 c40 G c10k1-")))
    with pytest.raises(BudgetError, match="the limit is 7,999"):
        export.export(fat, SOURCE, data_dir, tmp_path / "solution")
