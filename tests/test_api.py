"""The package as a library: what a notebook does, with real images and tiny settings."""

import subprocess
import sys

import pytest

import nas_mnist
from nas_mnist.data.datasets import MNIST

LIMITS = {"max_macs": 200_000, "max_ram": 20_000, "sampler": "random"}
TINY = {"epochs": 1, "train_images": 300, "max_params": 400}


def test_every_public_name_is_there_and_nothing_heavy_is_imported_for_it():
    script = (
        "import sys, nas_mnist\nassert nas_mnist.__version__\n"
        "assert not {'torch', 'optuna', 'numpy'} & set(sys.modules), 'imported'\n"
        "[getattr(nas_mnist, name) for name in nas_mnist.__all__]\n"
        "assert set(nas_mnist.__all__) <= set(dir(nas_mnist))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        nas_mnist.serch  # noqa: B018


def test_network_is_trained_in_place_and_judged_on_the_held_out_fold(data_dir):
    network = nas_mnist.build(nas_mnist.parse("c4 M c8 G c10k1-"), seed=0)
    recipe = nas_mnist.Recipe(epochs=1, learning_rate=0.3)
    epochs = list(nas_mnist.train(network, recipe, train_images=3000, data_dir=data_dir))
    assert len(epochs) == 1
    loss, accuracy = nas_mnist.evaluate(network, data_dir=data_dir)
    assert (loss, accuracy) == (epochs[-1].eval_loss, epochs[-1].eval_accuracy) and accuracy > 0.15


@pytest.fixture(scope="module")
def carried_away(tmp_path_factory, data_dir):
    """The whole way from Python: what each stage returned, and where it was."""
    folder = tmp_path_factory.mktemp("library")
    place = {"storage": str(folder / "s.db"), "data_dir": data_dir}
    summary = nas_mnist.search(1, warm_start=False, workers=1, **TINY, **LIMITS, **place)
    ranking = nas_mnist.confirm(top=1, n_folds=2, train_images=300, workers=1, **place)
    retrained = nas_mnist.retrain(n_seeds=1, train_images=300, workers=1, **place)
    record = nas_mnist.export(folder / "solution", c=True, **place)
    return folder, summary, ranking, retrained, record


def test_the_whole_way_in_python_is_that_of_the_commands(carried_away, data_dir):
    folder, summary, ranking, retrained, record = carried_away
    assert summary.counts.trained == 1
    (best,) = summary.best
    network = nas_mnist.parse(best.user_attrs["architecture"])
    assert network.n_macs <= LIMITS["max_macs"] and network.ram <= LIMITS["max_ram"]
    assert best.user_attrs["origin"] == "drawn by random"
    (confirmed,) = ranking
    assert confirmed.architecture == str(retrained.candidate.architecture) == record["architecture"]
    assert len(retrained.runs) == 1 and record["n_parameters"] < TINY["max_params"]
    assert list((folder / "solution" / "c").glob("*.c")), "as C, too"
    solution = nas_mnist.load_solution(folder / "solution")
    assert nas_mnist.evaluate(solution, data_dir=data_dir)[1] == record["test_accuracy"] == retrained.runs[0].accuracy


def test_the_same_call_goes_on_and_finds_nothing_left(carried_away, data_dir):
    folder, summary, *_ = carried_away
    events = []
    again = nas_mnist.search(
        1,
        warm_start=False,
        storage=str(folder / "s.db"),
        data_dir=data_dir,
        on_event=lambda worker, event: events.append(event),
        **TINY,
        **LIMITS,
    )
    assert again.counts == summary.counts and events, "told to whom was asked for it"


def test_bad_values_are_errors_of_the_package(tmp_path):
    with pytest.raises(nas_mnist.NasMnistError, match=f"choose one of {MNIST.name}"):
        nas_mnist.search(1, dataset="cifar", storage=str(tmp_path / "s.db"))
    with pytest.raises(nas_mnist.NasMnistError, match="no sampler 'grid': choose one of evolution, tpe, random"):
        nas_mnist.search(1, sampler="grid", storage=str(tmp_path / "s.db"))
    with pytest.raises(nas_mnist.NasMnistError, match="no optimizer 'lion': choose one of"):
        nas_mnist.search(1, optimizer="lion", storage=str(tmp_path / "s.db"))
    with pytest.raises(ValueError, match="a trial or an architecture"):
        nas_mnist.retrain(trial=1, architecture="c4 M c8 G c10k1-", storage=str(tmp_path / "s.db"))
    assert list(tmp_path.iterdir()) == []


def test_ablation_is_of_the_winner_or_of_a_line(carried_away, data_dir):
    folder, _, ranking, retrained, _ = carried_away
    place = {"storage": str(folder / "s.db"), "data_dir": data_dir, "workers": 1}
    with pytest.raises(ValueError, match="one network is trained: give a trial or an architecture"):
        nas_mnist.ablate("era1a7", trial=0, **place)
    recipe = nas_mnist.Recipe(epochs=1, batch_size=64)
    rows = nas_mnist.ablate("c10k28-", recipe=recipe, n_folds=2, train_images=200, **place)
    assert rows[0].change.name == "as it is" and all(len(row.outcomes) == 2 for row in rows)
    assert ranking[0].architecture == str(retrained.candidate.architecture)
