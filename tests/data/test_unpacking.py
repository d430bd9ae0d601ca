import sys
from pathlib import Path

import pytest

from nas_mnist.data.unpacking import default_data_dir
from nas_mnist.model.architecture import parse
from nas_mnist.stages.baselines import BaselineSettings
from nas_mnist.stages.confirm import ConfirmSettings
from nas_mnist.stages.retrain import Chosen, RetrainSettings
from nas_mnist.stages.search import SearchSettings
from nas_mnist.study.space import RECIPE, Candidate
from nas_mnist.study.storage import Storage

STORAGE = Storage("sqlite:///x.db")
CHOSEN = Chosen(Candidate(parse("c10k28-"), RECIPE))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NAS_MNIST_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "~/.cache/nas-mnist"),
        ({"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/nas-mnist"),
        ({"XDG_CACHE_HOME": ""}, "~/.cache/nas-mnist"),
        ({"NAS_MNIST_DATA": "~/images"}, "~/images"),
        ({"NAS_MNIST_DATA": "", "XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere/nas-mnist"),
    ],
)
def test_images_are_in_the_cache_folder_unless_the_user_names_another(home, monkeypatch, variables, folder):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_data_dir() == Path(folder).expanduser()


@pytest.mark.parametrize(
    "settings",
    [
        lambda: SearchSettings(STORAGE),
        lambda: ConfirmSettings(STORAGE),
        lambda: RetrainSettings(STORAGE, chosen=CHOSEN),
        lambda: BaselineSettings(STORAGE),
    ],
    ids=["search", "confirm", "retrain", "baselines"],
)
def test_who_uses_the_package_from_python_gets_the_cache_folder_too(home, settings):
    assert settings().data_dir == default_data_dir()
    assert home in settings().data_dir.parents
