import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import optuna
import pytest

from nas_mnist.data.datasets import DATASETS, MNIST
from nas_mnist.model.architecture import parse
from nas_mnist.study import space
from nas_mnist.study.records import TrialRecord
from nas_mnist.study.sampler import (
    KINDS,
    MAX_ACTIVATIONS,
    N_LEARNED,
    N_RANDOM,
    EvolutionSampler,
    decided,
    difference,
    draw,
    kind,
    mutate,
)

RANGES = space.distributions()
RECIPE = space.reference_recipe(size=2000)
SAME = decided(MNIST)
to_candidate = partial(space.to_candidate, max_params=2000, epochs=15)


def fits(architecture):
    return architecture.n_parameters < 2000


def best_first(trials):
    return sorted((trial for trial in trials if trial.values), key=lambda trial: -trial.value)


def search(n, seed=0, value=lambda candidate: len(candidate.architecture.layers)):
    """A study of `n` finished trials whose value is one of their candidate."""
    sampler = EvolutionSampler(RANGES, lambda p: to_candidate(p), RECIPE, SAME, fits, best_first, seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(n):
        trial = study.ask()
        study.tell(trial, value(to_candidate(space.suggest(trial))))
    return study


def origins(trials):
    return [TrialRecord.from_trial(trial).origin for trial in trials]


def test_draws_lie_in_their_ranges():
    rng = np.random.default_rng(0)
    for _ in range(100):
        parameters = draw(RANGES, RECIPE, rng)
        assert parameters.keys() == RANGES.keys()
        assert all(RANGES[name]._contains(RANGES[name].to_internal_repr(value)) for name, value in parameters.items())


def test_a_mutation_is_small_and_lies_in_the_ranges():
    rng = np.random.default_rng(0)
    parameters = draw(RANGES, RECIPE, rng)
    for _ in range(200):
        mutant = mutate(parameters, RANGES, rng)
        assert sum(mutant[name] != parameters[name] for name in RANGES) <= 3
        assert all(RANGES[name]._contains(RANGES[name].to_internal_repr(value)) for name, value in mutant.items())


def test_a_search_begins_with_as_many_draws_of_every_kind():
    trials = search(N_RANDOM).trials
    assert set(origins(trials)) == {"random"}
    counts = Counter(kind(trial.params) for trial in trials)
    assert counts.keys() == set(KINDS) and max(counts.values()) - min(counts.values()) <= 1


def test_then_the_best_are_mutated_and_every_proposal_says_where_it_comes_from():
    trials = search(60).trials
    mutants = [record for trial in trials if (record := TrialRecord.from_trial(trial)).parent is not None]
    assert 0.7 * 44 < len(mutants) < 44 and "random" in origins(trials[N_RANDOM:])
    for mutant in mutants:
        change = difference(trials[mutant.parent].params, trials[mutant.number].params)
        assert mutant.origin == f"mutation of trial {mutant.parent}: {change}" and change
    assert np.mean([t.value for t in trials[40:]]) > np.mean([t.value for t in trials[:N_RANDOM]])


def test_of_several_proposals_the_likeliest_is_made():
    """Worth is the receptive field; with a predictor the search comes to large ones sooner."""

    class Unpredicted(EvolutionSampler):
        n_learned = math.inf

    def mean_worth(kind, seed):
        sampler = kind(RANGES, lambda p: to_candidate(p), RECIPE, SAME, fits, best_first, seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for _ in range(40):
            trial = study.ask()
            study.tell(trial, to_candidate(space.suggest(trial)).architecture.receptive_field)
        return np.mean([trial.value for trial in study.trials[N_LEARNED:]])

    assert mean_worth(EvolutionSampler, 0) > mean_worth(Unpredicted, 0) + 2


def test_nothing_is_proposed_that_takes_the_time_of_many():
    wide = partial(space.to_candidate, max_params=8000, epochs=15)
    rng = np.random.default_rng(0)
    assert max(wide(draw(RANGES, RECIPE, rng)).architecture.n_activations for _ in range(40)) > MAX_ACTIVATIONS
    study = optuna.create_study(sampler=EvolutionSampler(RANGES, wide, RECIPE, SAME, fits, lambda trials: [], 0))
    drawn = [wide(space.suggest(study.ask())).architecture.n_activations for _ in range(40)]
    assert 0.2 * MAX_ACTIVATIONS < max(drawn) <= MAX_ACTIVATIONS


def test_where_no_deep_network_fits_shallow_ones_are_drawn():
    """The smallest network that random draws keep to has 132 parameters, the smallest of the space 72."""
    few = partial(space.to_candidate, max_params=110, epochs=15)

    def within(architecture):
        return architecture.n_parameters < 110

    study = optuna.create_study(sampler=EvolutionSampler(RANGES, few, RECIPE, SAME, within, lambda trials: [], 0))
    drawn = [few(space.suggest(study.ask())).architecture for _ in range(20)]
    assert sum(map(within, drawn)) >= 5


def test_no_network_is_proposed_twice():
    """The value has few levels, so that the same few parents are mutated again and again."""
    trials = search(80, value=lambda candidate: min(len(candidate.architecture.layers), 6)).trials
    networks = {replace(to_candidate(trial.params).architecture, dropout=0.0) for trial in trials}
    assert len(networks) == 80, "not with another recipe either"


def test_a_parent_that_does_not_fill_the_budget_has_children_that_do_and_have_hard_swish():
    reference = space.to_parameters(space.Candidate(parse("c4 c8 M c8 G c10k1-"), RECIPE), 2000)
    study = optuna.create_study(
        direction="maximize",
        sampler=EvolutionSampler(RANGES, lambda p: to_candidate(p), RECIPE, SAME, fits, best_first, 0),
    )
    study.enqueue_trial(reference)
    for _ in range(N_RANDOM + 25):
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, 1.0 if trial.number == 0 else 0.0)
    assert study.trials[0].params == reference and origins(study.trials[:1]) == [""]
    children = [trial for trial in study.trials if TrialRecord.from_trial(trial).parent == 0]
    assert children and all(SAME.items() <= trial.params.items() for trial in children)
    assert reference["activation"] == "relu" and not reference["deskew"]


def test_all_that_is_proposed_uses_the_budget_and_writing_is_made_upright():
    assert all(SAME.items() <= trial.params.items() for trial in search(N_RANDOM + 10).trials)
    assert SAME == {"activation": "hardswish", "deskew": True, "fill": 1.0}
    upright = {name for name, dataset in DATASETS.items() if decided(dataset)["deskew"]}
    assert upright == {"mnist", "qmnist", "emnist-digits"}


def test_same_seed_same_proposals():
    lines = [[str(to_candidate(t.params).architecture) for t in search(20, seed).trials] for seed in (1, 1, 2)]
    assert lines[0] == lines[1] != lines[2]


def test_difference_names_what_changed():
    parameters = draw(RANGES, RECIPE, np.random.default_rng(0)) | {"blocks": 2, "growth": 1.5}
    assert difference(parameters, parameters | {"blocks": 3, "growth": 2.0}) == "blocks 2 → 3, growth 1.5 → 2"


@pytest.mark.parametrize(
    ("separable", "first", "share", "which"),
    [
        ((), 2, 0, "none"),
        ((3,), 2, 0, "none"),  # of a block that is not in use
        ((1,), 1, 0, "none"),  # the first convolution has nothing to separate
        ((1,), 2, 1 / 4, "some"),
        ((2,), 2, 3 / 4, "some"),
        ((2,), 1, 1, "all"),
        ((1, 2), 2, 1, "all"),
    ],
)
def test_kind_is_which_of_the_layers_that_may_be_are_separable(separable, first, share, which):
    parameters = {"blocks": 2, "convs_1": first, "convs_2": 3, "convs_3": 4}
    parameters |= {f"separable_{b}": b in separable for b in (1, 2, 3)}
    assert space.separable_share(parameters) == share and kind(parameters) == (which, 2)
