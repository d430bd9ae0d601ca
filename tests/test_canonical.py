"""The committed studies, the solution, and what the READMEs say of them."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from nas_mnist.solution import predict
from nas_mnist.stages import confirm, retrain
from nas_mnist.study import studies
from nas_mnist.study.records import TrialCounts, TrialRecord, ancestors
from nas_mnist.study.storage import Storage
from nas_mnist.task import MAX_PARAMS, TARGET_ACCURACY

ROOT = Path(__file__).parents[1]
CANONICAL, UNAIDED = (ROOT / "studies" / name for name in ("canonical", "unaided"))
WINNERS_STUDY = "soap"
N_SEEDS = 10


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A copy: SQLite writes into a file that is only read, too."""
    return Storage.parse(str(shutil.copy(CANONICAL / "canonical.db", tmp_path_factory.mktemp("canonical"))))


@pytest.fixture(scope="module")
def retrained(storage):
    return retrain.results(storage.open(), WINNERS_STUDY)[0]


def test_three_hundred_trials_were_trained_and_none_is_left(storage):
    now = TrialCounts.of(studies.load(storage.open(), "canonical").get_trials(deepcopy=False))
    assert (now.trained, now.running, now.waiting) == (300, 0, 0)


def test_the_winner_is_the_first_of_the_confirmation(storage, retrained):
    ranking = confirm.ranking(storage.open(), WINNERS_STUDY)
    assert retrained.trial == ranking[0].trial
    written = json.loads((CANONICAL / "confirmation.json").read_text())
    assert [c["trial"] for c in written] == [c.trial for c in ranking]
    for earlier in ("canonical", "calibrated"):
        assert ranking[0].mean > confirm.ranking(storage.open(), earlier)[0].mean


def test_the_readmes_tell_the_result_of_all_seeds(retrained):
    assert len(retrained.runs) == N_SEEDS and not retrained.diverged
    result = f"{100 * retrained.mean:.2f} ± {100 * retrained.standard_deviation:.2f} %"
    worst = f"{100 * retrained.verdict.worst_of_last:.2f} %"
    for readme in (ROOT / "README.md", CANONICAL / "README.md"):
        assert result in readme.read_text() and worst in readme.read_text(), f"{result}, {worst}: {readme}"
        assert f"`{retrained.candidate.architecture}`" in readme.read_text()
    assert retrained.verdict.n_parameters < MAX_PARAMS


def test_the_solution_is_the_first_seed_of_the_winner_and_does_what_was_recorded(retrained, data_dir):
    predict.check(CANONICAL / "solution")
    accuracy = predict.accuracy_on_test_set(CANONICAL / "solution", data_dir)
    assert accuracy == retrained.runs[0].accuracy >= TARGET_ACCURACY


def test_pictures_of_the_readme_can_be_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "studies")
    pictures = importlib.import_module("pictures")
    copies = {path: Storage.parse(shutil.copy(path, tmp_path)) for path, *_ in pictures.FOUND}
    (axes,) = pictures.draw_result(copies).axes
    told = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"found unaided: 99.58 ± 0.06 %, n = 10", "found unaided below 2,000: 99.42 ± 0.07 %, n = 5"} < set(told)
    assert "found unaided below 1,000: 99.11 ± 0.06 %, n = 5" in told
    assert "8/100" in pictures.record_search(copies[UNAIDED / "unaided.db"]).export_text()


@pytest.mark.parametrize(("name", "n_seeds"), [("unaided.db", 10), ("below-2000.db", 5), ("below-1000.db", 5)])
def test_unaided_study_is_what_its_readmes_tell(name, n_seeds, tmp_path):
    """All of its trials were drawn or descend from such, and its winner was confirmed before it met the test set."""
    opened = Storage.parse(str(shutil.copy(UNAIDED / name, tmp_path))).open()
    trials = studies.load(opened, "nas-mnist").get_trials(deepcopy=False)
    assert TrialCounts.of(trials).trained == 100
    for trial in trials:
        assert TrialRecord.from_trial(ancestors(trial, trials)[0]).origin == "random"
    ranking = confirm.ranking(opened, "nas-mnist")
    (retrained,) = retrain.results(opened, "nas-mnist")
    assert retrained.trial == ranking[0].trial and len(retrained.runs) == n_seeds and not retrained.diverged
    told = [f"{100 * retrained.mean:.2f} ± {100 * retrained.standard_deviation:.2f} %"]
    told += [f"{100 * retrained.verdict.worst_of_last:.2f} %", f"`{retrained.candidate.architecture}`"]
    confirmed = f"{100 * ranking[0].mean:.2f} ± {100 * ranking[0].standard_deviation:.2f} %"
    own = (UNAIDED / "README.md").read_text()
    assert confirmed in own and all(
        text in readme for text in told for readme in (own, (ROOT / "README.md").read_text())
    )
