"""What several tests need: MNIST, unpacked once, and one thread for each process, as workers have."""

import pytest
import torch

from nas_mnist import data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def images(data_dir):
    return data.load_train(data_dir)


@pytest.fixture(autouse=True)
def _own_data_dir(request, monkeypatch):
    """Commands find the data where the tests put it, and never touch the user's cache."""
    if "data_dir" in request.fixturenames:
        monkeypatch.setenv("NAS_MNIST_DATA", str(request.getfixturevalue("data_dir")))
