from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from optuna.trial import TrialState, create_trial

from nas_mnist.data.datasets import DATASETS
from nas_mnist.data.images import load_test
from nas_mnist.errors import BudgetError, StudyError
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.stages import confirm, planned, retrain
from nas_mnist.stages.retrain import Chosen, RetrainSettings, Verdict
from nas_mnist.study import studies
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import Storage
from nas_mnist.training.evaluation import evaluate
from nas_mnist.training.loop import EpochResult
from nas_mnist.training.recipe import Recipe
from nas_mnist.views import tables
from nas_mnist.workers.events import Worker

CANDIDATE = Candidate(parse("c6 M c8 M c10k1- G"), Recipe(epochs=2))


@pytest.fixture
def settings(tmp_path, data_dir):
    return RetrainSettings(
        Storage.parse(str(tmp_path / "s.db")), chosen=Chosen(CANDIDATE), n_seeds=2, train_images=500, data_dir=data_dir
    )


def run(settings, n_workers=2):
    workers = [Worker(i, "cpu") for i in range(n_workers)]
    events = []
    return retrain.retrain(settings, workers, lambda worker, event: events.append(event))


def test_every_seed_meets_the_test_set_and_the_weights_of_the_first_are_kept(settings, data_dir):
    retrained = run(settings)
    assert [r.seed for r in retrained.runs] == [0, 1] and retrained.n_train_images == 500
    assert all(len(r.epochs) == 2 for r in retrained.runs)
    assert retrained.mean == pytest.approx(sum(r.epochs[-1].eval_accuracy for r in retrained.runs) / 2)
    network = build(CANDIDATE.architecture, seed=99)
    network.load_state_dict(retrained.weights)
    assert evaluate(network, load_test(data_dir))[1] == retrained.runs[0].accuracy

    again = run(replace(settings, n_seeds=1))  # nothing is trained twice, and all seeds there are count
    assert again.runs == retrained.runs
    assert retrain.load(settings.storage, "nas-mnist").runs == retrained.runs
    (result,) = retrain.results(settings.storage.open(), "nas-mnist")
    assert (result.candidate, result.runs, result.weights) == (CANDIDATE, retrained.runs, {})


def test_nothing_retrained_has_no_results(settings):
    assert retrain.results(settings.storage.open(create=True), "nas-mnist") == []


def test_weights_that_are_gone_are_one_clear_line(settings):
    run(replace(settings, n_seeds=1), n_workers=1)
    for path in settings.storage.artifacts.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(StudyError, match="is damaged"):
        retrain.load(settings.storage, "nas-mnist")


def test_network_over_the_budget_is_refused_before_training(settings):
    fat = Candidate(parse("c32 c32 M c32 G c10k1-"), Recipe())
    with pytest.raises(BudgetError, match="the limit is 7,999: reduce a width or a block"):
        run(replace(settings, chosen=Chosen(fat)))
    assert not settings.storage.path.exists()


@pytest.fixture
def searched(settings):
    """A search of two trials, the second of which the confirmation liked better."""
    opened = settings.storage.open(create=True)
    for name in ("nas-mnist", "nas-mnist-confirm"):
        studies.create(opened, name, metric="m", attributes={})
    for score in (0.99, 0.98):
        studies.load(opened, "nas-mnist").add_trial(create_trial(value=score, user_attrs=CANDIDATE.to_dict()))
    return settings.storage


def add_confirmation(storage, trial, accuracies):
    attributes = {
        "job": {"trial": trial, "search_score": 0.99 - 0.01 * trial, "candidate": CANDIDATE.to_dict()},
        "architecture": "x",
        "n_parameters": 1,
        "accuracies": accuracies,
        "folds": len(accuracies),
        "seeds": 1,
    }
    study = studies.load(storage.open(), "nas-mnist-confirm")
    study.add_trial(create_trial(value=sum(accuracies) / len(accuracies), user_attrs=attributes))


def test_winner_of_the_confirmation_is_chosen_not_that_of_the_search(searched):
    with pytest.raises(StudyError, match=r"nas-mnist confirm.*name a trial"):
        retrain.choose(searched, "nas-mnist")
    add_confirmation(searched, 0, [0.95, 0.96])
    add_confirmation(searched, 1, [0.97, 0.98])
    chosen = retrain.choose(searched, "nas-mnist")
    assert (chosen.trial, chosen.candidate) == (1, CANDIDATE)
    assert chosen.confirmation["optimism"] == pytest.approx(0.98 - 0.975)
    assert retrain.choose(searched, "nas-mnist", 0).trial == 0
    with pytest.raises(StudyError, match="no trial 7"):
        retrain.choose(searched, "nas-mnist", 7)
    assert [c.trial for c in confirm.ranking(searched.open(), "nas-mnist")] == [1, 0]


def test_nothing_retrained_says_what_to_do(searched):
    with pytest.raises(StudyError, match="run `nas-mnist retrain` first"):
        retrain.load(searched, "nas-mnist")


@pytest.mark.parametrize(
    ("verdict", "fulfilled"),
    [
        (Verdict(7999, 15, 0.994), True),
        (Verdict(8000, 15, 0.994), False),
        (Verdict(7999, 16, 0.994), False),
        (Verdict(7999, 15, 0.9939), False),
        (Verdict(7999, 15, 0.994, n_diverged=1), False),
    ],
)
def test_verdict_needs_every_condition(verdict, fulfilled):
    assert bool(verdict) is fulfilled


def test_task_is_one_of_mnist():
    assert Verdict(7999, 15, 0.994).fulfilled is True
    sibling = Verdict(7999, 15, 0.999, of_the_task=False)
    assert not sibling and sibling.fulfilled is None


def test_training_uses_all_images_unless_told_otherwise(settings):
    split = planned.full_split(replace(settings, train_images=60_000))
    assert (len(split.train), len(split.val)) == (60_000, 10_000)
    assert not torch.equal(split.train.pixels[:10], split.val.pixels[:10])


def add_run(storage, seed, accuracies):
    """A finished retraining of the candidate, or without accuracies one that diverged."""
    opened = storage.open(create=True)
    studies.create(opened, "nas-mnist-retrain", metric="m", attributes={"identity": {"train_images": 60_000}})
    epochs = [EpochResult(i, 0.1, 0.99, 0.1, accuracy, 0.1, 1.0, 1.0) for i, accuracy in enumerate(accuracies, 1)]
    attributes = {
        "job": {"candidate": CANDIDATE.to_dict(), "seed": seed},
        "chosen": {"trial": 3, "search_score": 0.99, "confirmation": None},
        "epochs": [asdict(epoch) for epoch in epochs],
        "seconds": 2.0,
        "device": "CPU",
        "versions": "Python",
    }
    ended = {"value": accuracies[-1]} if accuracies else {"state": TrialState.PRUNED}
    studies.load(opened, "nas-mnist-retrain").add_trial(create_trial(**ended, user_attrs=attributes))


def test_seed_that_diverged_is_told_and_makes_the_verdict_no(settings, monkeypatch):
    monkeypatch.setattr(retrain, "_read_weights", lambda *_: {})
    add_run(settings.storage, 1, [0.995, 0.995])
    assert bool(retrain.load(settings.storage, "nas-mnist").verdict)
    add_run(settings.storage, 0, [])
    retrained = retrain.load(settings.storage, "nas-mnist")
    assert not retrained.verdict and retrained.diverged == (0,) and [r.seed for r in retrained.runs] == [1]
    assert "✗ not: 1 of 2 seeds diverged (0)" in tables.verdict_lines(retrained).plain
    assert tables.retrained_values(retrained)["verdict"]["fulfilled"] is False
    lines = tables.verdict_lines(replace(retrained, dataset=DATASETS["kmnist"])).plain.splitlines()
    assert lines[-1].startswith("99.50% at worst") and "✓" not in lines[-1] and "Kuzushiji-MNIST" in lines[-1]


def test_candidate_whose_every_seed_diverged_says_so(settings):
    add_run(settings.storage, 0, [])
    with pytest.raises(StudyError, match=r"trial 3 diverged with every seed \(1\)"):
        retrain.load(settings.storage, "nas-mnist")


@pytest.mark.parametrize("began", [True, False])
def test_run_left_by_another_candidate_keeps_its_own_history(settings, monkeypatch, began):
    def in_process(work, workers, on_event):
        for worker in workers:
            work(worker, partial(on_event, worker))

    monkeypatch.setattr(planned, "run_workers", in_process)
    left = {"trial": 3, "search_score": 0.99, "confirmation": None}
    job = {"candidate": CANDIDATE.to_dict(), "seed": 0}
    identity = {"identity": settings.queue.identity}
    studies.create(settings.storage.open(create=True), "nas-mnist-retrain", metric="m", attributes=identity)
    study = studies.load(settings.storage.open(), "nas-mnist-retrain")
    study.enqueue_trial({}, user_attrs={"job": job} | ({"chosen": left} if began else {}))

    other = Chosen(Candidate(parse("c4 M c6 M c10k1- G"), Recipe(epochs=1)), trial=5)
    assert run(replace(settings, chosen=other, n_seeds=1), n_workers=1).trial == 5
    first, second = (trial.user_attrs.get("chosen") for trial in study.get_trials())
    assert first == (left if began else None) and second["trial"] == 5
    (left_behind, *_) = planned.runs_of(retrain.PlannedSeed, study.get_trials())
    assert retrain._last_chosen([left_behind]).trial == (3 if began else None)
