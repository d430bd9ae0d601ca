"""Reference systems are trained once each, whatever happens in between, and compared with what was published."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from optuna.trial import TrialState

from nas_mnist.data.folds import search_split
from nas_mnist.data.images import load_test
from nas_mnist.errors import ArchitectureError, StudyError
from nas_mnist.model.network import build
from nas_mnist.model.zoo import ZOO
from nas_mnist.stages import baselines, planned
from nas_mnist.stages.baselines import (
    BaselineResult,
    BaselineRun,
    BaselineSettings,
    Training,
    train_baselines,
)
from nas_mnist.stages.planned import RunsBegan, RunStarted
from nas_mnist.stages.trial import EpochTrained
from nas_mnist.study import studies
from nas_mnist.study.storage import Storage
from nas_mnist.training.evaluation import predict
from nas_mnist.training.loop import train
from nas_mnist.workers.events import Worker

NAMES = ("lite-m4", "eva6s4-ultrasmall")
WORKERS = [Worker(0, "cpu")]


@pytest.fixture
def settings(tmp_path, data_dir, monkeypatch):
    """Two systems, two seeds, 200 images, one epoch, in this process, tested on 300 images."""

    def in_process(work, workers, on_event):
        for worker in workers:
            work(worker, partial(on_event, worker))

    test_images = load_test(data_dir)
    monkeypatch.setattr(planned, "run_workers", in_process)
    monkeypatch.setattr(planned, "load_test", lambda *_: test_images.part(test_images.indices[:300]))
    storage = Storage.parse(str(tmp_path / "s.db"))
    return BaselineSettings(storage, names=NAMES, n_seeds=2, epochs=1, train_images=200, data_dir=data_dir)


def run(settings, events=None):
    events = [] if events is None else events
    return train_baselines(settings, WORKERS, lambda worker, event: events.append(event))


def started(events):
    return [e.name for e in events if isinstance(e, RunStarted)]


def trials(settings, *states):
    return studies.load(settings.storage.open(), settings.study_name).get_trials(states=states or None)


def test_every_system_is_trained_with_every_seed_and_stored_for_the_dashboard(settings):
    events = []
    results = run(settings, events)
    assert started(events) == [f"{name} seed {seed}" for seed in (0, 1) for name in NAMES]
    assert [(r.system.name, len(r.runs), r.n_diverged) for r in results] == [(name, 2, 0) for name in NAMES]
    for trial in trials(settings):
        system = ZOO[trial.user_attrs["system"]]
        assert trial.state == TrialState.COMPLETE and list(trial.intermediate_values) == [1]
        assert trial.value == trial.intermediate_values[1]
        assert trial.user_attrs["architecture"] == str(system.architecture)
        assert trial.user_attrs["n_parameters"] == system.n_parameters
        assert trial.user_attrs["recipe"]["learning_rate"] == baselines.RECIPE.learning_rate
        assert {"seconds", "device", "versions", "published_accuracy"} <= trial.user_attrs.keys()


def test_finished_runs_are_never_repeated_and_more_seeds_add_to_them(settings):
    first = run(replace(settings, n_seeds=1))
    events = []
    results = run(settings, events)
    assert events[0] == RunsBegan(n_left=2, n_done=2, epochs_per_run=1)
    assert started(events) == [f"{name} seed 1" for name in NAMES]
    assert [r.runs[0] for r in results] == [r.runs[0] for r in first]
    assert started_again(settings) == []


def started_again(settings):
    events = []
    run(settings, events)
    return started(events)


def test_other_number_of_epochs_is_another_run(settings):
    one = replace(settings, names=NAMES[1:], n_seeds=1)
    run(one)
    (result,) = run(replace(one, epochs=2))
    assert [len(r.accuracies) for r in result.runs] == [2]
    assert len(trials(settings)) == 2


def test_interrupted_run_is_trained_again_and_what_was_finished_is_kept(settings):
    epochs = []

    def interrupt(worker, event):
        epochs.append(event) if isinstance(event, EpochTrained) else None
        if len(epochs) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_baselines(settings, WORKERS, interrupt)
    kept = trials(settings, TrialState.COMPLETE)
    assert [trial.user_attrs["system"] for trial in kept] == [NAMES[0]]
    events = []
    run(settings, events)
    assert started(events) == [f"{NAMES[1]} seed 0", f"{NAMES[0]} seed 1", f"{NAMES[1]} seed 1"]
    assert len(trials(settings, TrialState.COMPLETE)) == 4


def test_command_trains_what_it_was_asked_for_and_not_what_another_left_undone(settings):
    def interrupt(worker, event):
        if isinstance(event, EpochTrained):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_baselines(settings, WORKERS, interrupt)
    events = []
    run(replace(settings, names=NAMES[1:], n_seeds=1), events)
    assert started(events) == [f"{NAMES[1]} seed 0"]


def test_same_seed_gives_the_same_accuracy_and_another_seed_another_network(settings, tmp_path):
    one = replace(settings, names=NAMES[:1])
    (first,) = run(one)
    (again,) = run(replace(one, storage=Storage.parse(str(tmp_path / "other.db"))))
    assert [r.accuracies for r in first.runs] == [r.accuracies for r in again.runs]
    assert first.runs[0].accuracies != first.runs[1].accuracies


def test_diverged_run_is_told_apart_and_not_repeated(settings, monkeypatch):
    hot = replace(baselines.RECIPE, learning_rate=1e30)
    monkeypatch.setattr(baselines, "RECIPE", hot)
    one = replace(settings, names=("lite-m3",), n_seeds=1, epochs=2)
    (result,) = run(one)
    assert (result.runs, result.n_diverged, result.mean) == ((), 1, None)
    assert started_again(one) == []


def test_study_of_another_recipe_is_refused(settings):
    run(replace(settings, names=NAMES[1:], n_seeds=1))
    with pytest.raises(StudyError, match="train_images 200, not 300"):
        run(replace(settings, train_images=300))


def test_unknown_system_is_refused(settings):
    with pytest.raises(ArchitectureError, match="no reference system 'lite-m9'"):
        replace(settings, names=("lite-m9",))


def test_all_training_images_and_all_test_images_are_used_unless_told_otherwise(data_dir):
    split = planned.full_split(BaselineSettings(Storage("sqlite:///x.db"), data_dir=data_dir))
    assert (len(split.train), len(split.val)) == (60_000, 10_000)
    assert split.val.pixels.shape == (10_000, 28, 28)


def test_result_is_the_last_epoch_never_the_best():
    runs = tuple(BaselineRun(seed, a, 10.0, "", "") for seed, a in enumerate([(0.99, 0.95, 0.97), (0.99, 0.98, 0.96)]))
    result = BaselineResult(ZOO["era1a7"], Training(baselines.RECIPE), runs, 0)
    assert result.mean == pytest.approx(0.965)
    assert result.standard_deviation == pytest.approx(0.00707, abs=1e-5)
    assert result.worst_of_last == 0.95
    assert result.difference == pytest.approx(0.965 - 0.9946)


def test_system_with_its_own_recipe_is_trained_with_both_and_told_apart(settings):
    """Runs of the common recipe are stored as they were before there was any other."""
    one = replace(settings, names=("era1a7",), n_seeds=1)
    results = run(one)
    expected = Training(baselines.RECIPE), baselines.OWN_TRAINING["era1a7"]
    assert [result.training for result in results] == [replace(t, recipe=replace(t.recipe, epochs=1)) for t in expected]
    common, own = trials(settings)
    assert common.user_attrs["job"].keys() == {"system", "architecture", "seed", "epochs"}
    assert own.user_attrs["job"]["own"]["learning_rate"] == own.user_attrs["recipe"]["learning_rate"] == 1.0
    assert [r.runs[0].accuracies[-1] for r in results] == [common.value, own.value]
    assert started_again(one) == []


def test_every_class_of_lite_m1_has_a_gradient_and_keeps_it(images):
    """From PyTorch's first weights the logit of some classes is 0 on every image.

    At a rate that fits 200 steps: at that of 15 epochs, reached in 20 steps, a class may die whoever computes it.
    """
    few = search_split(images, 6400).train
    own = baselines.OWN_TRAINING["lite-m1"]
    for seed in range(3):
        network = build(ZOO["lite-m1"].architecture, seed=seed, initialisation=own.initialisation)
        *_, last = train(network, replace(own.recipe, epochs=4, learning_rate=0.01), few, few, seed=seed)
        predicted = torch.cat([logits.argmax(1) for logits, _ in predict(network, few)])
        assert len(predicted.unique()) == 10 and last.eval_accuracy > 0.85
