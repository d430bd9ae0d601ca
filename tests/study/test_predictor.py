from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from nas_mnist.model.architecture import parse
from nas_mnist.model.zoo import ZOO
from nas_mnist.study import space
from nas_mnist.study.predictor import Predictor, features
from nas_mnist.study.sampler import draw
from nas_mnist.study.space import Candidate, reference_recipe


def drawn(n, seed=0):
    rng = np.random.default_rng(seed)
    parameters = [draw(space.distributions(), reference_recipe(), rng) for _ in range(n)]
    return [space.to_candidate(p, max_params=2000, epochs=15) for p in parameters]


def test_what_it_learns_from_some_it_expects_of_others():
    """Worth is made of two of the numbers it sees, and of one that it does not."""

    def worth(candidate):
        architecture = candidate.architecture
        return np.log(architecture.n_macs) + 2 * architecture.receptive_field / 28 + architecture.n_parameters / 2000

    seen, unseen = drawn(60), drawn(100, seed=1)
    predictor = Predictor(sorted(seen, key=worth, reverse=True))
    assert spearmanr([predictor.expected(c) for c in unseen], [worth(c) for c in unseen]).statistic > 0.8


def test_what_is_unlike_anything_tried_is_given_hope():
    alike = [c for c in drawn(200) if not any(shape.padding for shape in c.architecture.shapes)][:40]
    predictor = Predictor(alike)
    hopes = [predictor(c) - predictor.expected(c) for c in alike]
    strange = Candidate(parse("c2 M c30 M c3 d40 G c10k1- | dropout=0.2"), reference_recipe("sgd"))
    assert min(hopes) > 0 and predictor(strange) - predictor.expected(strange) > 3 * max(hopes)


def test_only_the_order_counts_and_what_never_differs_says_nothing():
    candidates = drawn(20)
    predictor = Predictor(candidates)
    other = replace(candidates[0], architecture=replace(candidates[0].architecture, dropout=0.02))
    assert predictor.expected(other) == pytest.approx(predictor.expected(candidates[0]))
    assert 0.1 < predictor(other) - predictor(candidates[0]) < 1  # it is new, and not endlessly so


@pytest.mark.parametrize("line", [*(s.notation for s in ZOO.values()), "c10k28-", "G c10k1-", "c8 G c16k1 c10k1-"])
def test_any_network_has_features(line):
    numbers = features(Candidate(parse(line), replace(reference_recipe(), weight_decay=0.0)))
    assert np.isfinite(numbers).all() and numbers.shape == features(drawn(1)[0]).shape
