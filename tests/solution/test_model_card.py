from dataclasses import replace

import pytest
import torch
from synthetic import ablate_trial, draw_trial

from nas_mnist.data.images import load_test
from nas_mnist.solution import export
from nas_mnist.solution.export import Judged, Source
from nas_mnist.solution.model_card import _embedded, model_card
from nas_mnist.study import studies
from nas_mnist.study.storage import Storage

SOURCE = Source("s.db", "nas-mnist", 100)
CONFIRMATION = {
    "folds": 4,
    "seeds": 2,
    "n": 8,
    "mean": 0.9941,
    "standard_deviation": 0.0003,
    "optimism": 0.0012,
    "given_up": False,
}


INT8 = {"int8": {"test_accuracy": 0.97, "n_calibration_images": 1000}}
BOARD = {"board": "Cortex-M4", "function": "model_int8", "flash": 13494, "ram": 32912, "instructions": 11759320}


@pytest.fixture
def write(retrained, data_dir):
    """The card of the small network, with something changed about it."""

    def written(source=SOURCE, **changes):
        test = load_test(data_dir)
        judged = Judged(test, torch.nn.functional.one_hot(test.labels).float())
        changed = replace(retrained, **changes)
        record = export._record(changed, source, judged, {}) | INT8
        return " ".join(model_card(changed, record, source.ablation).split())

    return written


def test_named_architecture_has_no_search_and_no_confirmation_to_tell_of(write):
    text = write(trial=None, search_score=None)
    assert "named by hand" in text and "confirmed" not in text and "Trial" not in text
    assert "retrain --architecture 'c8 M c12 M c16 G c10k1- | dropout=0.02' --epochs 3 --seeds 1" in text


def test_quick_look_is_not_passed_off_as_all_images(write):
    assert "trained on all 60,000 training images" in write()
    quick = write(n_train_images=500, source=Source("s.db", "nas-mnist", 12, {"train_images": 300, "epochs": 1}))
    assert "trained on 500 of the 60,000 training images" in quick and "all 60,000" not in quick
    assert "12 trained trials on 300 training images" in quick
    assert "nas-mnist search --trials 12 --train-images 300 --epochs 1 nas-mnist" in quick
    assert "--seeds 1 --train-images 500" in quick


def test_ablation_is_a_table_if_there_is_one(write):
    assert "Nobody has taken it apart yet" in write()
    rows = ablate_trial(draw_trial(0))
    text = write(source=replace(SOURCE, ablation=rows))
    assert "Nobody has taken" not in text and "| no augmentation |" in text and "-0.210 | 0.040 | 0.012 |" in text


def test_confirmation_is_told_with_its_spread_and_optimism(write):
    text = write(confirmation=CONFIRMATION, source=Source("s.db", "mine", 100))
    assert "(4 folds, seeds on each: 2): 99.41 ± 0.03 (SD) %, n = 8." in text and "+0.12 points" in text
    assert "nas-mnist confirm --folds 4 --seeds 2 --study mine" in text
    assert "given up" in write(confirmation=CONFIRMATION | {"given_up": True})


def test_diverged_seeds_are_told(write):
    text = write(diverged=(3, 4))
    assert "n = 1 seed (2 more diverged)" in text and "✗ not: 2 of 3 seeds diverged (3, 4)" in text
    assert "retrain --trial 7 --seeds 3" in text


@pytest.mark.parametrize(("optimizer", "has_one"), [("sgd", True), ("soap", False)])
def test_momentum_is_told_of_sgd_alone(write, retrained, optimizer, has_one):
    candidate = retrained.candidate
    text = write(candidate=replace(candidate, recipe=replace(candidate.recipe, optimizer=optimizer)))
    assert f"| optimizer | {optimizer} |" in text and ("momentum" in text) == has_one


def test_versions_are_those_of_the_training_and_those_of_the_export(write, retrained):
    run = replace(retrained.runs[0], versions="torch 9.9")
    text = write(runs=(run,))
    assert "with torch 9.9; exported with python 3" in text


def test_source_is_what_the_storage_knows_of_the_search(tmp_path, retrained):
    candidate = retrained.candidate
    storage = Storage.parse(str(tmp_path / "s.db"))
    opened = storage.open(create=True)
    assert Source.find(storage, "nas-mnist", candidate) == Source(str(storage), "nas-mnist", None, {})
    studies.create(opened, "nas-mnist", metric="m", attributes={"identity": {"train_images": 300}})
    assert Source.find(storage, "nas-mnist", candidate) == Source(str(storage), "nas-mnist", 0, {"train_images": 300})


def test_board_table_tells_what_was_measured_or_why_nothing_was():
    record = {**INT8, "test_accuracy": 0.98, "n_macs": 1_405_042}
    told = _embedded(record | {"c": {"n_images": 100, "tools": ["gcc 12", "QEMU 7"], "boards": [BOARD]}})
    assert "97.00% of the test set, 98.00% in float32 (lost: +1.00 points)" in " ".join(told.split())
    assert "| Cortex-M4 | int8 | 13,494 | 32,912 | 1,405,042 | 11,759,320 | 97.00% |" in told and "QEMU 7" in told
    unmeasured = _embedded(record | {"c": {"not_measured": "without qemu-system-arm", "boards": []}})
    assert "was not measured on a board, without qemu-system-arm." in unmeasured and "| Cortex" not in unmeasured
    assert "nas-mnist export --c" in _embedded(record)
