import shlex
from dataclasses import asdict, replace
from functools import partial

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

from nas_mnist.data.datasets import DATASETS
from nas_mnist.data.folds import search_split
from nas_mnist.errors import BudgetError, DataError, StudyError
from nas_mnist.model.architecture import Limits, parse
from nas_mnist.stages import search
from nas_mnist.stages.search import SearchSettings
from nas_mnist.stages.trial import EpochTrained, TrialEnded, TrialStarted
from nas_mnist.study import space, studies
from nas_mnist.study.ownership import OWNER, owner
from nas_mnist.study.pruner import RungPruner
from nas_mnist.study.records import CONSTRAINT, TrialRecord, how_far, is_over_budget, n_epochs
from nas_mnist.study.storage import Storage
from nas_mnist.workers.events import Worker

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path, data_dir):
    storage = Storage.parse(str(tmp_path / "s.db"))
    return SearchSettings(storage, n_trials=2, epochs=2, train_images=300, data_dir=data_dir, warm_start=False)


@pytest.fixture
def few(images):
    split = search_split(images, 300)
    return replace(split, val=split.val.part(split.val.indices[::20]))


def ask(settings, **parameters):
    """A trial of a fresh study with these parameters and the lowest of the others."""
    study = optuna.create_study(direction="maximize", pruner=search.pruner(settings))
    lowest = {name: space._lowest(d) for name, d in space.distributions(settings.optimizer).items()}
    study.enqueue_trial(lowest | parameters)
    return study, study.ask()


def test_objective_records_what_was_trained_and_returns_the_last_epochs(settings, few):
    study, trial = ask(settings, convs_1=2, fill=0.1, head="c10- G")
    events = []
    value = search.objective(trial, settings, few, CPU, events.append)
    attributes = study.get_trials()[0].user_attrs
    architecture = parse(attributes["architecture"])
    assert attributes["n_parameters"] == architecture.n_parameters
    assert attributes["n_macs"] == architecture.n_macs
    assert attributes["receptive_field"] == architecture.receptive_field
    assert "torch" in attributes["versions"] and attributes["device"] and attributes["seconds"] > 0
    accuracies = [epoch["eval_accuracy"] for epoch in attributes["epochs"]]
    assert value == pytest.approx(sum(accuracies) / 2)
    assert study.get_trials()[0].intermediate_values == {1: accuracies[0], 2: accuracies[1]}
    assert [type(event) for event in events] == [TrialStarted, EpochTrained, EpochTrained]
    assert study.get_trials()[0].constraints == {CONSTRAINT: architecture.n_parameters - 7999}


def test_of_a_long_search_a_candidate_is_trained_shortly_first_and_stopped_if_others_did_better(settings, few):
    longer = replace(settings, epochs=4)
    study, trial = ask(longer, convs_1=2, fill=0.1)
    events = []
    value = search.objective(trial, longer, few, CPU, events.append)
    study.tell(trial, value)
    assert [(e.epoch.number, e.of) for e in events[1:]] == [(1, 3), (3, 3), (1, 4), (2, 4), (3, 4), (4, 4)]
    first = study.trials[0]
    record = TrialRecord.from_trial(first)
    assert [len(record.short_run), len(record.epochs), n_epochs(first)] == [2, 4, 7]
    assert list(first.intermediate_values) == [0, 1, 2, 3, 4]
    assert record.short_run[-1].learning_rate < record.epochs[2].learning_rate / 10, "the schedule was a whole one"
    trained = (*record.short_run, *record.epochs)
    assert record.seconds == pytest.approx(sum(e.train_seconds + e.eval_seconds for e in trained))

    unbeatable = [asdict(replace(epoch, eval_loss=1e-6)) for epoch in record.short_run]
    as_first = {"params": first.params, "distributions": first.distributions}
    study.add_trial(create_trial(state=TrialState.PRUNED, **as_first, user_attrs={"short_run": unbeatable}))
    study.enqueue_trial(first.params)
    worse = study.ask()
    with pytest.raises(optuna.TrialPruned, match="others did better"):
        search.objective(worse, longer, few, CPU, events.append)
    study.tell(worse, state=TrialState.PRUNED)
    assert n_epochs(study.trials[2]) == 3 and how_far(study.trials[2]) == "after its short run"


def test_nothing_is_trained_shortly_where_nothing_is_pruned(settings, few):
    longer = replace(settings, epochs=4, prune=False)
    study, trial = ask(longer, convs_1=2, fill=0.1)
    search.objective(trial, longer, few, CPU, lambda event: None)
    assert list(study.get_trials()[0].intermediate_values) == [1, 2, 3, 4]


def test_over_budget_candidate_is_recorded_but_never_trained(settings, few):
    tight = replace(settings, max_params=100)
    study, trial = ask(tight, blocks=3, convs_1=4)
    events = []
    with pytest.raises(optuna.TrialPruned, match="over the budget"):
        search.objective(trial, tight, few, CPU, events.append)
    recorded = study.get_trials()[0]
    n_parameters = recorded.user_attrs["n_parameters"]
    assert events == [] and n_parameters >= 100
    assert recorded.constraints == {CONSTRAINT: n_parameters - 99}
    assert set(recorded.params) == set(space.distributions())


@pytest.mark.parametrize(("limits", "name"), [(Limits(max_macs=1000), "macs"), (Limits(max_ram=1000), "ram")])
def test_candidate_over_a_limit_is_recorded_with_its_excess_and_never_trained(settings, few, limits, name):
    tight = replace(settings, limits=limits)
    study, trial = ask(tight, blocks=3, convs_1=4)
    events = []
    with pytest.raises(optuna.TrialPruned, match=f"over the budget of {name}"):
        search.objective(trial, tight, few, CPU, events.append)
    recorded = study.get_trials()[0]
    architecture = parse(recorded.user_attrs["architecture"])
    excess = {"macs": architecture.n_macs, "ram": architecture.ram}[name] - 1000
    assert events == [] and recorded.constraints[name] == excess > 0
    assert recorded.constraints[CONSTRAINT] == architecture.n_parameters - 7999 and is_over_budget(recorded)


@pytest.mark.parametrize(("max_params", "feasible"), [(0, False), (1, True)])
def test_budget_is_strictly_fewer(settings, few, max_params, feasible):
    _, trial = ask(settings)
    n = space.to_candidate(trial.user_attrs | _lowest(), max_params=8000, epochs=2).architecture.n_parameters
    limited = replace(settings, max_params=n + max_params, epochs=1)
    _, trial = ask(limited)
    if feasible:
        assert search.objective(trial, limited, few, CPU, lambda event: None) > 0
    else:
        with pytest.raises(optuna.TrialPruned):
            search.objective(trial, limited, few, CPU, lambda event: None)


def _lowest():
    return {name: space._lowest(d) for name, d in space.distributions().items()}


def test_loss_that_is_not_finite_prunes_with_the_reason(settings, few, monkeypatch):
    """As a rate does that throws the weights to infinity."""
    monkeypatch.setattr("nas_mnist.training.loop.learning_rates", lambda recipe, n_steps: [float("inf")] * n_steps)
    study, trial = ask(settings)
    with pytest.raises(optuna.TrialPruned):
        search.objective(trial, settings, few, CPU, lambda event: None)
    assert "loss was nan in epoch 1" in study.get_trials()[0].user_attrs["reason"]


def test_pruner_can_be_switched_off(settings):
    assert isinstance(search.pruner(settings), RungPruner)
    assert isinstance(search.pruner(replace(settings, prune=False)), optuna.pruners.NopPruner)


@pytest.mark.parametrize("name", ["evolution", "tpe", "random"])
def test_every_sampler_draws_networks_that_use_the_budget(settings, name):
    wanted = replace(settings, sampler=name, max_params=2000)
    study = optuna.create_study(direction="maximize", sampler=search.sampler(wanted, 0))
    for _ in range(3):
        drawn = search.to_candidate(wanted, space.suggest(study.ask(), wanted.optimizer)).architecture
        assert 0.95 * 2000 < drawn.n_parameters < 2000


def test_search_trains_exactly_the_asked_number_and_resumes(settings):
    events = []

    def run(n):
        workers = [Worker(0, "cpu"), Worker(1, "cpu")]
        small = replace(settings, n_trials=n, max_params=400)
        return search.search(small, workers, lambda worker, event: events.append(event))

    first = run(3)
    assert first.counts.trained == 3 and first.counts.running == first.counts.failed == 0
    assert len([event for event in events if isinstance(event, TrialEnded) and not event.over_budget]) == 3
    assert first.best[0].value >= first.best[-1].value
    assert first.overhead is not None and 0 < first.overhead < 1
    again = run(3)
    assert again.counts == first.counts and again.epochs_trained == first.epochs_trained
    assert again.overhead is None, "nothing was trained"
    assert run(4).counts.trained == 4


def test_no_more_workers_start_than_there_are_trials_left(settings):
    started = []

    def run(work, workers, on_event):
        started.append(len(workers))
        for worker in workers:
            work(worker, partial(on_event, worker))

    def search_with(n_trials):
        given = replace(settings, n_trials=n_trials, epochs=1)
        return search.search(given, [Worker(i, "cpu") for i in range(8)], lambda worker, event: None, run)

    assert search_with(1).counts.trained == 1 and started == [1]
    assert search_with(1).counts.trained == 1 and started == [1], "nothing is left to do"
    assert search_with(3).counts.trained == 3 and started == [1, 2]


def test_reference_systems_are_enqueued_once_and_first(settings):
    for _ in range(2):
        search._prepare_study(replace(settings, warm_start=True, n_trials=100))
    trials = studies.load(settings.storage.open(), settings.study_name).get_trials()
    names = [trial.user_attrs["reference"] for trial in trials]
    assert set(names) >= {"step-by-step", "lite-m4", "era1a7", "eva-drilldown"} and len(names) == len(set(names))
    first = trials[names.index("step-by-step")].system_attrs["fixed_params"]
    candidate = space.to_candidate(first, max_params=8000, epochs=2)
    assert candidate.architecture.line == "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1-"


def test_no_more_reference_systems_are_queued_than_may_be_trained_and_a_later_search_queues_the_rest(settings):
    def queued(n_trials):
        search._prepare_study(replace(settings, warm_start=True, n_trials=n_trials))
        return [trial.user_attrs["reference"] for trial in _trials(settings)]

    everything = list(search.reference_parameters(settings.max_params, space.reference_recipe()))
    assert len(everything) > 5
    for n_trials, n_queued in ((3, 3), (3, 3), (2, 3), (5, 5), (100, None)):
        assert queued(n_trials) == everything[:n_queued]


def test_trials_that_are_trained_or_under_way_leave_no_room_for_reference_systems(settings):
    search._prepare_study(settings)
    study = studies.load(settings.storage.open(), settings.study_name)
    study.add_trial(optuna.trial.create_trial(value=0.9))
    study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={OWNER: owner()}))
    search._prepare_study(replace(settings, warm_start=True, n_trials=4))
    assert [trial.state.name for trial in _trials(settings)] == ["COMPLETE", "RUNNING", "WAITING", "WAITING"]


def _trials(settings):
    return studies.load(settings.storage.open(), settings.study_name).get_trials()


@pytest.mark.parametrize(
    ("n_asked", "states", "finished"),
    [
        (3, "CCP", True),
        (3, "CCPW", True),  # what an earlier, larger search had queued
        (4, "CCPW", False),
        (3, "CCPR", False),
        (3, "CC", False),
        (None, "CCPW", True),
        (None, "CCPR", False),
    ],
)
def test_search_is_finished_when_it_has_the_trials_it_was_asked_for(n_asked, states, finished):
    study = optuna.create_study()
    of = {"C": TrialState.COMPLETE, "P": TrialState.PRUNED, "W": TrialState.WAITING, "R": TrialState.RUNNING}
    for letter in states:
        study.add_trial(optuna.trial.create_trial(state=of[letter], value=0.9 if letter == "C" else None))
    if n_asked:
        study.set_user_attr(search.N_TRIALS, n_asked)
    assert search.is_finished(study) == finished


@pytest.mark.parametrize("max_params", [500, 1000, 5000])
def test_reference_systems_over_the_budget_are_narrowed_to_it(max_params):
    points = search.reference_parameters(max_params, space.reference_recipe(size=max_params))
    assert len(points) == len(search.reference_parameters(8000, space.reference_recipe()))
    assert ("era1a7" in points) == (max_params == 5000) and "step-by-step, narrowed" in points
    counts = [
        space.to_candidate(parameters, max_params=max_params, epochs=15).architecture.n_parameters
        for parameters in points.values()
    ]
    assert 0.95 * max_params < max(counts) < max_params


def test_reference_systems_that_cannot_be_narrowed_are_left_out():
    assert search.reference_parameters(60, space.reference_recipe(size=60)) == {}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_params": 20}, BudgetError, "the smallest network of the space has 7[0-9]"),
        ({"train_images": 50_001}, DataError, "2 to 50,000"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, change, error, message):
    with pytest.raises(error, match=message):
        search.search(replace(settings, **change), [Worker(0, "cpu")], lambda worker, event: None)
    assert not settings.storage.path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"max_params": 7000},
        {"epochs": 3},
        {"train_images": 200},
        {"optimizer": "adamw"},
        {"dataset": DATASETS["qmnist"]},
    ],
)
def test_study_of_another_search_is_refused(settings, change):
    search._prepare_study(settings)
    with pytest.raises(StudyError, match="cannot be compared"):
        search._prepare_study(replace(settings, **change))


def test_identity_of_a_search_on_mnist_is_that_of_the_studies_there_are(settings):
    assert asdict(replace(settings, train_images=None, epochs=15).identity) == {
        "dataset": "mnist",
        "max_params": 8000,
        "epochs": 15,
        "train_images": 50_000,
        "split": "fold 0 of 6, partition 0",
        "optimizer": "soap",
        "space": space.fingerprint("soap"),
        "max_macs": None,  # which an older study does not name: no limit, either way
        "max_ram": None,
    }
    assert replace(settings, dataset=DATASETS["emnist-digits"], train_images=None).identity.train_images == 200_000


def test_same_seed_same_trial(settings, few):
    def value(seed):
        _, trial = ask(settings, convs_2=2)
        return search.objective(trial, replace(settings, seed=seed), few, CPU, lambda event: None)

    assert value(1) == value(1) != value(2)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({}, ""),
        ({"max_params": 1000, "prune": False}, " --max-params 1000 --no-prune"),
        ({"dataset": DATASETS["kmnist"], "study_name": "nas-kmnist", "seed": 3}, " --dataset kmnist --seed 3"),
        ({"keep_weights": 0, "epochs": 5}, " --keep-weights 0 --epochs 5"),
        ({"study_name": "it's", "warm_start": False}, """ --study 'it'"'"'s' --no-warm-start"""),
    ],
)
def test_command_of_a_search_asks_for_the_same_again_and_hides_the_password(change, options):
    settings = SearchSettings(Storage("postgresql+psycopg://me:secret@host/db"), n_trials=7)
    command = replace(settings, **change).command
    assert "secret" not in command and command.startswith(
        "nas-mnist search --storage 'postgresql+psycopg://me:***@host/db'"
    )
    assert sorted(shlex.split(command)[4:]) == sorted(shlex.split("--trials 7" + options))


def test_smallest_network_is_named_where_a_limit_cannot_be_met():
    for limits, what in ((Limits(max_macs=100), "multiply-adds"), (Limits(max_ram=100), "bytes of RAM")):
        with pytest.raises(BudgetError, match=rf"^a budget of 100 {what} cannot be met; the smallest .* takes [\d,]+:"):
            search.check_budget(8000, limits)
    smallest = Limits(space.smallest(lambda a: a.n_macs), space.smallest(lambda a: a.ram))
    search.check_budget(8000, smallest)


def test_limits_are_part_of_the_identity_and_of_the_command():
    settings = SearchSettings(Storage.parse("x.db"), limits=Limits(max_ram=20_000))
    assert settings.identity.max_ram == 20_000 and settings.identity.max_macs is None
    assert settings.command.endswith("--max-ram 20000")
