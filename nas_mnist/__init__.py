"""Searches for the best tiny convolutional network on MNIST: the library behind the command `nas-mnist`.

Every public name is imported when it is first used: torch and Optuna take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas_mnist.api import ablate, confirm, evaluate, export, load_solution, retrain, search, train
    from nas_mnist.errors import NasMnistError
    from nas_mnist.model.architecture import Architecture, parse
    from nas_mnist.model.network import build
    from nas_mnist.model.zoo import ZOO
    from nas_mnist.training.recipe import Recipe

    __version__: str

__all__ = [
    "ZOO",
    "Architecture",
    "NasMnistError",
    "Recipe",
    "__version__",
    "ablate",
    "build",
    "confirm",
    "evaluate",
    "export",
    "load_solution",
    "parse",
    "retrain",
    "search",
    "train",
]

_HOMES = {
    "ZOO": "model.zoo",
    "Architecture": "model.architecture",
    "NasMnistError": "errors",
    "Recipe": "training.recipe",
    "build": "model.network",
    "parse": "model.architecture",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("nas-mnist")
    else:
        value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
