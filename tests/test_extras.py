"""What commands say where the packages of an extra are not installed, and that a search needs none of them."""

import os
import subprocess
import sys

import pytest

from nas_mnist.extras import Extra, MissingPackage, require

WITHOUT = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {names} else found(name, package)
sys.meta_path.insert(0, Nowhere())
if __name__ == "__main__":
    from nas_mnist.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def without(tmp_path, data_dir):
    """Runs a command in an interpreter, and worker processes, that have none of the packages of any extra."""
    script = tmp_path / "without.py"
    script.write_text(WITHOUT.format(names=sorted({name for extra in Extra for name in extra.value})))

    def run(*arguments):
        command = [sys.executable, str(script), *arguments]
        environment = os.environ | {"NAS_MNIST_DATA": str(data_dir), "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    return run


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["report"], "report"),
        (["export"], "export"),
        (["solve", "--trials", "1"], "export"),
        (["evaluate", "solution", "--int8"], "export"),
    ],
)
def test_command_that_lacks_a_package_says_the_pip_line_before_any_work(without, tmp_path, command, extra):
    before = set(tmp_path.iterdir())
    done = without(*command)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'nas-mnist[{extra}]'" in done.stderr
    assert set(tmp_path.iterdir()) == before


def test_search_needs_no_package_of_an_extra(without, tmp_path):
    small = ["--no-warm-start", "--epochs", "1", "--train-images", "300", "--max-params", "400", "--workers", "1"]
    done = without("search", "--trials", "1", *small)
    assert done.returncode == 0 and "1 of 1 trials" in done.stdout, done.stderr
    assert (tmp_path / "studies" / "nas_mnist.db").exists()


def test_nothing_is_said_of_packages_that_are_there(monkeypatch):
    monkeypatch.setattr("nas_mnist.extras.find_spec", lambda name: object())
    require(Extra.export)
    monkeypatch.setattr("nas_mnist.extras.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="onnx, onnxscript and onnxruntime"):
        require(Extra.export)
