"""The search space: Optuna trial → candidate, and candidate → parameters.

Every parameter is suggested for every trial and its range is fixed, so that a sampler can compare them all. A network
is two or three blocks of convolutions with a transition between them and a head behind.

Widths follow one law: the first is `base`, those behind grow geometrically up to `growth` times as much, and each has a
little freedom. The base is no parameter: it is solved from the budget, so that a draw uses what there is. After I.
Radosavovic et al., Designing Network Design Spaces (RegNet), 2020, arXiv 2003.13678; what it is worth is measured in
`studies/ranking/README.md`. A network that uses less of the budget, such as one that people made, says so with `fill`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import exp, log, sqrt
from typing import Any, get_args

from optuna import Trial
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import (
    INPUT_SIDE,
    N_CLASSES,
    NO_LIMITS,
    Activation,
    Architecture,
    Conv,
    GlobalPool,
    Layer,
    Limits,
    MaxPool,
    parse,
)
from nas_mnist.study import stored
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS
from nas_mnist.training.recipe import Optimizer, Recipe

MAX_BLOCKS, MAX_CONVS = 3, 4
MIN_WIDTH, MAX_WIDTH = 2, 128
FILLED = 0.97  # of the budget, from which on no width is raised any more
MAX_GROWTH = 5.0
CONV_FREEDOM, TRANSITION_FREEDOM = (0.5, 2.0), (0.4, 1.6)  # times what the law says

ACTIVATIONS = get_args(Activation)
# In notation, with the width left out: c a convolution (1×1), M the pool, - bare.
TRANSITIONS = ("M", "M c", "M c-", "c M", "c- M")
HEADS = ("G c10k1-", "G c c10k1-", "c10k1- G", "c10- G")
# Half an order around what was best in the studies: a good network is not to be judged by a bad recipe.
LEARNING_RATES = {"sgd": (0.04, 0.25), "adamw": (0.003, 0.017), "soap": (0.004, 0.025)}
# SGD adds the decay to the gradient; the others take it times the learning rate from the weights.
WEIGHT_DECAYS = {"sgd": (6e-5, 1.6e-3), "adamw": (0.002, 0.05), "soap": (0.002, 0.05)}
SMALL = 1500  # parameters: a budget of so many, or less, has a recipe of its own, see `reference_recipe`
# What no parameter says, and where the parameters begin.
RECIPE = Recipe(batch_size=64, optimizer="soap", learning_rate=0.01, weight_decay=0.01, recalibrated=True)

Parameters = dict[str, Any]
Distribution = IntDistribution | FloatDistribution | CategoricalDistribution


@dataclass(frozen=True)
class Candidate:
    """What is built and how it is trained."""

    architecture: Architecture
    recipe: Recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return {"architecture": str(self.architecture), "recipe": stored.write(self.recipe)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Candidate":
        """Whichever version of nas-mnist wrote it."""
        return Candidate(parse(values["architecture"]), stored.read(values["recipe"]))


def reference_recipe(
    optimizer: Optimizer = RECIPE.optimizer, epochs: int = MAX_EPOCHS, size: int = MAX_PARAMS
) -> Recipe:
    """What suits a network of about `size` parameters: warm starts are trained with it, random draws keep near it.

    In a search `size` is the budget, so that all its trials are trained alike. Learning rate and weight decay are in
    the middle of their ranges. A small network does not get far enough in 15 epochs, and strong augmentation takes of
    the little that it can hold: under SOAP it has twice the rate, batches half as large and half the augmentation.
    `studies/structures/README.md` has the figures.
    """
    rate, decay = (sqrt(low * high) for low, high in (LEARNING_RATES[optimizer], WEIGHT_DECAYS[optimizer]))
    recipe = replace(RECIPE, optimizer=optimizer, epochs=epochs, learning_rate=rate, weight_decay=decay)
    if size > SMALL or optimizer != "soap":
        return recipe
    batch_size, augmentation = recipe.batch_size // 2, recipe.augmentation.times(0.5)
    return replace(recipe, batch_size=batch_size, learning_rate=2 * rate, augmentation=augmentation)


def distributions(optimizer: Optimizer = RECIPE.optimizer) -> dict[str, Distribution]:
    """Every parameter of the space and its range."""
    width, transition_width = (FloatDistribution(*ends, log=True) for ends in (CONV_FREEDOM, TRANSITION_FREEDOM))
    blocks = range(1, MAX_BLOCKS + 1)
    return {
        "blocks": IntDistribution(2, MAX_BLOCKS),
        **{f"convs_{b}": IntDistribution(1, MAX_CONVS) for b in blocks},
        **{f"separable_{b}": CategoricalDistribution((False, True)) for b in blocks},
        "growth": FloatDistribution(1.0, MAX_GROWTH, log=True),
        **{f"width_{b}_{i}": width for b in blocks for i in range(1, MAX_CONVS + 1)},
        "transition": CategoricalDistribution(TRANSITIONS),
        **{f"transition_width_{b}": transition_width for b in blocks[:-1]},
        "padding": IntDistribution(0, 1),
        "head": CategoricalDistribution(HEADS),
        "head_width": width,
        "activation": CategoricalDistribution(ACTIVATIONS),
        "deskew": CategoricalDistribution((False, True)),
        "fill": FloatDistribution(0.0, 1.0),
        "dropout": FloatDistribution(0.0, 0.02),
        "learning_rate": FloatDistribution(*LEARNING_RATES[optimizer], log=True),
        "weight_decay": FloatDistribution(*WEIGHT_DECAYS[optimizer], log=True),
    }


def fingerprint(optimizer: Optimizer = RECIPE.optimizer) -> str:
    """A short hash that changes with the space; studies of different spaces are never mixed."""
    ranges = {name: json.loads(distribution_to_json(d)) for name, d in distributions(optimizer).items()}
    recipes = [stored.distinctive(reference_recipe(optimizer, size=size)) for size in (SMALL, SMALL + 1)]
    return hashlib.sha256(json.dumps([ranges, recipes, SMALL], sort_keys=True).encode()).hexdigest()[:12]


def suggest(trial: Trial, optimizer: Optimizer = RECIPE.optimizer) -> Parameters:
    """Draw every parameter of the space, always all of them."""
    return {name: _suggest(trial, name, distribution) for name, distribution in distributions(optimizer).items()}


def _suggest(trial: Trial, name: str, distribution: Distribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def to_candidate(
    parameters: Mapping[str, Any],
    *,
    max_params: int,
    epochs: int,
    optimizer: Optimizer = RECIPE.optimizer,
    limits: Limits = NO_LIMITS,
) -> Candidate:
    """The candidate that the parameters denote: as wide as `fill` times the budget allows, and the limits.

    A structure that is over the budget even at its narrowest is returned at its narrowest: the caller checks.
    """
    recipe = _own_recipe(reference_recipe(optimizer, epochs, max_params), parameters)
    return Candidate(_fill(parameters, round(parameters["fill"] * (max_params - 1)), limits), recipe)


def _own_recipe(reference: Recipe, parameters: Mapping[str, Any]) -> Recipe:
    return replace(reference, **{name: parameters[name] for name in ("learning_rate", "weight_decay")})


def _fill(parameters: Mapping[str, Any], limit: int, limits: Limits = NO_LIMITS) -> Architecture:
    """The architecture with the largest base that has at most `limit` parameters, and what then fits."""

    def fits(architecture: Architecture) -> bool:
        return architecture.n_parameters <= limit and limits.admit(architecture)

    low, high = 0.0, MAX_WIDTH / min(CONV_FREEDOM)
    while high - low > 1e-3:
        base = (low + high) / 2
        if fits(_build(parameters, _widths(parameters, base))):
            low = base
        else:
            high = base
    widths = _widths(parameters, low)
    return _build(parameters, _raise_widths(parameters, widths, low, limit, limits))


def _raise_widths(
    parameters: Mapping[str, Any], widths: dict[str, int], base: float, limit: int, limits: Limits
) -> dict[str, int]:
    """Widths one channel wider, those first that were rounded down most, until the budget is used or none fits."""
    wished = _wishes(parameters, base)
    for name in sorted(wished, key=lambda name: widths[name] - wished[name]):
        wider = widths | {name: widths[name] + 1}
        now, then = _build(parameters, widths), _build(parameters, wider)
        if now.n_parameters >= FILLED * limit:
            break
        if now.n_parameters < then.n_parameters <= limit and limits.admit(then):
            widths = wider
    return widths


def _widths(parameters: Mapping[str, Any], base: float) -> dict[str, int]:
    return {n: min(MAX_WIDTH, max(MIN_WIDTH, round(width))) for n, width in _wishes(parameters, base).items()}


def _wishes(parameters: Mapping[str, Any], base: float) -> dict[str, float]:
    """The width of every layer by its parameter's name, before rounding: base × growth along the depth × freedom."""
    names = _names(parameters)
    last = max(depth for _, depth in names)
    return {name: base * parameters["growth"] ** (depth / max(last, 1)) * parameters[name] for name, depth in names}


def used_widths(parameters: Mapping[str, Any]) -> list[str]:
    """The names of the width parameters that the structure uses."""
    return [name for name, _ in _names(parameters)]


def separable_share(parameters: Mapping[str, Any]) -> float:
    """The share of separable layers among the convolutions of blocks, the network's first apart, which is plain."""
    separable, total = -int(parameters["separable_1"]), -1
    for block in range(1, parameters["blocks"] + 1):
        n = parameters[f"convs_{block}"]
        separable, total = separable + n * int(parameters[f"separable_{block}"]), total + n
    return separable / max(total, 1)


def _names(parameters: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The width parameters that the structure uses, each with how many 3×3 convolutions stand before its layer."""
    names, depth = [], 0
    for b in range(1, parameters["blocks"] + 1):
        for i in range(1, parameters[f"convs_{b}"] + 1):
            names.append((f"width_{b}_{i}", depth))
            depth += 1
        if b < parameters["blocks"] and "c" in parameters["transition"]:
            names.append((f"transition_width_{b}", depth - 1))
    if parameters["head"] == HEADS[1]:
        names.append(("head_width", depth - 1))
    return names


def _build(parameters: Mapping[str, Any], widths: Mapping[str, int]) -> Architecture:
    layers: list[Layer] = []
    for b in range(1, parameters["blocks"] + 1):
        for i in range(1, parameters[f"convs_{b}"] + 1):
            separable = parameters[f"separable_{b}"] and bool(layers)  # one input channel has nothing to separate
            _add(layers, Conv(widths[f"width_{b}_{i}"], separable=separable, padding=parameters["padding"]))
        if b < parameters["blocks"]:
            _add_transition(layers, parameters["transition"], widths.get(f"transition_width_{b}", 0))
    _add_head(layers, parameters["head"], widths.get("head_width", 0), parameters["padding"])
    dropout = round(parameters["dropout"], 3)  # a line people read
    activation, deskewed = parameters["activation"], parameters["deskew"]
    return Architecture(tuple(layers), dropout=dropout, activation=activation, deskewed=deskewed)


def _add(layers: list[Layer], layer: Layer) -> None:
    """Append a layer. Where the map is smaller than a kernel, the kernel gets padding and a pool is left out."""
    side = _side(layers)
    if isinstance(layer, Conv) and side + 2 * layer.padding < layer.kernel:
        layer = replace(layer, padding=(layer.kernel - side + 1) // 2)
    if not (isinstance(layer, MaxPool) and side < 2):
        layers.append(layer)


def _side(layers: list[Layer]) -> int:
    side = INPUT_SIDE
    for layer in layers:
        side = 1 if isinstance(layer, GlobalPool) else (side + 2 * layer.padding - layer.kernel) // layer.stride + 1
    return side


def _add_transition(layers: list[Layer], kind: str, width: int) -> None:
    for token in kind.split():
        bare = token == "c-"
        _add(layers, MaxPool() if token == "M" else Conv(width, kernel=1, norm=not bare, activation=not bare))


def _add_head(layers: list[Layer], kind: str, width: int, padding: int) -> None:
    for token in kind.split():
        if token == "G":
            _add(layers, GlobalPool())
        elif token == "c":
            _add(layers, Conv(width, kernel=1))
        else:
            kernel = 1 if "k1" in token else 3
            logits = Conv(N_CLASSES, kernel=kernel, padding=padding * (kernel == 3), norm=False, activation=False)
            _add(layers, logits)


def to_parameters(candidate: Candidate, max_params: int | None = None) -> Parameters:
    """The parameters that `to_candidate` turns into this candidate under a budget of fewer than `max_params`.

    Those it has no use for are at their lowest. Without `max_params` the budget is the candidate's own size; a smaller
    budget narrows it. Raises `ArchitectureError` if the candidate is no point of the space.
    """
    recipe, architecture = candidate.recipe, candidate.architecture
    own = architecture.n_parameters
    ranges = distributions(recipe.optimizer)
    parameters = {name: _lowest(distribution) for name, distribution in ranges.items()}
    parameters |= _relative_widths(parameters | _read_layers(architecture))
    parameters |= {"dropout": architecture.dropout, "activation": architecture.activation}
    parameters |= {"deskew": architecture.deskewed}
    parameters |= {"fill": min(1.0, own / (max_params - 1)) if max_params else 1.0}
    parameters |= {n: getattr(recipe, n) for n in ("learning_rate", "weight_decay")}
    for name, distribution in ranges.items():
        if not _contains(distribution, parameters[name]):
            raise ArchitectureError(f"`{architecture}` is no point of the space: {name} is {parameters[name]}")
    reference = reference_recipe(recipe.optimizer, recipe.epochs, max_params or own + 1)
    if _own_recipe(reference, parameters) != recipe:
        raise ArchitectureError(f"`{architecture}` is no point of the space: its recipe is another")
    again = _fill(parameters, round(parameters["fill"] * max((max_params or 0) - 1, own)))
    if again != architecture:
        raise ArchitectureError(f"`{architecture}` is no point of the space: the nearest is `{again}`")
    return parameters


def _relative_widths(parameters: Parameters) -> Parameters:
    """Channels → growth and what each layer differs from it, around a geometric mean of 1."""
    names = _names(parameters)
    last = max(max(depth for _, depth in names), 1)
    convs = [(depth / last, log(parameters[name])) for name, depth in names if name.startswith("width")]
    mean = [sum(column) / len(convs) for column in zip(*convs, strict=True)]
    spread = sum((x - mean[0]) ** 2 for x, _ in convs)
    slope = sum((x - mean[0]) * (y - mean[1]) for x, y in convs) / spread if spread else 0.0
    slope = min(max(slope, 0.0), log(MAX_GROWTH))
    law = {name: exp(mean[1] + slope * (depth / last - mean[0])) for name, depth in names}
    return parameters | {"growth": exp(slope)} | {name: parameters[name] / width for name, width in law.items()}


def _contains(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return bool(distribution.low <= value <= distribution.high)


def _lowest(distribution: Distribution) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


def _read_layers(architecture: Architecture) -> Parameters:
    """Read the structure from the layers; `to_parameters` checks afterwards that it was read right."""
    layers = list(architecture.layers)
    parameters: Parameters = {}
    parameters["head"], head_width, layers = _split_head(layers, architecture)
    if head_width:
        parameters["head_width"] = head_width
    block, i = 1, 0
    for position, layer in enumerate(layers):
        if isinstance(layer, MaxPool):
            parameters["transition"], width = _read_transition(layers, position)
            if width:
                parameters[f"transition_width_{block}"] = width
            block, i = block + 1, 0
        elif isinstance(layer, Conv) and layer.kernel == 3:
            i += 1
            parameters[f"convs_{block}"] = i
            parameters[f"width_{block}_{i}"] = layer.channels
            parameters[f"separable_{block}"] = layer.separable
            parameters.setdefault("padding", layer.padding)
    if not 2 <= block <= MAX_BLOCKS or max(parameters.get(f"convs_{b}", 0) for b in range(1, block + 1)) > MAX_CONVS:
        raise ArchitectureError(
            f"`{architecture}` is no point of the space: it takes 2 to {MAX_BLOCKS} blocks of 1 to {MAX_CONVS} each"
        )
    return parameters | {"blocks": block}


def _split_head(layers: list[Layer], architecture: Architecture) -> tuple[str, int | None, list[Layer]]:
    """The kind of head, its hidden width if it has one, and the layers before it."""
    match layers:
        case [*body, GlobalPool(), Conv(kernel=1, norm=True) as hidden, Conv()]:
            return HEADS[1], hidden.channels, body
        case [*body, GlobalPool(), Conv()]:
            return HEADS[0], None, body
        case [*body, Conv(kernel=kernel), GlobalPool()]:
            return HEADS[2 if kernel == 1 else 3], None, body
    raise ArchitectureError(f"`{architecture}` is no point of the space: it ends with none of {', '.join(HEADS)}")


def _read_transition(layers: list[Layer], position: int) -> tuple[str, int | None]:
    """The kind of transition around the pool at this position, and the width of its 1×1 convolution."""
    for neighbour, form in ((position + 1, "M {}"), (position - 1, "{} M")):
        layer = layers[neighbour] if 0 <= neighbour < len(layers) else None
        if isinstance(layer, Conv) and layer.kernel == 1:
            return form.format("c" if layer.norm else "c-"), layer.channels
    return "M", None


def smallest(measure: Callable[[Architecture], int]) -> int:
    """The least that any network of the space has of something that grows with its widths and depth."""
    lowest = {name: _lowest(distribution) for name, distribution in distributions().items()}
    return min(
        measure(_fill(lowest | {"separable_2": separable, "transition": transition, "head": head}, 0))
        for separable, transition, head in product((False, True), TRANSITIONS, HEADS)
    )


def smallest_count() -> int:
    """The fewest parameters any network of the space can have."""
    return smallest(lambda architecture: architecture.n_parameters)
