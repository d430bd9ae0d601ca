import contextlib
import re
import statistics
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import Conv, Limits, parse
from nas_mnist.model.network import count_parameters
from nas_mnist.study import space
from nas_mnist.training.augmentation import Augmentation

REFERENCES = {
    "step-by-step": "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1-",
    "lite-m4": "c8 c16 c10k1- M c10 c16 c16 c10- G",
    "era1a7": "c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G",
    "eva-drilldown": "c8 c16 M c8k1- c10 c16 c18 G c16k1 c10k1-",
}


def draw(n, seed=0):
    """Parameters of `n` random trials that use the whole budget."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(n):
        yield space.suggest(study.ask()) | {"fill": 1.0}


def candidate(parameters, max_params=8000):
    return space.to_candidate(parameters, max_params=max_params, epochs=15)


@pytest.mark.parametrize("line", REFERENCES.values(), ids=REFERENCES)
def test_reference_system_is_a_point_of_the_space(line):
    reference = space.Candidate(parse(f"{line} | dropout=0.01"), space.RECIPE)
    assert candidate(space.to_parameters(reference, 8000)) == reference


def test_candidate_round_trips_through_its_parameters_and_its_values():
    n_points = 0
    for parameters in draw(150):
        drawn = candidate(parameters)
        assert space.Candidate.from_dict(drawn.to_dict()) == drawn
        with contextlib.suppress(ArchitectureError):  # rounded, its widths may be beyond what the law allows
            assert candidate(space.to_parameters(drawn, 8000)) == drawn
            n_points += 1
    assert n_points > 75


@pytest.mark.parametrize("optimizer", space.LEARNING_RATES)
def test_references_are_trained_with_what_lies_in_the_middle_of_the_ranges(optimizer):
    recipe = space.reference_recipe(optimizer, 7)
    parameters = space.to_parameters(space.Candidate(parse(REFERENCES["era1a7"]), recipe))
    for name, value in ("learning_rate", recipe.learning_rate), ("weight_decay", recipe.weight_decay):
        ends = space.distributions(optimizer)[name]
        assert parameters[name] == value and value / ends.low == pytest.approx(ends.high / value)


def test_small_networks_have_a_recipe_of_their_own_under_soap():
    usual, small = space.reference_recipe(), space.reference_recipe(size=space.SMALL)
    assert small.batch_size < usual.batch_size and small.learning_rate > usual.learning_rate
    assert small.augmentation == usual.augmentation.times(0.5)
    parameters = next(draw(1)) | {"learning_rate": 0.01, "weight_decay": 0.01}
    for size, recipe in (space.SMALL, small), (space.SMALL + 1, usual):
        own = candidate(parameters, size).recipe
        assert own == replace(recipe, learning_rate=0.01, weight_decay=0.01)
    assert space.reference_recipe("sgd", size=100) == space.reference_recipe("sgd")


def test_every_draw_is_a_network_that_can_be_built():
    for parameters in draw(60, seed=1):
        architecture = candidate(parameters).architecture
        assert count_parameters(architecture) == architecture.n_parameters


@pytest.mark.parametrize(("max_params", "least"), [(8000, 0.97), (2000, 0.95), (1000, 0.9)])
def test_draws_use_the_budget_to_the_last_channel(max_params, least):
    shares = [candidate(p, max_params).architecture.n_parameters / (max_params - 1) for p in draw(100)]
    assert least <= min(shares) <= max(shares) <= 1
    assert statistics.median(shares) > 0.97


@pytest.mark.parametrize("max_params", [500, 2000, 100_000])
def test_reference_system_keeps_its_size_under_a_larger_budget_and_fills_a_smaller(max_params):
    reference = space.Candidate(parse(REFERENCES["era1a7"]), space.reference_recipe(size=max_params))
    again = candidate(space.to_parameters(reference, max_params), max_params)
    if max_params > reference.architecture.n_parameters:
        assert again == reference
    else:
        assert 0.9 * max_params < again.architecture.n_parameters < max_params


def test_widths_grow_along_the_depth_by_the_law():
    lowest = {name: space._lowest(d) for name, d in space.distributions().items()}
    even = lowest | {name: 1.0 for name in lowest if "width" in name} | {"fill": 1.0, "convs_1": 3, "convs_2": 3}
    layers = candidate(even | {"growth": 4.0, "convs_2": 1}).architecture.layers
    widths = [layer.channels for layer in layers if isinstance(layer, Conv) and layer.norm]
    assert widths == sorted(set(widths)) and widths[-1] / widths[0] == pytest.approx(4, rel=0.15)


def test_structure_that_cannot_be_narrowed_enough_stays_over_the_budget():
    deep = next(draw(1)) | {"blocks": 3, "convs_1": 4, "convs_2": 4, "convs_3": 4}
    assert candidate(deep, max_params=100).architecture.n_parameters >= 100


def test_smallest_count_is_that_of_a_real_candidate_and_no_draw_is_below():
    smallest = space.smallest_count()
    narrow = [candidate(p, max_params=1).architecture.n_parameters for p in draw(300)]
    assert min(narrow) >= smallest
    assert any(candidate(p, max_params=smallest + 1).architecture.n_parameters == smallest for p in _narrowest())


def _narrowest():
    lowest = {name: space._lowest(d) for name, d in space.distributions().items()}
    for head in space.HEADS:
        for transition in space.TRANSITIONS:
            yield lowest | {"head": head, "transition": transition, "separable_2": True}
            yield lowest | {"head": head, "transition": transition}


@pytest.mark.parametrize(
    "line",
    [
        "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | act-norm",
        "c8 c160 M c8k1 c12 c16 c20 G c16k1 c10k1-",
        "c8s2 M c8 G c10k1-",
        "c10k28-",
        "c8 c8 c8 c8 c8 M c8 G c10k1-",
        "c8 c16 G c10k1-",
    ],
)
def test_architecture_outside_the_space_is_refused(line):
    with pytest.raises(ArchitectureError, match="no point of the space"):
        space.to_parameters(space.Candidate(parse(line), space.RECIPE))


def test_recipe_outside_the_space_is_refused():
    inside = space.Candidate(parse(REFERENCES["lite-m4"]), space.RECIPE)
    outside = (
        {"learning_rate": 5.0},
        {"batch_size": 128},
        {"augmentation": Augmentation(scale=0.5)},
        {"recalibrated": False},
    )
    for changes in outside:
        recipe = replace(space.RECIPE, **changes)
        with pytest.raises(ArchitectureError, match="no point of the space"):
            space.to_parameters(replace(inside, recipe=recipe))


def test_every_parameter_is_suggested_for_every_trial():
    names = set(space.distributions())
    assert all(set(parameters) == names for parameters in draw(5))


def test_fingerprint_changes_with_the_space(monkeypatch):
    before = space.fingerprint()
    assert before == space.fingerprint() != space.fingerprint("adamw")
    monkeypatch.setattr(space, "TRANSITIONS", space.TRANSITIONS[:-1])
    changed = space.fingerprint()
    monkeypatch.setattr(space, "RECIPE", replace(space.RECIPE, momentum=0.8))
    assert len({before, changed, space.fingerprint()}) == 3


def test_ranges_are_those_of_the_readme(request):
    readme = (request.config.rootpath / "studies" / "README.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("| `")]
    ranges = {_base(name): row[1] for row in cells for name in re.findall(r"`(\w+)`", row[0])}
    for name, distribution in space.distributions().items():
        if isinstance(distribution, CategoricalDistribution):
            shown = [
                {False: "no", True: "yes"}.get(c, f"`{c}`" if isinstance(c, str) else str(c))
                for c in distribution.choices
            ]
            assert ranges[_base(name)] == ", ".join(shown)
        else:
            assert ranges[_base(name)].startswith(f"{distribution.low:g} – {distribution.high:g}"), name


def _base(name):
    return re.sub(r"[_\d]+$", "", name)


def test_draws_are_brought_within_every_limit():
    rng, limits = np.random.default_rng(0), Limits(max_macs=200_000, max_ram=8_000)
    narrowed = 0
    for _ in range(100):
        parameters = {name: _any(rng, d) for name, d in space.distributions().items()}
        free = space.to_candidate(parameters, max_params=8000, epochs=15).architecture
        limited = space.to_candidate(parameters, max_params=8000, epochs=15, limits=limits).architecture
        assert limited.n_macs <= limits.max_macs and limited.ram <= limits.max_ram
        assert limited == free if limits.admit(free) else limits.excess(free) != limits.excess(limited)
        narrowed += limited != free
    assert narrowed > 50


def _any(rng, distribution):
    if hasattr(distribution, "choices"):
        return distribution.choices[rng.integers(len(distribution.choices))]
    if isinstance(distribution, IntDistribution):
        return int(rng.integers(distribution.low, distribution.high + 1))
    return float(rng.uniform(distribution.low, distribution.high))
