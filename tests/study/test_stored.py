"""A recipe is known again, whichever version of nas-mnist wrote it down."""

import json
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from nas_mnist.errors import StudyError
from nas_mnist.model.architecture import parse
from nas_mnist.stages import confirm, planned, retrain
from nas_mnist.stages.baselines import BaselineSettings
from nas_mnist.stages.confirm import ConfirmSettings
from nas_mnist.stages.retrain import PlannedSeed, RetrainSettings
from nas_mnist.stages.search import SearchSettings, search
from nas_mnist.study import space, stored, studies
from nas_mnist.study.records import PLANNED_RUN, leaderboard
from nas_mnist.study.shared import _queue_failed_again, any_trial
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import Storage
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.recipe import Recipe

CANONICAL = Path(__file__).parents[2] / "studies" / "canonical" / "canonical.db"
CANDIDATE = Candidate(parse("c6 M c8 M c10k1- G"), Recipe())
FIRST_FORM = {
    "epochs": 15,
    "batch_size": 128,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "label_smoothing": 0.0,
    "warmup_fraction": 0.2,
    "augmentation": {"rotation_degrees": 10.0, "translation": 0.06, "scale": 0.1, "shear_degrees": 8.0},
}


@dataclass(frozen=True)
class LaterRecipe(Recipe):
    averaged: bool = False


@dataclass(frozen=True)
class LaterAugmentation(Augmentation):
    erased: float = 0.0


@pytest.fixture
def later(monkeypatch):
    """As a version with two fields more would have it."""
    monkeypatch.setattr(stored, "Recipe", LaterRecipe)
    monkeypatch.setattr(stored, "Augmentation", LaterAugmentation)
    monkeypatch.setattr(stored, "VERSION", stored.VERSION + 1)
    added = {"averaged": False, "augmentation": {"erased": 0.0}}
    monkeypatch.setattr(stored, "ADDED", stored.ADDED | {stored.VERSION: added})


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    return Storage.parse(str(shutil.copy(CANONICAL, tmp_path_factory.mktemp("canonical"))))


def test_every_form_is_read_as_the_recipe_it_was():
    for recipe in (Recipe(), space.RECIPE, Recipe(augmentation=Augmentation(scale=0.3))):
        assert stored.read(json.loads(json.dumps(stored.write(recipe)))) == recipe
    assert stored.read(FIRST_FORM) == Recipe(recalibrated=False)
    assert stored.read(FIRST_FORM | {"calibrated": True}) == Recipe(recalibrated=True)


def test_a_field_that_is_not_of_the_first_form_says_what_all_runs_before_it_had():
    """If this fails: raise `stored.VERSION` and add the new field to `stored.ADDED`."""
    names, augmentations = set(FIRST_FORM), set(FIRST_FORM["augmentation"])
    for added in stored.ADDED.values():
        names |= set(added)
        augmentations |= set(added.get("augmentation", {}))
    assert {stored.STORED_AS.get(field.name, field.name) for field in fields(Recipe)} == names
    assert {field.name for field in fields(Augmentation)} == augmentations
    assert sorted(stored.ADDED) == list(range(2, stored.VERSION + 1))


def test_form_of_a_later_version_is_one_clear_line():
    with pytest.raises(StudyError, match=r"form 99 by a later nas-mnist, .* reads up to \d: upgrade"):
        stored.read(FIRST_FORM | {"version": 99})


def test_fields_that_a_later_version_adds_are_read_with_what_was_there_before(later):
    recipe = stored.read(FIRST_FORM)
    assert (recipe.averaged, recipe.augmentation.erased, recipe.recalibrated) == (False, 0.0, False)
    averaged = replace(recipe, averaged=True, augmentation=LaterAugmentation(erased=0.5))
    assert stored.read(stored.write(averaged)) == averaged != recipe


def test_a_new_field_makes_another_study_only_where_it_is_used(later, monkeypatch):
    before = {optimizer: space.fingerprint(optimizer) for optimizer in space.LEARNING_RATES}
    unused = stored.read(stored.write(space.RECIPE))
    monkeypatch.setattr(space, "RECIPE", unused)
    assert {optimizer: space.fingerprint(optimizer) for optimizer in space.LEARNING_RATES} == before
    for used in (
        replace(unused, averaged=True),
        replace(unused, augmentation=LaterAugmentation(**stored.distinctive(unused)["augmentation"], erased=0.1)),
    ):
        monkeypatch.setattr(space, "RECIPE", used)
        assert space.fingerprint() not in before.values()


def test_baselines_of_earlier_versions_are_of_the_same_recipe(canonical):
    identity = BaselineSettings(canonical).identity
    first_form = {name: value for name, value in FIRST_FORM.items() if name != "epochs"}
    assert identity == {"dataset": "mnist", "train_images": 60_000, **first_form}
    studies._compare("nas-mnist-baselines", identity | {"calibrated": False}, identity)  # as the second form had it


# --- the committed studies -------------------------------------------------------------------------------------------


@pytest.fixture
def nobody_works(monkeypatch):
    def run(*_):
        raise AssertionError("a finished run was taken for another")

    monkeypatch.setattr(planned, "run_workers", run)


@pytest.fixture(params=[False, True], ids=["now", "with fields more"])
def _any_version(request):
    if request.param:
        request.getfixturevalue("later")


@pytest.mark.parametrize(
    ("name", "top"), [("canonical", 8), ("calibrated-2000", 2), ("soap-1000", 1), ("soap-2000", 1), ("soap-4000", 1)]
)
@pytest.mark.usefixtures("_any_version", "nobody_works")
def test_committed_confirmations_are_known_as_finished(canonical, data_dir, name, top):
    before = confirm.ranking(canonical.open(), name)
    settings = ConfirmSettings(canonical, name, top=top, n_folds=4, data_dir=data_dir)
    assert confirm.confirm(settings, [], lambda worker, event: None) == before != []


@pytest.mark.parametrize("name", ["canonical", "soap"])
@pytest.mark.usefixtures("_any_version", "nobody_works")
def test_committed_retrainings_are_known_as_finished(canonical, data_dir, monkeypatch, name):
    monkeypatch.setattr(retrain, "_read_weights", lambda *_: {})  # which are not committed
    (last, *_) = retrain.results(canonical.open(), name)
    chosen = retrain.Chosen(last.candidate, last.trial, last.search_score, last.confirmation)
    settings = RetrainSettings(canonical, name, chosen=chosen, n_seeds=10, data_dir=data_dir)
    assert retrain.retrain(settings, [], lambda worker, event: None).runs == last.runs and len(last.runs) == 10


def test_committed_search_of_an_earlier_space_can_be_read_but_is_not_gone_on_with(canonical, data_dir):
    study = studies.load(canonical.open(), "soap")
    before = len(study.get_trials())
    with pytest.raises(StudyError, match="made with space"):
        search(SearchSettings(canonical, "soap", data_dir=data_dir), [], lambda worker, event: None)
    assert len(study.get_trials()) == before and leaderboard(study.get_trials())[0].value == 0.99615


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING])
def test_failed_run_of_an_earlier_form_is_not_queued_again_beside_one_of_this_form(tmp_path, state):
    opened = Storage.parse(str(tmp_path / "s.db")).open(create=True)
    studies.create(opened, "s", metric="m", attributes={})
    study = studies.load(opened, "s")
    old = {"candidate": {"architecture": str(CANDIDATE.architecture), "recipe": FIRST_FORM}, "seed": 0}
    new = PlannedSeed(CANDIDATE, seed=0).attributes()
    assert new[PLANNED_RUN] != old, "this form is another"
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={PLANNED_RUN: old}))
    study.add_trial(create_trial(state=state, value=0.9 if state == TrialState.COMPLETE else None, user_attrs=new))
    _queue_failed_again(study, any_trial)
    assert len(study.get_trials()) == 2
