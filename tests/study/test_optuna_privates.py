"""Which private parts of Optuna the package relies on: all are listed, and an upgrade that drops one is noticed."""

import ast
from pathlib import Path

import optuna
import pytest
from optuna.storages import RDBStorage

import nas_mnist
from nas_mnist.study.shared import SharedStudy

# Names, and what has them. `_get_stale_trial_ids` is overridden, the others are read.
PRIVATE = {"_storage": "study", "_study_id": "study", "_trial_id": "trial", "_get_stale_trial_ids": "storage"}
NOT_OF_OPTUNA = {"_exit", "_asdict", "_replace"}  # os, and a named tuple's, which are public
OPTUNA_CLASSES = {"RDBStorage", "Study", "FileSystemArtifactStore"}  # that classes of the package derive from


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def found_in(tree: ast.Module) -> set[str]:
    """Private names that the module takes from elsewhere: of other objects, or of a base class of Optuna's."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)]
    own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    found = {node.attr for node in attributes} - own
    for derived in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        if {getattr(base, "attr", getattr(base, "id", "")) for base in derived.bases} & OPTUNA_CLASSES:
            found |= {node.name for node in derived.body if isinstance(node, ast.FunctionDef) and is_private(node.name)}
            inner = [node for node in ast.walk(derived) if node in attributes]
            found |= {node.attr for node in inner} - {node.attr for node in inner if isinstance(node.ctx, ast.Store)}
    return found


def test_every_private_name_that_is_used_is_listed():
    found = set()
    for path in Path(nas_mnist.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        found |= found_in(tree)
        imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in imports if "optuna" in name and any(map(is_private, name.split(".")))]
    assert found - NOT_OF_OPTUNA == PRIVATE.keys()


@pytest.mark.parametrize("name", PRIVATE)
def test_optuna_still_has_what_is_listed(name):
    study = optuna.create_study()
    having = {"study": study, "trial": study.ask(), "storage": RDBStorage}[PRIVATE[name]]
    assert hasattr(having, name)


def test_no_attribute_of_a_shared_study_hides_one_of_optunas():
    tree = ast.parse(Path(nas_mnist.__file__).with_name("study").joinpath("shared.py").read_text())
    (shared,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == SharedStudy.__name__]
    assigned = {n.attr for n in ast.walk(shared) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    assert assigned & set(dir(optuna.create_study())) == {"sampler"}
