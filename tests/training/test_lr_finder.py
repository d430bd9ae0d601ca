"""The range test raises the rate until the loss explodes, and reads its suggestions from the curve."""

import math

import numpy as np
import pytest

from nas_mnist.data.folds import search_split
from nas_mnist.errors import NasMnistError, TrainingDiverged
from nas_mnist.model.architecture import parse
from nas_mnist.training.lr_finder import RateRange, RateStep, fit, range_test
from nas_mnist.training.recipe import Recipe

SMALL = parse("c4s2 c8s2 G c10k1-")


def steps(loss_at, rates):
    return [RateStep(rate, loss_at(math.log10(rate))) for rate in rates.rates()]


def test_rates_rise_by_the_same_factor_from_first_to_last():
    rates = np.array(RateRange(1e-4, 1.0, 81).rates())
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1.0)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 10 ** (4 / 80))


@pytest.mark.parametrize("arguments", [(0, 1, 100), (-1, 1, 100), (1, 1, 100), (1, 0.1, 100), (0.1, 1, 49)])
def test_range_that_does_not_rise_or_is_too_short_is_refused(arguments):
    with pytest.raises(NasMnistError, match=r"must rise from above 0|at least 50 steps, not 49"):
        RateRange(*arguments)


def test_suggestions_are_where_the_loss_falls_fastest_and_a_tenth_of_where_it_is_lowest():
    """A logistic fall centred on 10⁻² and a rise that begins at 10⁰."""

    def loss_at(e):
        return 2.3 - 2 / (1 + math.exp(-3 * (e + 2))) + 5 * max(0.0, e) ** 2

    curve = fit(steps(loss_at, RateRange(1e-5, 10, 300)))
    assert math.log10(curve.steepest) == pytest.approx(-2, abs=0.05)
    assert math.log10(curve.minimum) == pytest.approx(0, abs=0.25)
    assert curve.tenth_of_minimum == curve.minimum / 10


def test_noise_does_not_move_the_suggestion_by_more_than_half_a_decade():
    noise = iter(np.random.default_rng(0).normal(0, 0.1, 300))
    curve = fit(steps(lambda e: 2.3 - 2 / (1 + math.exp(-3 * (e + 2))) + next(noise), RateRange(1e-5, 10, 300)))
    assert math.log10(curve.steepest) == pytest.approx(-2, abs=0.5)


@pytest.mark.parametrize("loss_at", [lambda e: 2.3, lambda e: 3 + e / 10])
def test_loss_that_never_falls_gives_no_suggestion(loss_at):
    with pytest.raises(TrainingDiverged, match="start lower, or take more steps"):
        fit(steps(loss_at, RateRange()))


def test_no_steps_at_all_give_no_suggestion():
    with pytest.raises(TrainingDiverged):
        fit([])


def test_test_stops_when_the_loss_diverges(images):
    train = search_split(images, 2000).train
    found = list(range_test(SMALL, Recipe(), train, RateRange(1e-2, 1e6, 100), seed=0))
    assert 20 < len(found) < 90
    assert all(math.isfinite(step.loss) for step in found)


def test_test_goes_to_the_end_of_a_harmless_range_and_repeats_itself(images):
    train = search_split(images, 1000).train  # 7 full batches an epoch: the test goes round several times
    rates = RateRange(1e-4, 1e-1, 50)
    first, again = (list(range_test(SMALL, Recipe(), train, rates, seed=3)) for _ in range(2))
    assert first == again and [step.learning_rate for step in first] == rates.rates()
    assert first[0].loss == pytest.approx(math.log(10), abs=0.5)


def test_rates_are_really_used(images):
    train = search_split(images, 1000).train
    low, high = (list(range_test(SMALL, Recipe(), train, RateRange(r, 2 * r, 50), seed=0)) for r in (1e-9, 0.1))
    assert low[0].loss == high[0].loss
    assert high[-1].loss < low[-1].loss - 0.3
