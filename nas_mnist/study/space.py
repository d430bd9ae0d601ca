"""The search space: Optuna trial → candidate, and candidate → parameters.

Every parameter is suggested for every trial and its range is fixed, so that multivariate TPE keeps them all. A network
is two or three blocks of convolutions with a transition between them and a head behind.

Widths are wishes. If the network they make is over the budget, all of them are narrowed by one factor, the largest that
fits; a candidate within the budget is built as drawn, so every network of the space is a point of it. Without this 86 %
of random draws would be over 8,000 parameters and hardly one below 1,000; with it, none is over.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import sqrt
from typing import Any

from optuna import Trial
from optuna.distributions import (
    BaseDistribution,
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
    Architecture,
    Conv,
    GlobalPool,
    Layer,
    Limits,
    MaxPool,
    parse,
)
from nas_mnist.study import stored
from nas_mnist.task import MAX_EPOCHS
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.recipe import Recipe

MAX_BLOCKS, MAX_CONVS = 3, 4
MIN_WIDTH, MAX_WIDTH = 2, 64
NARROWING_STEPS = 256  # the factors tried are 1/256, 2/256, ... 1

# In notation, with the width left out: c a convolution (1×1), M the pool, - bare.
TRANSITIONS = ("M", "M c", "M c-", "c M", "c- M")
HEADS = ("G c10k1-", "G c c10k1-", "c10k1- G", "c10- G")
LEARNING_RATES = {"sgd": (0.01, 1.0), "adamw": (1e-3, 0.05), "soap": (1e-3, 0.1)}
# SGD adds the decay to the gradient; the others take it times the learning rate from the weights.
WEIGHT_DECAYS = {"sgd": (1e-5, 1e-2), "adamw": (1e-4, 1.0), "soap": (1e-4, 1.0)}
RECIPE = Recipe(batch_size=64, optimizer="soap", calibrated=True)  # what no parameter says

Parameters = dict[str, Any]


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


def reference_recipe(optimizer: str = RECIPE.optimizer, epochs: int = MAX_EPOCHS) -> Recipe:
    """What a warm start is trained with: the middle of the ranges of learning rate and weight decay."""
    rate, decay = (sqrt(low * high) for low, high in (LEARNING_RATES[optimizer], WEIGHT_DECAYS[optimizer]))
    return replace(RECIPE, optimizer=optimizer, epochs=epochs, learning_rate=rate, weight_decay=decay)


def distributions(optimizer: str = RECIPE.optimizer) -> dict[str, BaseDistribution]:
    """Every parameter of the space and its range."""
    width = IntDistribution(MIN_WIDTH, MAX_WIDTH)
    blocks = range(1, MAX_BLOCKS + 1)
    return {
        "blocks": IntDistribution(2, MAX_BLOCKS),
        **{f"convs_{b}": IntDistribution(1, MAX_CONVS) for b in blocks},
        **{f"width_{b}_{i}": width for b in blocks for i in range(1, MAX_CONVS + 1)},
        **{f"separable_{b}": CategoricalDistribution((False, True)) for b in blocks},
        "transition": CategoricalDistribution(TRANSITIONS),
        **{f"transition_width_{b}": width for b in blocks[:-1]},
        "padding": IntDistribution(0, 1),
        "head": CategoricalDistribution(HEADS),
        "head_width": width,
        "dropout": FloatDistribution(0.0, 0.15),
        "learning_rate": FloatDistribution(*LEARNING_RATES[optimizer], log=True),
        "batch_size": CategoricalDistribution((32, 64, 128)),
        "weight_decay": FloatDistribution(*WEIGHT_DECAYS[optimizer], log=True),
        "label_smoothing": FloatDistribution(0.0, 0.1),
        "rotation_degrees": FloatDistribution(0.0, 15.0),
        "translation": FloatDistribution(0.0, 0.12),
        "scale": FloatDistribution(0.0, 0.2),
        "shear_degrees": FloatDistribution(0.0, 15.0),
    }


def fingerprint(optimizer: str = RECIPE.optimizer) -> str:
    """A short hash that changes with the space; studies of different spaces are never mixed."""
    ranges = {name: json.loads(distribution_to_json(d)) for name, d in distributions(optimizer).items()}
    return hashlib.sha256(json.dumps([ranges, stored.distinctive(RECIPE)], sort_keys=True).encode()).hexdigest()[:12]


def suggest(trial: Trial, optimizer: str = RECIPE.optimizer) -> Parameters:
    """Draw every parameter of the space, always all of them."""
    return {name: _suggest(trial, name, distribution) for name, distribution in distributions(optimizer).items()}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
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
    optimizer: str = RECIPE.optimizer,
    limits: Limits = NO_LIMITS,
) -> Candidate:
    """The candidate that the parameters denote, narrowed to fewer than `max_params` and within the limits if it can be.

    A structure that is over the budget even at its narrowest is returned at its narrowest: the caller checks.
    """

    def is_over(step: int) -> bool:
        architecture = _build(parameters, step / NARROWING_STEPS)
        return architecture.n_parameters >= max_params or not limits.admit(architecture)

    step = bisect_left(range(1, NARROWING_STEPS), True, key=is_over)
    architecture = _build(parameters, step / NARROWING_STEPS if is_over(NARROWING_STEPS) else 1.0)
    return Candidate(architecture, _recipe(parameters, epochs, optimizer))


def _recipe(parameters: Mapping[str, Any], epochs: int, optimizer: str) -> Recipe:
    own = {name: parameters[name] for name in ("batch_size", "learning_rate", "weight_decay", "label_smoothing")}
    ranges = {name: parameters[name] for name in ("rotation_degrees", "translation", "scale", "shear_degrees")}
    return replace(RECIPE, epochs=epochs, optimizer=optimizer, **own, augmentation=Augmentation(**ranges))


def _build(parameters: Mapping[str, Any], factor: float) -> Architecture:
    """The architecture with every width times `factor`, but at least `MIN_WIDTH`."""

    def width(name: str) -> int:
        return max(MIN_WIDTH, int(parameters[name] * factor))

    layers: list[Layer] = []
    for b in range(1, parameters["blocks"] + 1):
        for i in range(1, parameters[f"convs_{b}"] + 1):
            separable = parameters[f"separable_{b}"] and bool(layers)  # one input channel has nothing to separate
            _add(layers, Conv(width(f"width_{b}_{i}"), separable=separable, padding=parameters["padding"]))
        if b < parameters["blocks"]:
            _add_transition(layers, parameters["transition"], width(f"transition_width_{b}"))
    _add_head(layers, parameters["head"], width("head_width"), parameters["padding"])
    return Architecture(tuple(layers), dropout=round(parameters["dropout"], 3))  # a line people read


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


def to_parameters(candidate: Candidate) -> Parameters:
    """The parameters that `to_candidate` turns into this candidate; those it has no use for are at their lowest.

    Raises `ArchitectureError` if the candidate is no point of the space.
    """
    recipe, architecture = candidate.recipe, candidate.architecture
    ranges = distributions(recipe.optimizer)
    parameters = {name: _lowest(distribution) for name, distribution in ranges.items()}
    parameters |= _read_layers(architecture)
    parameters |= {
        "dropout": architecture.dropout,
        "learning_rate": recipe.learning_rate,
        "batch_size": recipe.batch_size,
    }
    parameters |= {"weight_decay": recipe.weight_decay, "label_smoothing": recipe.label_smoothing}
    parameters |= asdict(recipe.augmentation)
    for name, distribution in ranges.items():
        if not _contains(distribution, parameters[name]):
            raise ArchitectureError(f"`{architecture}` is no point of the space: {name} is {parameters[name]}")
    again = to_candidate(
        parameters, max_params=architecture.n_parameters + 1, epochs=recipe.epochs, optimizer=recipe.optimizer
    )
    if again != candidate:
        raise ArchitectureError(f"`{architecture}` is no point of the space: the nearest is `{again.architecture}`")
    return parameters


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return distribution.low <= value <= distribution.high


def _lowest(distribution: BaseDistribution) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low


def _read_layers(architecture: Architecture) -> Parameters:
    """Read the structure from the layers; `to_parameters` checks afterwards that it was read right."""
    layers, parameters = list(architecture.layers), {}
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
        measure(_build(lowest | {"separable_2": separable, "transition": transition, "head": head}, 1.0))
        for separable, transition, head in product((False, True), TRANSITIONS, HEADS)
    )


def smallest_count() -> int:
    """The fewest parameters any network of the space can have."""
    return smallest(lambda architecture: architecture.n_parameters)
