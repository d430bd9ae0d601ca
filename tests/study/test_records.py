import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

from nas_mnist.errors import StudyError
from nas_mnist.model.architecture import parse
from nas_mnist.stages.confirm import PlannedConfirmation
from nas_mnist.stages.trial import device_name, record, versions
from nas_mnist.study.records import (
    PLANNED_RUN,
    TrialRecord,
    ancestors,
    leaderboard,
    origin_attributes,
    planned_values,
    warm_start_attributes,
    write_epochs,
    write_excess,
    write_origin,
    write_reason,
    written,
)
from nas_mnist.study.space import Candidate
from nas_mnist.training.loop import EpochResult
from nas_mnist.training.recipe import Recipe

CANDIDATE = Candidate(parse("c6 M c8 M c10k1- G"), Recipe(epochs=2))
EPOCHS = tuple(EpochResult(n, 0.5, 0.8, 0.4, 0.9, 0.01, 2.0, 0.5) for n in (1, 2))


def test_what_is_written_of_a_trial_is_read_back():
    study = optuna.create_study()
    trial = study.ask()
    record(trial, CANDIDATE, 750, 7, torch.device("cpu"))
    write_excess(trial, 750, 700, {"macs": -5})
    write_epochs(trial, EPOCHS)
    write_reason(trial, "loss was nan in epoch 3")
    read = TrialRecord.from_trial(study.trials[0])
    assert (read.number, read.architecture, read.candidate) == (0, "c6 M c8 M c10k1- G", CANDIDATE)
    assert (read.n_parameters, read.excess, read.seed) == (750, {"parameters": 51}, 7)
    assert (read.epochs, read.seconds, read.reason) == (EPOCHS, 5.0, "loss was nan in epoch 3")
    assert (read.device, read.versions) == (device_name(torch.device("cpu")), versions())


def test_trial_that_has_written_nothing_has_a_record_without_values():
    read = TrialRecord.from_trial(create_trial(state=TrialState.WAITING))
    assert (read.architecture, read.n_parameters, read.seconds, read.epochs) == (None, None, 0.0, ())
    assert (read.reason, read.reference, read.process, read.excess) == (None, None, "unknown", {})


def test_where_a_trial_comes_from_is_read_back_of_warm_starts_of_earlier_versions_too():
    study = optuna.create_study()
    write_origin(study.ask(), "drawn by tpe")
    study.enqueue_trial({}, user_attrs=warm_start_attributes("era1a7"))
    study.enqueue_trial({}, user_attrs=origin_attributes("mutation of trial 1: blocks 2 → 3", 1))
    study.enqueue_trial({}, user_attrs={"reference": "lite-m1"})
    study.enqueue_trial({})
    read = [TrialRecord.from_trial(trial) for trial in study.trials]
    origins = ["drawn by tpe", "era1a7", "mutation of trial 1: blocks 2 → 3", "lite-m1", ""]
    assert [record.origin for record in read] == origins
    assert [record.reference for record in read] == [None, "era1a7", None, "lite-m1", None]
    assert [record.parent for record in read] == [None, None, 1, None, None]
    assert [trial.number for trial in ancestors(study.trials[2], study.trials)] == [1, 2]


def test_planned_run_is_the_same_after_the_database_and_stored_as_earlier_versions_stored_it():
    run = PlannedConfirmation(trial=3, search_score=0.99, candidate=CANDIDATE)
    assert run.attributes() == {PLANNED_RUN: {"trial": 3, "search_score": 0.99, "candidate": CANDIDATE.to_dict()}}
    trial = create_trial(value=0.9, user_attrs=run.attributes())
    assert PlannedConfirmation.of(trial) == run
    assert planned_values(trial) == {"trial": 3, "search_score": 0.99, "candidate": CANDIDATE}
    assert planned_values(create_trial(value=0.9)) == {}


def test_what_every_finished_trial_has_and_this_one_lacks_is_one_clear_line():
    assert written(0.0) == 0.0
    with pytest.raises(StudyError, match="lacks what every finished one has: the database is damaged"):
        written(None)


def test_leaderboard_has_finished_trials_within_the_budget_the_best_first():
    trials = [
        create_trial(value=0.97),
        create_trial(value=0.99),
        create_trial(value=0.999, constraints={"parameters": 1.0}),
        create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.995}),
    ]
    assert [trial.value for trial in leaderboard(trials)] == [0.99, 0.97]
