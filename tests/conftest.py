"""What several tests need: MNIST, unpacked once, and one thread for each process, as workers have."""

import shutil
import signal
import socket
from pathlib import Path

import postgresql
import pytest
import torch

from nas_mnist.data.folds import search_split
from nas_mnist.data.images import load_test, load_train
from nas_mnist.data.unpacking import prepare
from nas_mnist.workers.machine import n_cores

torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and whatever they start inherits that; the tests send it for real.
signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = [f"test_{name}.py" for name in ("ray_cluster", "faults", "main", "many_machines", "tour", "frontier", "demo")]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """One process more than there are cores: some tests wait, for a signal, a server or a lock."""
    return n_cores() + 1


def pytest_collection_modifyitems(items):
    """Where processes share the files, the slow ones come first, so that no process is left alone with one."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


@pytest.fixture(scope="session")
def images(data_dir):
    return load_train(data_dir)


@pytest.fixture(autouse=True)
def _own_data_dir(request, monkeypatch):
    """Commands find the data where the tests put it, and never touch the user's cache."""
    if "data_dir" in request.fixturenames:
        monkeypatch.setenv("NAS_MNIST_DATA", str(request.getfixturevalue("data_dir")))


@pytest.fixture(scope="session")
def retrained(data_dir, images):
    """A small network, trained a little on one seed, as `retrain` would return it."""
    from nas_mnist.model.architecture import parse
    from nas_mnist.model.network import build
    from nas_mnist.stages.retrain import Retrained, Run
    from nas_mnist.study.space import Candidate
    from nas_mnist.training.loop import train
    from nas_mnist.training.recipe import Recipe

    candidate = Candidate(parse("c8 M c12 M c16 G c10k1- | dropout=0.02"), Recipe(epochs=3, learning_rate=0.3))
    network = build(candidate.architecture, seed=0)
    few = search_split(images, 6000).train
    epochs = tuple(train(network, candidate.recipe, few, load_test(data_dir), seed=0))
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Retrained(candidate, 7, 0.95, None, (Run(0, epochs, 1.0, "CPU", "torch"),), weights)


@pytest.fixture(scope="session")
def solution(retrained, data_dir, tmp_path_factory):
    """An exported folder."""
    from nas_mnist.solution.export import Source, export

    out = tmp_path_factory.mktemp("exported") / "solution"
    export(retrained, Source("studies/x.db", "nas-mnist", 100), data_dir, out)
    return out


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium, headless; tests that need it are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no browser: install chromium from your distribution's packages")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")  # a test talks to its own page alone
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A desktop-sized page. `page.complaints` collects its console errors and uncaught exceptions."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(120_000)  # milliseconds; 30 s are not much for a page of 5 MB on a busy machine
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        yield page


@pytest.fixture(scope="session")
def screenshots():
    """Where tests leave pictures for people to look at."""
    folder = Path(__file__).parents[1] / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def postgresql_server():
    """A real PostgreSQL server, started for these tests; they are skipped where it is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[postgresql]'")
    binaries = postgresql.find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server: install postgresql from your distribution's packages")
    server = postgresql.Server(binaries)
    yield server
    server.remove()
