import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.optim.swa_utils import update_bn

from nas_mnist.data.folds import Split, search_split
from nas_mnist.errors import TrainingDiverged
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.training.augmentation import Augmentation, normalise
from nas_mnist.training.evaluation import evaluate, final_accuracy, predict, recalibrate
from nas_mnist.training.loop import n_batches, train
from nas_mnist.training.recipe import Recipe

SMALL = parse("c8 M c12 M c16 G c10k1- | dropout=0.05")
RECIPE = Recipe(epochs=2, learning_rate=0.3)


@pytest.fixture(scope="module")
def split(images):
    split = search_split(images, 3000)
    return Split(split.train, split.val.part(split.val.indices[::10]))


def run(split, recipe=RECIPE, seed=1, architecture=SMALL):
    network = build(architecture, seed=seed)
    return list(train(network, recipe, split.train, split.val, seed=seed))


def figures(result):
    return {name: value for name, value in asdict(result).items() if "seconds" not in name}


def test_it_learns(split):
    first, *_, last = run(split, replace(RECIPE, epochs=4))
    assert last.eval_accuracy > 0.93 and last.eval_loss < first.eval_loss / 2


def test_same_seed_same_numbers_other_seed_other_numbers(split):
    first, same, other = (run(split, seed=seed)[-1] for seed in (1, 1, 2))
    assert figures(first) == figures(same) != figures(other)


def test_one_result_an_epoch_with_the_learning_rate_of_its_end(split):
    results = run(split, replace(RECIPE, epochs=3))
    assert [r.number for r in results] == [1, 2, 3]
    assert results[0].learning_rate > results[1].learning_rate > results[2].learning_rate
    assert results[2].learning_rate < RECIPE.learning_rate / 1000
    assert all(r.train_seconds > 0 and r.eval_seconds > 0 for r in results)


def test_what_is_judged_more_rarely_is_trained_the_same(split):
    recipe = replace(RECIPE, epochs=4, recalibrated=True)
    network = build(SMALL, seed=1)
    rarely = list(train(network, recipe, split.train, split.val, seed=1, judged_epochs=(3, 4)))
    assert [figures(result) for result in rarely] == [figures(result) for result in run(split, recipe)[2:]]


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_other_optimizers_learn_too(split, optimizer):
    assert run(split, Recipe(epochs=2, optimizer=optimizer, learning_rate=0.01))[-1].eval_accuracy > 0.5


def test_weight_decay_and_label_smoothing_are_used(split):
    plain = run(split)[-1].train_loss
    assert run(split, replace(RECIPE, label_smoothing=0.1))[-1].train_loss > plain + 0.1
    assert run(split, replace(RECIPE, weight_decay=0.0))[-1].train_loss != plain


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "soap"])
def test_loss_that_is_not_finite_ends_the_training(split, optimizer):
    recipe = Recipe(epochs=3, batch_size=32, optimizer=optimizer, learning_rate=1e30)
    architecture = parse("c8r M c12r G c10k1-")
    with pytest.raises(TrainingDiverged, match="in epoch 1: lower the learning rate"):
        run(split, recipe, architecture=architecture)


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(100, 50, 2), (101, 50, 2), (102, 50, 3), (30, 50, 1)])
def test_last_batch_of_one_image_is_left_out(split, n, batch_size, steps):
    recipe = Recipe(epochs=1, batch_size=batch_size)
    assert n_batches(n, recipe) == steps
    few = Split(split.train.part(split.train.indices[:n]), split.val)
    architecture = parse("c4 G c8k1 c10k1-")  # a norm on a 1×1 map: one image has no variance
    assert math.isfinite(run(few, recipe, architecture=architecture)[0].train_loss)


@pytest.mark.parametrize("n", [2, 10, 200, 300])
def test_a_run_of_very_few_steps_is_possible(split, n):
    few = Split(split.train.part(split.train.indices[:n]), split.val.part(split.val.indices[:50]))
    for epochs in (1, 2):
        *_, last = run(few, replace(RECIPE, epochs=epochs))
        assert last.number == epochs and math.isfinite(last.train_loss)


def test_training_never_touches_the_global_generator(split):
    before = torch.get_rng_state()
    run(split, replace(RECIPE, epochs=1))
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_is_the_mean_over_all_images(split):
    network = build(SMALL, seed=0)
    loss, accuracy = evaluate(network, split.val)
    logits, labels = (torch.cat(parts) for parts in zip(*predict(network, split.val), strict=True))
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(labels, split.val.labels[split.val.indices])


def test_recalibration_gives_the_statistics_that_pytorch_does(split):
    few = split.train.part(split.train.indices[::4])  # 750, grouped by class
    network = build(SMALL, seed=0)
    recalibrate(network, few)
    found = {name: value.clone() for name, value in network.named_buffers()}

    again = build(replace(SMALL, dropout=0.0), seed=0).double()  # past the kernels
    batches = [few.select(torch.arange(128) * 750 // 128 + start) for start in range(5)]
    update_bn([normalise(pixels, few.normalisation).double() for pixels, _ in batches], again)
    for name, value in again.named_buffers():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, check_dtype=False)
    assert [m.momentum for m in network.modules() if hasattr(m, "momentum")] == [0.1] * 3
    assert all(len(labels.unique()) == 10 for _, labels in batches), "every batch has every class"


def test_recalibration_changes_what_is_evaluated_and_not_how_the_training_goes_on(split):
    plain, recalibrated = (run(split, replace(RECIPE, recalibrated=on)) for on in (False, True))
    for one, other in zip(plain, recalibrated, strict=True):
        assert (one.train_loss, one.train_accuracy) == (other.train_loss, other.train_accuracy)
        assert one.eval_loss != other.eval_loss


def test_objective_is_the_mean_of_the_last_two_epochs():
    assert final_accuracy([0.1, 0.5, 0.7]) == pytest.approx(0.6)
    assert final_accuracy([0.4]) == 0.4


def test_no_augmentation_is_possible(split):
    recipe = replace(RECIPE, epochs=1, augmentation=Augmentation(0, 0, 0, 0))
    assert run(split, recipe)[0].train_accuracy > 0.2


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 1}])
def test_recipe_that_cannot_be_followed_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1 epoch and 2 images"):
        Recipe(**wrong)
