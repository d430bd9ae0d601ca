"""The stored form of a recipe: plain values for JSON, and the one place that reads what earlier versions have written.

Finished runs are known by their recipe. Who gives `Recipe` or `Augmentation` a new field raises `VERSION` and says here
what all runs before it had, so that these are still the same runs.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nas_mnist.errors import StudyError
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.recipe import Recipe

VERSION = 3  # of what is written; 1 has none written into it

# By version: the fields that came with it, and what they would have been in every run before. In 1 some runs have them.
ADDED: dict[int, dict[str, Any]] = {2: {"calibrated": False}, 3: {"schedule": "one-cycle"}}

STORED_AS = {"recalibrated": "calibrated"}  # fields whose name has changed since: what is stored keeps the first


def write(recipe: Recipe) -> dict[str, Any]:
    """Every value of the recipe, and the version of this form; `read` is the way back."""
    return {"version": VERSION, **_plain(recipe)}


def read(values: Mapping[str, Any]) -> Recipe:
    """The recipe that any version has written. Raises `StudyError` for a later one."""
    recipe = dict(values)
    version = recipe.pop("version", 1)
    if version > VERSION:
        raise StudyError(
            f"a recipe was stored in form {version} by a later nas-mnist, and this one reads up to {VERSION}: upgrade"
        )
    for number in range(version + 1, VERSION + 1):
        recipe = _completed(recipe, ADDED[number])
    for name, stored_as in STORED_AS.items():
        recipe[name] = recipe.pop(stored_as)
    return Recipe(**recipe | {"augmentation": Augmentation(**recipe["augmentation"])})


def distinctive(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe without those that are as in every run before there was a choice.

    By these, studies that were made before a field came are still those of the same recipe.
    """
    values = _plain(recipe)
    for added in ADDED.values():
        values = _without(values, added)
    return values


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {STORED_AS.get(name, name): value for name, value in asdict(recipe).items()}


def _completed(values: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: _completed(values[name], inner) for name, inner in added.items() if isinstance(inner, dict)}
    return {**added, **values, **nested}


def _without(values: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    nested = {name: _without(values[name], inner) for name, inner in added.items() if isinstance(inner, dict)}
    kept = {name: value for name, value in values.items() if name not in added or value != added[name]}
    return kept | nested
