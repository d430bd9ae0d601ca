import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import raw_files
from PIL import Image

from nas_mnist.cli import main as cli
from nas_mnist.cli.frontier import BUDGETS
from nas_mnist.data.datasets import DATASETS
from nas_mnist.study import space, studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.storage import Storage

COMMANDS = {name for action in cli.build_parser()._subparsers._group_actions for name in action.choices}


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command, run in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def in_tmp(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def searched(tmp_path_factory, data_dir):
    """A folder with a small finished study, and what the search printed."""
    folder = tmp_path_factory.mktemp("searched")
    command = [
        sys.executable,
        "-m",
        "nas_mnist",
        *["search", "--trials", "2", "--epochs", "1", "--train-images", "300", "--workers", "2"],
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"NAS_MNIST_DATA": str(data_dir)},
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, done


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_and_every_option_has_help_and_is_in_the_readme(command, capsys, request):
    code, out, _ = run(capsys, command, "--help")
    readme = (request.config.rootpath / "README.md").read_text()
    assert code == 0 and f"nas-mnist {command}" in readme and f"example: nas-mnist {command}" in out
    parser = next(a for a in cli.build_parser()._subparsers._group_actions).choices[command]
    assert all(action.help for action in parser._actions), out


def test_help_imports_neither_torch_nor_optuna():
    script = (
        "import sys\nfrom nas_mnist.cli import main as cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'optuna', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


BAD = [
    ("search --trials 0", "argument --trials: must be at least 1, not 0"),
    ("search --trials -5", "argument --trials: must be at least 1, not -5"),
    ("search --trials ten", "must be a whole number, not 'ten'"),
    ("search --epochs 0", "--epochs"),
    ("search --max-params 0", "--max-params"),
    ("search --max-params 50", "or more (--max-params)"),
    ("frontier --budgets 50", "or more\n"),
    ("search --max-macs 14849", "the smallest network of the space takes 14,850: allow as many or more (--max-macs)"),
    ("search --max-ram 2135", "the smallest network of the space takes 2,136: allow as many or more (--max-ram)"),
    ("search --max-ram 0", "argument --max-ram: must be at least 1, not 0"),
    ("search --train-images 50001", "not 50,001 (--train-images)"),
    ("search --workers 0", "argument --workers: must be at least 1, not 0"),
    ("search --workers 100000", "make no sense"),
    ("search --devices cuda:9", "device must be one of"),
    ("search --devices gpu", "name one of them (--devices)"),
    ("search --devices ,", "argument --devices: must be one or several, with commas between them, not ','"),
    ("confirm --devices ''", "argument --devices: must be one or several, with commas between them, not ''"),
    ("frontier --budgets ,", "argument --budgets: must be one or several, with commas between them, not ','"),
    ("frontier --over ram --budgets 2000,8000", "a budget of 2,000 bytes of RAM cannot be met; the smallest"),
    ("frontier --over macs --budgets 500", "a budget of 500 multiply-adds cannot be met; the smallest"),
    ("frontier --over flash", "argument --over: invalid choice: 'flash' (choose from 'params', 'macs', 'ram')"),
    ("search --optimizer lion", "invalid choice"),
    ("search --dataset cifar10", "argument --dataset: invalid choice: 'cifar10' (choose from"),
    ("baselines --train-images 60001", "2 to 50,000"),
    ("retrain --architecture era1a7 --dataset kmnist --check", "--check judges the task, which is one of MNIST"),
    ("search --storage mysql://a:secret@localhost/x", "SQLAlchemy URL of SQLite or PostgreSQL"),
    ("search --storage postgresql+pg8000://a:secret@localhost/x", "not installed"),
    ("search --data-dir /proc/nothing", "--data-dir"),
    ("search --quiet --verbose", "not allowed with"),
    (
        "show",
        "there is no study database at studies/nas_mnist.db: run `nas-mnist search` first, or name one (--storage)",
    ),
    ("dashboard", "there is no study database at studies/nas_mnist.db"),
    ("dashboard --port 70000", "must be 1 to 65,535, not 70,000"),
    ("describe", "describe takes one network"),
    ("describe era1a7 --trial 0", "describe takes one network"),
    ("describe era1a8", "is no reference system (era1a7, eva-drilldown"),
    ("describe 'c8 x G'", "`x` at position 4 is no layer"),
    ("describe --trial 0", "there is no study database at studies/nas_mnist.db"),
    ("find-lr era1a8", "is no reference system"),
    ("find-lr era1a7 --from 1 --to 0.1", "must rise"),
    ("find-lr era1a7 --steps 10", "at least 50 steps, not 10"),
    ("find-lr era1a7 --out lr.txt", "a figure is a .png, .svg or .pdf file, not lr.txt"),
    ("find-lr era1a7 --device cuda:9", "name one of them\n"),
    ("baselines era1a8", "there is no reference system 'era1a8': choose one of era1a7"),
    ("baselines --seeds 0", "argument --seeds: must be 1 to 1,000, not 0"),
    ("baselines --storage postgresql+pg8000://a:secret@localhost/x", "not installed"),
    ("demo", "solution/solution.json cannot be read (No such file or directory)"),
    ("", "COMMAND"),
    ("serach", "invalid choice"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_one_line_on_stderr_with_exit_code_2_and_nothing_written(line, message, capsys, in_tmp):
    code, out, err = run(capsys, *shlex.split(line))
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1
    assert "secret" not in err
    assert list(in_tmp.iterdir()) == []


def test_usual_budgets_of_a_frontier_can_be_met_whatever_they_are_of():
    assert min(BUDGETS["params"]) > space.smallest_count()
    assert min(BUDGETS["macs"]) >= space.smallest(lambda architecture: architecture.n_macs)
    assert min(BUDGETS["ram"]) >= space.smallest(lambda architecture: architecture.ram)


def test_search_prints_a_line_a_trial_and_a_summary(searched):
    folder, done = searched
    assert re.search(r"^2/2  trial \d: [\d.]+%, [\d,]+ parameters, c", done.stdout, re.M)
    assert re.search(r"trained +2 of 2 trials, 0 of them pruned early", done.stdout)
    for part in ("over budget", "failed", "saved by pruning", "outside training", "next: nas-mnist show"):
        assert part in done.stdout
    assert done.stderr == ""
    assert (folder / "studies" / "nas_mnist.db").exists()


def test_show_prints_the_leaderboard(searched, capsys, monkeypatch):
    monkeypatch.chdir(searched[0])
    code, out, err = run(capsys, "show")
    assert code == 0 and err == "" and "2 trained" in out
    code, out, _ = run(capsys, "show", "--json", "--top", 1)
    (entry,) = json.loads(out)
    assert entry["n_parameters"] < 8000 and len(entry["epochs"]) == 1 and entry["accuracy"] > 0


def test_same_command_again_finds_nothing_to_do(searched, capsys, monkeypatch, data_dir):
    monkeypatch.chdir(searched[0])
    command = "search --trials 2 --epochs 1 --train-images 300 --workers 1 --quiet"
    code, out, _ = run(capsys, *command.split())
    assert code == 0 and "2 of 2 trials" in out


def test_other_budget_is_refused(searched, capsys, monkeypatch, data_dir):
    monkeypatch.chdir(searched[0])
    code, _, err = run(capsys, *["search", "--epochs", "1", "--train-images", "300", "--max-params", "5000"])
    assert code == 2 and "max_params 8000, not 5000" in err and err.count("\n") == 1


def test_ctrl_c_stops_within_seconds_keeps_what_is_finished_and_tells_how_to_go_on(in_tmp, data_dir):
    arguments = "search --trials 50 --epochs 2 --train-images 2000 --workers 2 --no-warm-start"
    process = subprocess.Popen(
        [sys.executable, "-m", "nas_mnist", *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout.readline().startswith("1/50")
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert time.monotonic() - start < 10
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].strip() == f"nas-mnist {arguments}"
    trials = studies.load(Storage.parse("studies/nas_mnist.db").open(), "nas-mnist").get_trials()
    now = TrialCounts.of(trials)
    assert now.trained >= 1 and now.running == 0 and now.waiting == now.failed


def test_taken_port_is_one_clear_line(searched, capsys, monkeypatch):
    import socket

    monkeypatch.chdir(searched[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run(capsys, "dashboard", "--port", taken.getsockname()[1])
    assert code == 2 and "choose another port (--port)" in err and err.count("\n") == 1


def test_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "nas_mnist", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nas-mnist ")
    assert Path(sys.executable).with_name("nas-mnist").exists()


def test_describe_prints_the_program_of_a_training_step(capsys, in_tmp):
    code, out, _ = run(capsys, "describe", "c4 M d6 G c10k1-", "--program")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    names = [re.sub(r"^\d+ ", "", line) for line in lines if re.match(r"\d+ [┌│└a-z]", line)]
    for name in ("augment map", "┌ measure map", "│ activate pool map", "weight gradient map", "soap 0.0.weight"):
        assert any(line.startswith(name) for line in names), out


def test_describe_works_without_a_study_and_its_exit_code_is_the_verdict(capsys, in_tmp):
    code, out, err = run(capsys, "describe", "era1a7")
    assert code == 0 and err == "" and list(in_tmp.iterdir()) == []
    for part in ("Total params: 4,392", "receptive field", "✓ 4,392 parameters", "99.46% in the last epoch"):
        assert part in out
    code, out, _ = run(capsys, "describe", "c8 M c16 G c10k1-", "--max-params", 1000)
    assert code == 1 and "✗ 1,432 parameters: not fewer than 1,000, 433 too many" in out


def test_describe_shows_the_network_of_a_trial(searched, capsys, monkeypatch):
    monkeypatch.chdir(searched[0])
    shown = json.loads(run(capsys, "show", "--json")[1])[0]
    code, out, _ = run(capsys, "describe", "--trial", shown["trial"], "--json")
    assert code == 0 and json.loads(out)["architecture"] == shown["architecture"]
    code, _, err = run(capsys, "describe", "--trial", 99)
    assert code == 2 and "there is no trial 99 in study 'nas-mnist'" in err and err.count("\n") == 1


def test_find_lr_draws_the_curve_on_the_terminal_and_into_a_file(capsys, in_tmp):
    code, out, err = run(capsys, *shlex.split("find-lr 'c8s2 c16s2 G c10k1-' --steps 60 --from 1e-3 --out lr.png"))
    assert code == 0 and err == ""
    assert "learning rate" in out and "steepest descent" in out
    assert (in_tmp / "lr.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, *shlex.split("find-lr 'c8s2 c16s2 G c10k1-' --steps 60 --from 1e-3 --json"))
    assert code == 0 and json.loads(out)["minimum"] == pytest.approx(10 * json.loads(out)["tenth_of_minimum"])


def test_baselines_train_in_worker_processes_and_are_not_repeated(capsys, in_tmp):
    command = "baselines eva6s4-ultrasmall --epochs 1 --train-images 200 --workers 1"
    code, out, _ = run(capsys, *command.split())
    assert code == 0 and re.search(r"^eva6s4-ultrasmall +4,464 +99.00%\* +[\d.]+% +1 ", out, re.M)
    code, out, _ = run(capsys, *command.split(), "--json")
    (result,) = json.loads(out)
    assert code == 0 and len(result["runs"]) == 1 and result["published"]["best"] == 0.99
    trials = studies.load(Storage.parse("studies/nas_mnist.db").open(), "nas-mnist-baselines").get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"]


@pytest.fixture(scope="module")
def kmnist(tmp_path_factory):
    """A folder where the files of Kuzushiji-MNIST lie; what they show is noise, of which there are 100 images."""
    folder = tmp_path_factory.mktemp("kmnist")
    arrays = raw_files.make(DATASETS["kmnist"])
    raw_files.write(DATASETS["kmnist"], folder, arrays)
    return folder, arrays


def test_whole_way_on_a_sibling(capsys, in_tmp, kmnist):
    place = f"--data-dir {kmnist[0]} --workers 1"
    code, out, _ = run(
        capsys,
        *shlex.split(f"search --dataset kmnist --trials 1 --epochs 1 --train-images 300 --max-params 400 {place}"),
    )
    assert code == 0 and "next: nas-mnist show --study nas-kmnist" in out
    opened = Storage.parse("studies/nas_mnist.db").open()
    assert studies.load(opened, "nas-kmnist").user_attrs["identity"]["dataset"] == "kmnist"

    quick = f"--seeds 1 --train-images 300 {place}"
    for wrong in (
        f"confirm --study nas-kmnist --dataset mnist {place}",
        f"search --study nas-kmnist --epochs 1 {place}",
    ):
        code, out, err = run(capsys, *shlex.split(wrong))
        assert code == 2 and "was made with dataset 'kmnist', not 'mnist'" in err and err.count("\n") == 1
    code, out, _ = run(capsys, *shlex.split(f"retrain --study nas-kmnist --trial 0 --json {quick}"))
    retrained = json.loads(out)
    assert code == 0 and retrained["dataset"] == "kmnist" and retrained["verdict"]["fulfilled"] is None

    code, out, _ = run(capsys, "export", "--dataset", "kmnist", "--data-dir", kmnist[0])
    assert code == 0
    with Image.open("solution/figures/misclassified.png") as picture:
        assert picture.width == 2550, "400 of thousands, 20 in a row"
    record = json.loads(Path("solution/solution.json").read_text())
    assert record["dataset"] == "kmnist" and record["task_fulfilled"] is None
    assert set(record["normalisation"]) == {"mean", "std"} and record["normalisation"]["mean"] > 0.4
    card = Path("solution/README.md").read_text()
    assert card.startswith("# Kuzushiji-MNIST with") and "nas-mnist retrain --trial 0" in card
    search = next(line for line in card.splitlines() if line.startswith("nas-mnist search"))
    assert all(option in search for option in ("--epochs 1", "--max-params 400", "--dataset kmnist"))
    assert "of Kuzushiji-MNIST: the task's 99.40%" in card
    code, out, _ = run(capsys, "evaluate", "solution", "--json", "--data-dir", kmnist[0])
    assert code == 0 and json.loads(out)["test_accuracy"] == record["test_accuracy"]

    Image.fromarray(kmnist[1][0][0]).resize((99, 99)).save("picture.png")
    code, out, _ = run(capsys, "predict", "solution", "picture.png", "--json")
    (prediction,) = json.loads(out)
    assert code == 0 and DATASETS["kmnist"].classes[prediction["class_index"]] == prediction["label"]
    command = [sys.executable, "solution/model.py", "picture.png"]
    alone = subprocess.run(command, capture_output=True, text=True, check=True)
    assert alone.stdout == run(capsys, "predict", "solution", "picture.png")[1]
    assert alone.stdout.startswith(f"picture.png: {prediction['label']} (")


def test_baselines_of_a_sibling_are_compared_with_nothing(capsys, in_tmp, kmnist):
    command = "baselines eva6s4-ultrasmall --dataset kmnist --epochs 1 --train-images 200 --workers 1"
    code, out, _ = run(capsys, *command.split(), "--data-dir", kmnist[0])
    assert (
        code == 0
        and "reference systems on Kuzushiji-MNIST" in out
        and re.search(r"^eva6s4-ultrasmall +4,464 ", out, re.M)
    )
    assert "published" not in out and "reproduced" not in out and "diff" not in out
    code, out, _ = run(capsys, *command.split(), "--json", "--data-dir", kmnist[0])
    (result,) = json.loads(out)
    assert (result["dataset"], result["published"], result["difference"]) == ("kmnist", None, None)
    opened = Storage.parse("studies/nas_mnist.db").open()
    (trial,) = studies.load(opened, "nas-kmnist-baselines").get_trials()
    assert "published_accuracy" not in trial.user_attrs
