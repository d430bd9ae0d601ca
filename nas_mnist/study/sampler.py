"""What is tried next: random draws of every kind, then small mutations of the best; of several the likeliest.

At a hundred or two evaluations evolution and local search are ahead of random search and TPE on NAS-Bench-101 (C. Ying
et al., 2019, arXiv 1902.09635). It is an Optuna sampler: a proposal is drawn when a trial begins, from what the study
knows by then, and nothing is kept between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import exp, log
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial

from nas_mnist.data.datasets import Dataset
from nas_mnist.model.architecture import Architecture
from nas_mnist.study import space
from nas_mnist.study.predictor import Predictor
from nas_mnist.study.records import origin_attributes
from nas_mnist.study.space import Candidate, Parameters
from nas_mnist.training.recipe import Recipe

N_RANDOM = 20  # draws before the first mutation
RANDOM_SHARE = 0.1  # of the draws after these
KIND_SHARE = 0.2  # of the mutations that have the best of some kind as their parent, whatever its rank
MAX_ACTIVATIONS = 100_000  # for an image: what takes more is drawn again, because one such trial takes the time of many
N_COMPARED = 12  # proposals, of which the one is made that the predictor thinks most of
N_LEARNED = 12  # trials that it needs
N_PARENTS = 6  # all other mutations are of one of these many
# Random draws keep to where networks are seldom poor; mutations may leave it (figures: studies/ranking/README.md).
DRAWN_CONVS = range(4, 9)  # 3×3 convolutions in all
N_DRAWS = 20  # of such networks; where none is within the budget, as many of any depth
DRAWN_GROWTH = 2.0  # of the widths, mostly
DRAWN_SPREAD = 0.2  # standard deviation of the logarithm of the widths around the law, and of rate and decay
PADDED_SHARE = 0.25
WIDTH_SPREAD, GROWTH_SPREAD, RECIPE_SPREAD = 0.25, 0.3, 0.3  # the same of a mutation's changes


def decided(dataset: Dataset) -> Parameters:
    """What is the same in all that is proposed: what was better in nearly every pair, and the use of the budget."""
    return {"activation": "hardswish", "deskew": dataset.slanted, "fill": 1.0}


BestFirst = Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]  # those that may be parents


@dataclass(frozen=True)
class Proposal:
    """Parameters to try, and where they come from."""

    parameters: Parameters
    origin: str
    parent: int | None = None


class EvolutionSampler(BaseSampler):
    """Mutations of the best trials so far, among random draws of which every kind of network has its share.

    Of several proposals the one is made of which a predictor, fitted to what was tried, hopes most. `to_candidate` says
    what parameters come to: a draw that comes to a network that was tried before is drawn again. Random draws are
    trained about as `recipe` says; the parameters in `same` are the same in all proposals. `fits` says what is within
    the budget. `best_first` says which trials are good, those that were stopped among them.
    """

    n_learned = N_LEARNED

    def __init__(
        self,
        ranges: Mapping[str, BaseDistribution],
        to_candidate: Callable[[Parameters], Candidate],
        recipe: Recipe,
        same: Parameters,
        fits: Callable[[Architecture], bool],
        best_first: BestFirst,
        seed: int,
    ):
        self._ranges, self._to_candidate, self._best_first = dict(ranges), to_candidate, best_first
        self._recipe, self._same, self._fits = recipe, same, fits
        self._rng = np.random.default_rng(seed)
        self._tried: dict[int, Candidate] = {}  # by the number of the trial
        self._networks: set[Architecture] = set()  # of these
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._ranges

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:  # queued: its parameters are known
            return {}
        proposal = self.propose([t for t in study.get_trials(deepcopy=False) if t.number != trial.number])
        for name, value in origin_attributes(proposal.origin, proposal.parent).items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
        return proposal.parameters

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never asked while the search space is that of `space`; what else is suggested is drawn evenly."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def propose(self, trials: list[FrozenTrial]) -> Proposal:
        """What to try after these trials, and not one of them again."""
        for trial in trials:
            if trial.number not in self._tried and self._is_drawn(trial):
                candidate = self._tried[trial.number] = self._to_candidate(trial.params)
                self._networks.add(_without_recipe(candidate))
        drawn = [trial for trial in trials if self._is_drawn(trial)]
        ranked = self._best_first(drawn)
        if len(ranked) < self.n_learned:
            return next(self._untried(drawn, ranked))[0]
        predictor = Predictor([self._tried[trial.number] for trial in ranked])
        several = islice(self._untried(drawn, ranked), N_COMPARED)
        return max(several, key=lambda proposed: predictor(proposed[1]))[0]

    def _untried(self, trials: list[FrozenTrial], ranked: list[FrozenTrial]) -> Iterator[tuple[Proposal, Candidate]]:
        """Proposals without end, all random or all mutations, of networks that were not tried and do not take too long.

        One that was tried is not tried again with another recipe: what that changes is mostly noise, and a search that
        may do so comes to train the same few networks.
        """
        is_random = len(trials) < N_RANDOM or not ranked or self._rng.random() < RANDOM_SHARE
        while True:
            proposal = self._random(trials) if is_random else self._mutation(self._choose_parent(ranked))
            candidate = self._to_candidate(proposal.parameters)
            if (
                _without_recipe(candidate) not in self._networks
                and candidate.architecture.n_activations <= MAX_ACTIVATIONS
            ):
                yield proposal, candidate

    def _is_drawn(self, trial: FrozenTrial) -> bool:
        return trial.params.keys() == self._ranges.keys()

    def _choose_parent(self, ranked: list[FrozenTrial]) -> FrozenTrial:
        if self._rng.random() < KIND_SHARE:
            best_of_kind: dict[Any, FrozenTrial] = {}
            for trial in ranked:
                best_of_kind.setdefault(kind(trial.params), trial)
            ranked = list(best_of_kind.values())
        return ranked[self._rng.integers(min(len(ranked), N_PARENTS))]

    def _random(self, trials: list[FrozenTrial]) -> Proposal:
        """A draw of one of the kinds that were drawn least, within the budget if there is one."""
        drawn = [kind(trial.params) for trial in trials]
        fewest = min(drawn.count(k) for k in KINDS)
        least = [k for k in KINDS if drawn.count(k) == fewest]
        wanted = least[self._rng.integers(len(least))]
        for n_convs in [DRAWN_CONVS] * N_DRAWS + [None] * N_DRAWS:
            parameters = self._draw(wanted, n_convs)
            if self._fits(self._to_candidate(parameters).architecture):
                break
        return Proposal(parameters, "random")

    def _draw(self, wanted: "Kind", n_convs: range | None) -> Parameters:
        while True:
            parameters = draw(self._ranges, self._recipe, self._rng, n_convs)
            if kind(parameters) == wanted:
                return parameters | self._same

    def _mutation(self, parent: FrozenTrial) -> Proposal:
        before = self._to_candidate(parent.params)
        parameters = parent.params
        while self._to_candidate(parameters) == before:  # some parameters do nothing in some networks
            parameters = mutate(parent.params, self._ranges, self._rng) | self._same
        return Proposal(
            parameters, f"mutation of trial {parent.number}: {difference(parent.params, parameters)}", parent.number
        )


def _without_recipe(candidate: Candidate) -> Architecture:
    """The network, whatever its dropout."""
    return replace(candidate.architecture, dropout=0.0)


Kind = tuple[str, int]
SEPARABLE = ("none", "some", "all")  # of the layers that may be
KINDS: tuple[Kind, ...] = tuple(product(SEPARABLE, range(2, space.MAX_BLOCKS + 1)))


def kind(parameters: Parameters) -> Kind:
    """Which of its layers are separable, and how many blocks there are."""
    share = space.separable_share(parameters)
    return SEPARABLE[(share > 0) + (share == 1)], parameters["blocks"]


def draw(
    ranges: Mapping[str, BaseDistribution],
    recipe: Recipe,
    rng: np.random.Generator,
    n_convs: range | None = DRAWN_CONVS,
) -> Parameters:
    """A random point that uses the whole budget: of the kinds evenly, widths near the law, about this recipe."""
    parameters = {name: _draw_evenly(distribution, rng) for name, distribution in ranges.items()}
    while n_convs and sum(parameters[f"convs_{b}"] for b in range(1, parameters["blocks"] + 1)) not in n_convs:
        parameters |= {name: _draw_evenly(d, rng) for name, d in ranges.items() if name.startswith("convs")}
    for name, distribution in ranges.items():
        if "width" in name:
            parameters[name] = _clip(distribution, exp(rng.normal(log(TYPICAL.get(name, 1.0)), DRAWN_SPREAD)))
        elif name in ("learning_rate", "weight_decay"):
            parameters[name] = _clip(distribution, exp(rng.normal(log(getattr(recipe, name)), DRAWN_SPREAD)))
    parameters["growth"] = _clip(ranges["growth"], exp(rng.normal(log(DRAWN_GROWTH), GROWTH_SPREAD)))
    return parameters | {"padding": int(rng.random() < PADDED_SHARE), "dropout": 0.0}


TYPICAL = {f"transition_width_{b}": 0.7 for b in range(1, space.MAX_BLOCKS)}  # transitions narrow, as people's do


def mutate(parameters: Parameters, ranges: Mapping[str, BaseDistribution], rng: np.random.Generator) -> Parameters:
    """Mostly one change, sometimes two or three: each of one parameter that the network uses."""
    changed = dict(parameters)
    for _ in range(min(3, rng.geometric(0.6))):
        names = [name for name in _used(changed) if name in ranges]
        name = names[rng.integers(len(names))]
        changed[name] = _mutate(name, changed[name], ranges[name], rng)
    return changed


def _used(parameters: Parameters) -> list[str]:
    """The parameters that a mutation may change; unused ones would change nothing."""
    blocks = range(1, parameters["blocks"] + 1)
    structure = [f"{name}_{b}" for b in blocks for name in ("convs", "separable")]
    others = ("blocks", "growth", "transition", "head", "padding")
    recipe = ("dropout", "learning_rate", "weight_decay")
    return [*space.used_widths(parameters), *structure, *others, *recipe]


def _mutate(name: str, value: Any, distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        others = [choice for choice in distribution.choices if choice != value]
        return others[rng.integers(len(others))]
    if isinstance(value, int):
        return _clip(distribution, value + int(rng.choice((-1, 1))))
    if distribution.log:
        spread = WIDTH_SPREAD if "width" in name else GROWTH_SPREAD if name == "growth" else RECIPE_SPREAD
        return _clip(distribution, value * exp(rng.normal(0, spread)))
    return _clip(distribution, value + rng.normal(0, 0.2 * (distribution.high - distribution.low)))


def _draw_evenly(distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[rng.integers(len(distribution.choices))]
    if distribution.single() or isinstance(distribution.low, int):
        return int(rng.integers(distribution.low, distribution.high + 1))
    if distribution.log:
        return exp(rng.uniform(log(distribution.low), log(distribution.high)))
    return rng.uniform(distribution.low, distribution.high)


def _clip(distribution: BaseDistribution, value: Any) -> Any:
    return min(max(value, distribution.low), distribution.high)


def difference(before: Parameters, after: Parameters) -> str:
    """What a mutation has changed, as people read it."""
    changes = [(name, before[name], after[name]) for name in after if before[name] != after[name]]
    return ", ".join(f"{name} {_text(old)} → {_text(new)}" for name, old, new in changes)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
