"""What numba has cached of one version of the kernels is never run by another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nas_mnist.kernels import compilation

KERNEL = """
from calculation.compilation import entry_point
from calculation.constant import CONSTANT

@entry_point
def calculate(x):
    return x + CONSTANT
"""
CALL = "from calculation.kernels import calculate as f; print(f(1), sum(f.stats.cache_hits.values()))"


def test_a_change_of_any_file_of_the_kernels_is_a_new_cache(tmp_path):
    folder = tmp_path / "calculation"
    folder.mkdir()
    shutil.copy(compilation.__file__, folder)
    (folder / "kernels.py").write_text(KERNEL)
    assert run_with_constant(folder, 1) == "2 0"
    assert run_with_constant(folder, 1) == "2 1", "the second process finds what the first has compiled"
    assert run_with_constant(folder, 2) == "3 0"


def run_with_constant(folder: Path, constant: int) -> str:
    (folder / "constant.py").write_text(f"CONSTANT = {constant}\n")
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.check_output([sys.executable, "-c", CALL], env=environment, text=True).strip()


def test_the_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = compilation.digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = compilation.digest(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, renamed, compilation.digest(tmp_path)}) == 3
