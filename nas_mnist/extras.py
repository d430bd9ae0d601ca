"""The packages that only some commands need, and what a command says where one is not installed."""

from enum import Enum
from importlib.util import find_spec

from nas_mnist.errors import NasMnistError


class Extra(Enum):
    """The modules of an extra of this package; its name is what stands in brackets behind `nas-mnist`."""

    report = ("plotly", "jinja2")
    export = ("onnx", "onnxscript", "onnxruntime")
    postgresql = ("psycopg",)
    ray = ("ray",)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.value if find_spec(name) is None]

    @property
    def pip_line(self) -> str:
        return f"pip install 'nas-mnist[{self.name}]'"


class MissingPackage(NasMnistError):
    """A package of an extra is not installed; the message has the line that installs it."""


def require(extra: Extra) -> None:
    """Raise `MissingPackage` if a module of this extra is not installed; nothing is imported."""
    if missing := extra.missing:
        names = " and ".join([", ".join(missing[:-1])] * (len(missing) > 1) + missing[-1:])
        raise MissingPackage(f"{extra.name} needs {names}, not installed here: {extra.pip_line}")
