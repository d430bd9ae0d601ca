import json
import math
from dataclasses import replace
from functools import partial

import pytest
from optuna.trial import TrialState, create_trial

from nas_mnist.cli.main import main
from nas_mnist.errors import ArchitectureError, StudyError
from nas_mnist.model.architecture import parse
from nas_mnist.model.zoo import ZOO
from nas_mnist.stages import ablate, planned
from nas_mnist.stages.ablate import AblateSettings, Change, changes, compare, ladder
from nas_mnist.study import studies
from nas_mnist.study.records import TrialRecord
from nas_mnist.study.space import Candidate, reference_recipe
from nas_mnist.study.storage import Storage
from nas_mnist.training.loop import EpochResult
from nas_mnist.workers.events import Worker

TINY = Candidate(parse("c4 M c6 M c10k1- G"), reference_recipe(epochs=1))
OTHER = Candidate(parse("c5 M c6 M c10k1- G"), reference_recipe(epochs=1))


@pytest.fixture
def settings(tmp_path, monkeypatch, data_dir):
    def in_process(work, workers, on_event):
        for worker in workers:
            work(worker, partial(on_event, worker))

    monkeypatch.setattr(planned, "run_workers", in_process)
    rows = (Change("as it is", TINY), Change("wider", OTHER))
    return AblateSettings(
        storage=Storage.parse(str(tmp_path / "s.db")), rows=rows, n_folds=2, train_images=200, data_dir=data_dir
    )


def run(settings):
    return ablate.ablate(settings, [Worker(0, "cpu")], lambda worker, event: None)


def trial(candidate, fold, accuracy, loss=0.02, state=TrialState.COMPLETE):
    epoch = EpochResult(1, 0.1, 0.9, loss, accuracy, 0.01, 1.0, 1.0)
    attributes = ablate.PlannedChange(candidate, seed=0, fold=fold).attributes()
    return create_trial(
        state=state,
        value=accuracy if state == TrialState.COMPLETE else None,
        user_attrs=attributes | {"epochs": [epoch.__dict__]},
    )


def test_every_thing_is_changed_one_at_a_time():
    candidate = Candidate(ZOO["era1a7"].architecture, reference_recipe())
    rows = changes(candidate)
    names = [row.name for row in rows]
    assert names[:10] == [
        "as it is",
        "no augmentation",
        "constant rate of 0.003",
        "sgd instead of soap",
        "adamw instead of soap",
        "norms not recalibrated",
        "dropout of 0.05",
        "deskewed",
        "no norms, biases instead",
        "norm before ReLU",
    ]
    assert rows[0].candidate == candidate and len(set(names)) == len({row.candidate for row in rows}) == len(rows)
    for row in rows[1:]:
        same = (row.candidate.architecture == candidate.architecture, row.candidate.recipe == candidate.recipe)
        assert sum(same) == 1


def test_network_that_lacks_a_thing_gets_it():
    recipe = replace(reference_recipe("sgd"), schedule="constant", recalibrated=False)
    names = [row.name for row in changes(Candidate(parse("c8r M c8r G c10k1- | dropout=0.1"), recipe))]
    assert {"no dropout", "norms recalibrated", "soap instead of sgd"} <= set(names)
    assert not any("norms, biases" in name or "constant" in name or "ReLU before" in name for name in names)


def test_activation_is_changed_where_any_may_stand():
    def names(line):
        return {row.name for row in changes(Candidate(parse(line), reference_recipe()))}

    assert {"hard-swish instead of ReLU", "ReLU before norm"} <= names("c8 M c8 G c10k1-")
    assert {"ReLU instead of hard-swish", "not deskewed"} <= names("c8 M c8 G c10k1- | hardswish deskew")
    assert not any("ReLU before" in name for name in names("c8 M c8 G c10k1- | hardswish"))
    assert not any("hard-swish" in name for name in names("c8 M c8 G c10k1- | act-norm"))


def test_differences_are_paired_by_fold():
    trials = [trial(TINY, 0, 0.90, 0.03), trial(TINY, 1, 0.80, 0.05), trial(OTHER, 1, 0.83, 0.04)]
    trials += [trial(OTHER, 0, 0.92, 0.029), trial(TINY, 2, 0.5)]
    base, other = compare([Change("as it is", TINY), Change("wider", OTHER)], trials)
    assert base.difference is None and base.accuracy == pytest.approx(2.2 / 3)
    d = other.difference
    assert (d.n, d.accuracy, d.accuracy_error) == (2, pytest.approx(0.025), pytest.approx(0.005))
    assert d.loss == pytest.approx(-0.0055) and 0.1 < d.p < 0.2 and not d.significant


def test_single_pair_has_no_error_and_a_row_that_was_not_trained_no_difference():
    trials = [trial(TINY, 0, 0.90), trial(OTHER, 0, 0.92)]
    rows = [
        Change("as it is", TINY),
        Change("wider", OTHER),
        Change("third", Candidate(parse("G c10k1-"), TINY.recipe)),
    ]
    _, one, none = compare(rows, trials)
    assert math.isnan(one.difference.p) and math.isnan(one.difference.accuracy_error) and not one.difference.significant
    assert none.difference is None and none.accuracy is None
    assert json.loads(json.dumps(one.to_dict()))["difference"]["p"] is None


def test_ladder_is_compared_step_by_step():
    third = Candidate(parse("c6 M c6 M c10k1- G"), TINY.recipe)
    trials = [trial(c, 0, a) for c, a in ((TINY, 0.8), (OTHER, 0.9), (third, 0.95))]
    rows = [Change(str(i), c) for i, c in enumerate((TINY, OTHER, third))]
    climbed = compare(rows, trials, climbing=True)
    assert [row.difference and round(row.difference.accuracy, 3) for row in climbed] == [None, 0.1, 0.05]
    assert [row.name for row in ladder("step-by-step", 3)] == ["skeleton", "+ capacity, augmentation", "+ OneCycleLR"]
    assert ladder("step-by-step", 3)[0].candidate.recipe.schedule == "constant"
    assert not ladder("step-by-step", 3)[0].candidate.recipe.augmentation
    with pytest.raises(ArchitectureError, match="choose one of eva-drilldown, step-by-step"):
        ladder("era1a7", 15)


def test_run_that_diverges_is_counted_and_not_compared():
    trials = [trial(TINY, 0, 0.9), trial(OTHER, 0, 0.1, state=TrialState.PRUNED)]
    _, other = compare([Change("as it is", TINY), Change("wider", OTHER)], trials)
    assert other.n_diverged == 1 and other.outcomes == () and other.difference is None


def test_it_trains_in_pairs_keeps_what_is_done_and_goes_on(settings):
    first = run(settings)
    assert [len(row.outcomes) for row in first] == [2, 2] and first[1].difference.n == 2
    study = studies.load(settings.storage.open(), "nas-mnist-ablate")
    records = [TrialRecord.from_trial(t) for t in study.get_trials()]
    assert [t.user_attrs["change"] for t in study.get_trials()] == ["as it is", "wider", "as it is", "wider"]
    assert all(record.epochs for record in records)
    assert run(settings) == first and len(study.get_trials()) == 4
    more = run(replace(settings, n_seeds=2))
    assert [len(row.outcomes) for row in more] == [4, 4] and len(study.get_trials()) == 8
    with pytest.raises(StudyError, match="was made with folds 2, not 3"):
        run(replace(settings, n_folds=3))


def test_run_that_another_ablation_left_in_the_queue_is_trained_too(settings):
    run(replace(settings, rows=settings.rows[:1]))
    study = studies.load(settings.storage.open(), "nas-mnist-ablate")
    third = Candidate(parse("c7 M c6 M c10k1- G"), reference_recipe(epochs=1))
    study.enqueue_trial({}, user_attrs=ablate.PlannedChange(third, seed=0, fold=0).attributes())
    run(settings)
    left = studies.load(settings.storage.open(), "nas-mnist-ablate").trials[2]
    assert left.state == TrialState.COMPLETE and left.user_attrs["change"] == "c7 M c6 M c10k1- G"


def test_results_are_found_again_by_the_candidate(settings):
    rows = changes(TINY)[:3]
    run(replace(settings, rows=rows))
    opened = settings.storage.open()
    found = ablate.results_of(opened, "nas-mnist", [OTHER, TINY])
    assert [row.change.name for row in found] == [row.name for row in rows]
    assert ablate.results_of(opened, "nas-mnist", [OTHER]) == ()
    assert ablate.results_of(opened, "another", [TINY]) == ()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["era1a7", "--trial", "1"],
        ["era1a7", "--ladder", "step-by-step"],
        ["--ladder", "era1a7"],
        ["--trial", "0", "--epochs", "3"],
        ["--solution", "nowhere"],
        ["era1a7", "--out", "figure.doc"],
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, data_dir):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("nas-mnist: ") and said.err.count("\n") == 1 and not said.out
    assert list(tmp_path.iterdir()) == []
