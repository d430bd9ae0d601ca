from dataclasses import replace
from functools import partial

import pytest
import torch
from optuna.trial import TrialState, create_trial

from nas_mnist.data.folds import fold, n_fold_images
from nas_mnist.errors import DataError, StudyError, TrainingDiverged
from nas_mnist.model.architecture import parse
from nas_mnist.stages import confirm, planned
from nas_mnist.stages.confirm import Confirmed, ConfirmSettings
from nas_mnist.study import ownership, studies
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import Storage
from nas_mnist.training.loop import EpochResult
from nas_mnist.training.recipe import Recipe
from nas_mnist.workers.events import Worker

LINES = ("c6 M c8 M c10k1- G", "c4 M c6 M c10k1- G", "c5 M c7 M c10k1- G")


@pytest.fixture
def settings(tmp_path, monkeypatch, data_dir):
    """A searched study of three candidates; pairs get accuracies from a script instead of training."""

    def in_process(work, workers, on_event):
        for worker in workers:
            work(worker, partial(on_event, worker))

    monkeypatch.setattr(planned, "run_workers", in_process)
    storage = Storage.parse(str(tmp_path / "s.db"))
    studies.create(storage.open(create=True), "nas-mnist", metric="m", attributes={})
    searched = studies.load(storage.open(), "nas-mnist")
    for line, score in zip(LINES, (0.99, 0.98, 0.97), strict=True):
        candidate = Candidate(parse(line), Recipe(epochs=1))
        searched.add_trial(create_trial(value=score, user_attrs=candidate.to_dict()))
    return ConfirmSettings(storage, top=3, n_folds=6, data_dir=data_dir)


def script(monkeypatch, accuracy):
    """Let `accuracy(line, fold, seed)` stand for a training run; the pairs that were asked for."""
    asked = []

    def train_pair(settings, candidate, images, number, seed, trial, send):
        asked.append((candidate.architecture.line, number, seed))
        return accuracy(candidate.architecture.line, number, seed)

    monkeypatch.setattr(confirm, "_train_pair", train_pair)
    return asked


def run(settings):
    return confirm.confirm(settings, [Worker(0, "cpu")], lambda worker, event: None)


def test_candidates_are_ranked_by_their_mean_and_optimism_is_the_difference(settings, monkeypatch):
    base = dict(zip(LINES, (0.90, 0.95, 0.93), strict=True))
    asked = script(monkeypatch, lambda line, k, seed: base[line] + 0.001 * k)
    ranking = run(replace(settings, n_folds=2, n_seeds=2))
    assert [c.trial for c in ranking] == [1, 2, 0]
    assert ranking[0].mean == pytest.approx(0.9505) and ranking[0].optimism == pytest.approx(0.98 - 0.9505)
    assert [pair[1:] for pair in asked if pair[0] == LINES[0]] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert run(replace(settings, n_folds=2, n_seeds=2)) == ranking and len(asked) == 12


def test_hopeless_candidate_is_given_up_early_and_ranked_behind(settings, monkeypatch):
    base = dict(zip(LINES, (0.99, 0.50, 0.98), strict=True))
    asked = script(monkeypatch, lambda line, k, seed: base[line] + 0.001 * (k * 7 % 5))
    ranking = run(settings)
    hopeless = next(c for c in ranking if c.trial == 1)
    assert hopeless.given_up and len(hopeless.accuracies) < 6 and ranking[0].trial == 0
    assert len([pair for pair in asked if pair[0] == LINES[0]]) == 6


@pytest.mark.parametrize("diverged", [0, 2])
def test_candidate_that_diverges_is_given_up_and_the_others_go_on(settings, monkeypatch, diverged):
    def accuracy(line, k, seed):
        if line == LINES[0] and k == diverged:
            raise TrainingDiverged("the training loss was nan in epoch 15: lower the learning rate")
        return 0.9 + 0.001 * k

    script(monkeypatch, accuracy)
    ranking = run(replace(settings, n_folds=4))
    assert [c.given_up for c in ranking] == [False, False, True]
    assert ranking[-1].trial == 0 and ranking[-1].accuracies[diverged:] == (0.0,)
    assert run(replace(settings, n_folds=4)) == ranking


def test_interrupted_candidate_goes_on_with_the_next_pair(settings, monkeypatch):
    def crash_at_third(line, k, seed):
        if k == 2:
            raise SystemExit  # as a killed process: the trial stays running
        return 0.9

    one = replace(settings, top=1, n_folds=4)
    script(monkeypatch, crash_at_third)
    with pytest.raises(SystemExit):
        run(one)
    monkeypatch.setattr(ownership, "_started", lambda pid: 0.0)  # its process is gone
    asked = script(monkeypatch, lambda line, k, seed: 0.9)
    (confirmed,) = run(one)
    assert [k for _, k, _ in asked] == [2, 3] and len(confirmed.accuracies) == 4


def test_other_folds_are_another_confirmation(settings, monkeypatch):
    script(monkeypatch, lambda line, k, seed: 0.9)
    run(replace(settings, n_folds=2))
    with pytest.raises(StudyError, match="folds 2, not 3"):
        run(replace(settings, n_folds=3))


def test_study_without_finished_candidates_says_what_to_do(settings):
    studies.create(settings.storage.open(), "empty", metric="m", attributes={})
    with pytest.raises(StudyError, match="nas-mnist search"):
        run(replace(settings, study_name="empty"))


def test_real_training_of_a_pair_uses_the_fold(settings, images):
    candidate = Candidate(parse(LINES[0]), Recipe(epochs=1))
    few = replace(settings, train_images=400)
    events = []
    args = (few, candidate, images)
    first, same, other = (confirm._train_pair(*args, k, 0, 0, events.append) for k in (0, 0, 1))
    assert first == same != other and len(events) == 3


@pytest.mark.parametrize(("n_folds", "asked", "n"), [(6, 30_000, 30_000), (6, 3_000, 3_000), (7, 999, 999)])
def test_a_pair_trains_on_as_many_images_as_were_asked_for_and_as_many_of_each_class(
    settings, images, monkeypatch, n_folds, asked, n
):
    trained_on = []

    def train(network, recipe, train_images, val_images, *, seed):
        trained_on.append(train_images)
        yield EpochResult(1, 0.1, 0.9, 0.1, 0.9, 0.1, 1.0, 1.0)

    monkeypatch.setattr(confirm, "train", train)
    candidate = Candidate(parse(LINES[0]), Recipe(epochs=1))
    for change in ({"train_images": asked}, {}):
        given = replace(settings, n_folds=n_folds, **change)
        confirm._train_pair(given, candidate, images, 0, 0, 0, lambda event: None)
    part, everything = trained_on
    assert len(part) == n == len(set(part.indices.tolist())) and set(part.indices.tolist()) < set(
        everything.indices.tolist()
    )
    exact = torch.bincount(images.labels[everything.indices]) * n / len(everything)
    assert (torch.bincount(images.labels[part.indices]) - exact).abs().max() <= 1


@pytest.mark.parametrize(
    ("n_folds", "asked", "most"),
    [(6, 1_000_000, "50,000"), (2, 30_001, "30,000"), (7, 51_429, "51,428"), (6, 1, "50,000")],
)
def test_more_images_than_a_fold_has_are_refused_before_anything_is_written(settings, n_folds, asked, most):
    before = settings.storage.path.read_bytes()
    with pytest.raises(DataError, match=f"2 to {most} training images to choose from, not {asked:,}"):
        run(replace(settings, n_folds=n_folds, train_images=asked))
    assert settings.storage.path.read_bytes() == before
    assert studies.names(settings.storage.open()) == ["nas-mnist"]


def test_quick_look_of_another_selection_of_images_is_another_confirmation(settings, monkeypatch):
    script(monkeypatch, lambda line, k, seed: 0.9)
    quick = replace(settings, n_folds=2, train_images=3000)
    identity = {"dataset": "mnist", "folds": 2, "seeds": 1, "train_images": 3000, "partition": 1}
    attributes = {"identity": identity}  # as it was when 3,125 were trained on
    studies.create(settings.storage.open(), "nas-mnist-confirm", metric="m", attributes=attributes)
    with pytest.raises(StudyError, match="results of both cannot be compared"):
        run(quick)


def test_as_many_images_as_the_smallest_fold_leaves_can_be_trained_on(settings, images):
    sizes = [len(fold(images, k, partition=confirm.CONFIRM_PARTITION, n_folds=7).train) for k in range(7)]
    assert min(sizes) == n_fold_images(settings.dataset, 7) == 51_428


def made(*accuracies):
    return Confirmed(0, "", 1, 0.99, accuracies, 6, 1, False)


def test_lead_is_a_paired_test():
    steady = made(0.990, 0.980, 0.985, 0.992, 0.970, 0.988)
    assert confirm.lead(steady, made(*(a - 0.001 for a in steady.accuracies))) < 0.05
    assert confirm.lead(steady, made(*(a + (-1) ** i * 0.001 for i, a in enumerate(steady.accuracies)))) > 0.3
    assert confirm.lead(steady, steady) is None
    assert confirm.lead(steady, made(*steady.accuracies[:3])) is None


def test_failed_trials_are_no_confirmation(settings):
    studies.create(settings.storage.open(), "nas-mnist-confirm", metric="m", attributes={})
    studies.load(settings.storage.open(), "nas-mnist-confirm").add_trial(create_trial(state=TrialState.FAIL))
    assert confirm.ranking(settings.storage.open(), "nas-mnist") == []
