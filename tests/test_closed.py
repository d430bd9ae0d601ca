"""Closed by default: nothing listens but on this machine, nothing is unpickled, no shell, no password shown."""

import ast
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import nas_mnist
from nas_mnist.cli import main as cli
from nas_mnist.cli import search as search_command
from nas_mnist.errors import shown
from nas_mnist.study import studies
from nas_mnist.study.storage import Storage

SOURCES = sorted(Path(nas_mnist.__file__).parent.glob("**/*.py"))
PASSWORD = "s3cr#t p@ss/w:rd"
QUOTED = "s3cr%23t%20p%40ss%2Fw%3Ard"


def calls(path):
    """Every call in a source file: the name as it is written, and its keywords."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec", "__import__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_unpickles_nothing_and_builds_no_shell(path):
    assert not UNPICKLERS & {name.split(".")[0] for name in imports(path) if name}
    for name, keywords, line in calls(path):
        assert name not in SHELLS, f"{path.name}:{line}: {name}"
        assert keywords.get("shell", "False") == "False", f"{path.name}:{line}"
        assert keywords.get("allow_pickle", "False") == "False", f"{path.name}:{line}"
        assert name not in ("torch.load", "torch.jit.load", "torch.hub.load", "pd.read_pickle"), f"{path.name}:{line}"


def test_scan_finds_what_it_looks_for(tmp_path):
    for line in ("import pickle", "os.system('x')", "subprocess.run('x', shell=True)", "np.load(f, allow_pickle=True)"):
        (tmp_path / "bad.py").write_text(line)
        with pytest.raises(AssertionError):
            test_source_unpickles_nothing_and_builds_no_shell(tmp_path / "bad.py")


_NO_PICKLE = """
import pickle, sys
def refuse(*arguments, **_):
    raise SystemExit("something was unpickled")
pickle.load = pickle.loads = refuse
if len(sys.argv) == 1:
    pickle.loads(pickle.dumps(1))
from nas_mnist.cli import main as cli
sys.exit(cli.main(sys.argv[1:]))
"""


def without_pickle(*arguments):
    command = [sys.executable, "-c", _NO_PICKLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


class Poison:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_command_that_reads_files_of_others_unpickles(solution, tmp_path):
    storage = Storage.parse(str(tmp_path / "s.db"))
    studies.create(storage.open(create=True), "nas-mnist", metric="m", attributes={})
    for arguments in (["show", "--storage", storage.path], ["predict", solution, solution / "figures" / "curves.png"]):
        done = without_pickle(*arguments)
        assert done.returncode == 0, done.stderr
    assert without_pickle().stderr == "something was unpickled\n"


def test_pickle_in_the_place_of_a_file_does_nothing(solution, data_dir, tmp_path):
    mark = tmp_path / "mark"
    poison = pickle.dumps(Poison(mark))
    folder = tmp_path / "solution"
    shutil.copytree(solution, folder)
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    for path in (*folder.rglob("*"), data / "mnist" / "train_labels.npy", data / "mnist" / "test_images.npy"):
        if path.is_file() and path.suffix != ".py":
            path.write_bytes(poison)
    (tmp_path / "s.db").write_bytes(poison)
    for arguments in (
        ["evaluate", folder, "--data-dir", data_dir],
        ["predict", folder, folder / "figures" / "curves.png"],
        ["evaluate", solution, "--data-dir", data],
        ["show", "--storage", tmp_path / "s.db"],
    ):
        assert cli.main(list(map(str, arguments))) == 2
    done = subprocess.run([sys.executable, folder / "model.py", folder / "figures" / "curves.png"], capture_output=True)
    assert done.returncode == 2 and not mark.exists()
    pickle.loads(poison)
    assert mark.exists()  # it would have


def test_dashboard_listens_on_this_machine_alone(tmp_path, unused_port):
    storage = Storage.parse(str(tmp_path / "s.db"))
    studies.create(storage.open(create=True), "nas-mnist", metric="m", attributes={})
    command = [sys.executable, "-m", "nas_mnist", "dashboard", "--storage", storage.path, "--port", str(unused_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("optuna-dashboard for")
            sockets = []
            while not sockets:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                sockets = [c for p in tree for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
            assert {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}
        finally:
            process.terminate()


def test_training_listens_nowhere_but_on_pipes():
    for path in SOURCES:
        if path.name != "dashboard.py":
            assert not {"socket.socket", "socketserver", "http.server"} & {name for name, *_ in calls(path)}, path.name


# --- passwords -------------------------------------------------------------------------------------------------------

URLS = [
    f"postgresql+psycopg://user:{QUOTED}@127.0.0.1:1/x",
    f"postgresql+psycopg://user:{PASSWORD}@127.0.0.1:1/x",
    f"postgresql+psycopg://127.0.0.1:1/x?user=u&password={QUOTED}",
    f"postgresql+nodriver://user:{QUOTED}@127.0.0.1:1/x",
    f"mysql://user:{QUOTED}@127.0.0.1:1/x",
    f"postgresql+psycopg://user:{QUOTED}@127.0.0.1:port/x",
    f"nonsense://user:{QUOTED}@@",
]
COMMANDS = ["search", "show", "dashboard", "confirm", "retrain --trial 0", "baselines", "export", "describe --trial 0"]


def tells(text):
    return re.search(r"s3cr|p@ss|p%40ss|w:rd|w%3Ard", text)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", COMMANDS)
def test_error_never_tells_the_password(capsys, tmp_path, monkeypatch, data_dir, command, url):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), "--storage", url]) == 2
    captured = capsys.readouterr()
    assert not tells(captured.out + captured.err) and captured.err.count("\n") == 1


MISPLACED = [["search", "--strage", URLS[0]], ["show", URLS[1]], [URLS[0]], ["predict", "x", URLS[1]]]


@pytest.mark.parametrize("arguments", MISPLACED)
def test_misplaced_storage_never_tells_the_password(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2 and not tells(captured.out + captured.err)


def test_what_is_printed_to_go_on_never_tells_the_password(capsys):
    cli._say_stopped(["search", "--storage", URLS[0], "--study", "x"], goes_on=True)
    arguments = cli.build_parser().parse_args(["search", "--storage", URLS[0]])
    assert not tells(capsys.readouterr().err + search_command._next_steps(arguments))
    assert "user:***@127.0.0.1" in search_command._next_steps(arguments)
    assert not any(tells(str(Storage.parse(url))) for url in (URLS[0], *URLS[2:4]))
    assert shown("sqlite:///a.db at 12:30, me@example.org") == "sqlite:///a.db at 12:30, me@example.org"


def test_solution_never_tells_the_password(retrained, data_dir, tmp_path):
    from nas_mnist.solution.export import Source, export

    source = Source(str(Storage.parse(URLS[0])), "nas-mnist", 100)
    export(retrained, source, data_dir, tmp_path / "solution")
    for path in (tmp_path / "solution").rglob("*"):
        assert path.is_dir() or not tells(path.read_bytes().decode("latin-1")), path.name


def test_environment_is_no_part_of_what_is_recorded(retrained, data_dir, tmp_path, monkeypatch):
    from nas_mnist.solution.export import Source, export

    monkeypatch.setitem(os.environ, "PGPASSWORD", PASSWORD)
    record = export(retrained, Source("s", "nas-mnist", 1), data_dir, tmp_path / "solution")
    assert not tells(repr(record))
