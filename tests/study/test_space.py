import re
from dataclasses import replace

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import Limits, parse
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
    """Parameters of `n` random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(n):
        yield space.suggest(study.ask())


def candidate(parameters, max_params=8000):
    return space.to_candidate(parameters, max_params=max_params, epochs=15)


@pytest.mark.parametrize("line", REFERENCES.values(), ids=REFERENCES)
def test_reference_system_is_a_point_of_the_space(line):
    reference = space.Candidate(parse(f"{line} | dropout=0.05"), space.RECIPE)
    assert candidate(space.to_parameters(reference)) == reference


def test_every_candidate_round_trips_through_its_parameters():
    for parameters in draw(150):
        drawn = candidate(parameters)
        assert candidate(space.to_parameters(drawn)) == drawn
        assert space.Candidate.from_dict(drawn.to_dict()) == drawn


@pytest.mark.parametrize("optimizer", space.LEARNING_RATES)
def test_references_are_trained_with_what_lies_in_the_middle_of_the_ranges(optimizer):
    recipe = space.reference_recipe(optimizer, 7)
    parameters = space.to_parameters(space.Candidate(parse(REFERENCES["era1a7"]), recipe))
    for name, value in ("learning_rate", recipe.learning_rate), ("weight_decay", recipe.weight_decay):
        ends = space.distributions(optimizer)[name]
        assert parameters[name] == value and value / ends.low == pytest.approx(ends.high / value)


def test_every_draw_is_a_network_that_can_be_built():
    for parameters in draw(60, seed=1):
        architecture = candidate(parameters).architecture
        assert count_parameters(architecture) == architecture.n_parameters


@pytest.mark.parametrize(("max_params", "least"), [(8000, 1.0), (1000, 1.0), (500, 0.9)])
def test_draws_are_narrowed_to_the_budget(max_params, least):
    counts = [candidate(p, max_params).architecture.n_parameters for p in draw(100)]
    assert sum(count < max_params for count in counts) / len(counts) >= least
    assert max(count for count in counts if count < max_params) > 0.95 * max_params


def test_draw_within_the_budget_keeps_its_widths():
    parameters = next(p for p in draw(50) if space._build(p, 1.0).n_parameters < 8000)
    assert candidate(parameters).architecture == space._build(parameters, 1.0)


def test_structure_that_cannot_be_narrowed_enough_stays_over_the_budget():
    deep = {name: 32 if "width" in name else value for name, value in next(draw(1)).items()}
    deep |= {"blocks": 3, "convs_1": 4, "convs_2": 4, "convs_3": 4}
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
        "c8 c80 M c8k1 c12 c16 c20 G c16k1 c10k1-",
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
        {"batch_size": 100},
        {"augmentation": Augmentation(scale=0.5)},
        {"calibrated": False},
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
