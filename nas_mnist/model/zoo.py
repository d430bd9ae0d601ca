"""The reference systems: ten networks that people built by hand for this task, and what they published of them.

Every published accuracy is one run, read on the test set, mostly at its best epoch: none is a mean, and none was chosen
on held-out data. `nas-mnist baselines` trains all ten with one recipe, some with their own besides, and says what they
reach that way.

The documents give a dropout rate of 0.01 to 0.1 for the systems that have any, without saying which has which: the
lines take 0.01, except those of era1a7, which states 0, and lite-m1, which lists none. Theirs drops single
elements; here it drops channels, as in the search space and in two thirds of the time.
"""

from dataclasses import dataclass
from functools import cached_property

from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import Architecture, parse

Column = tuple[int | None, ...]


def _column(text: str) -> Column:
    """Numbers of a published table, one for each layer; a dot where the table leaves the layer out."""
    return tuple(None if cell == "·" else int(cell) for cell in text.split())


@dataclass(frozen=True)
class PublishedTable:
    """Columns of a table as published, one entry for each layer of the line, `None` for a layer it leaves out.

    A column that was not published is empty. Side n, jump j and receptive field r in pixels, as in `LayerShape`.
    """

    channels: Column = ()
    side: Column = ()
    jump: Column = ()
    receptive_field: Column = ()


@dataclass(frozen=True)
class ReferenceSystem:
    """A published network: its line, and what its authors report. Accuracies are fractions of the test set."""

    name: str
    notation: str
    n_parameters: int
    best_accuracy: float  # of all epochs
    last_accuracy: float | None  # None if only the best epoch was published
    epochs: int  # trained for at most so many
    source: str  # the project, as its authors name it, and its repository if it has one
    receptive_fields: Column  # the right ones, one for each layer, in pixels
    published: PublishedTable = PublishedTable()
    published_receptive_field: int | None = None  # where only the largest was published
    remark: str = ""  # what the published figures have wrong

    @cached_property
    def architecture(self) -> Architecture:
        return parse(self.notation)

    @property
    def published_accuracy(self) -> float:
        """What there is to reproduce: the last epoch if it was published, else the best."""
        return self.best_accuracy if self.last_accuracy is None else self.last_accuracy


@dataclass(frozen=True)
class Mark:
    """What was published of a network of this size whose layers are not: a point to beat, accuracy of the test set."""

    n_parameters: int
    accuracy: float
    remark: str = ""


MARKS = (
    Mark(697, 0.9903, "after 2,000 epochs, the best of 700 runs"),
    Mark(1_936, 0.991),
    Mark(3_762, 0.9952),
)

_SYSTEMS = (
    ReferenceSystem(
        "era1a7",
        "c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G | act-norm",
        n_parameters=4_392,
        best_accuracy=0.9948,
        last_accuracy=0.9946,
        epochs=15,
        source="TSAI ERA V1 A7, github.com/woncoh1/era1a7",
        receptive_fields=_column("3 5 7 8 8 12 16 20 20 28"),
        published=PublishedTable(
            channels=_column("16 16 32 32 16 16 24 32 10 10"),
            side=_column("26 24 22 11 11 9 7 5 5 1"),
            jump=_column("1 1 1 2 · 2 2 2 · 2"),
            receptive_field=_column("3 5 7 8 · 12 16 20 · 28"),
        ),
    ),
    ReferenceSystem(
        "eva-drilldown",
        "c8 c16 M c8k1- c10 c16 c18 G c16k1 c10k1- | dropout=0.01",
        n_parameters=6_720,
        best_accuracy=0.9953,
        last_accuracy=0.9950,
        epochs=15,
        source="Finetune CNN Architecture on MNIST dataset, github.com/gkdivya/EVA, 5_CodingDrillDown",
        receptive_fields=_column("3 5 6 6 10 14 18 28 28 28"),
        published=PublishedTable(
            side=_column("26 24 12 12 10 8 6 · 6 6"),
            jump=_column("1 1 2 2 2 2 2 · 2 2"),
            receptive_field=_column("3 5 6 12 28 60 124 · 248 496"),
        ),
        remark=(
            "the published receptive fields double from the 1×1 convolution after the pool on; a 1×1 convolution adds "
            "nothing and a 3×3 one adds 2 × the jump of 2. The published table has the last two layers before the pool."
        ),
    ),
    ReferenceSystem(
        "step-by-step",
        "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.01",
        n_parameters=7_496,
        best_accuracy=0.9953,
        last_accuracy=0.9953,
        epochs=15,
        source="Step-By-Step Guide to Design A Convolutional Neural Network, PyTorch",
        receptive_fields=_column("3 5 6 6 10 14 18 28 28 28"),
        published=PublishedTable(
            channels=_column("8 16 16 8 12 16 20 20 16 10"),
            side=_column("26 24 12 12 10 8 6 1 1 1"),
            jump=_column("1 1 2 2 2 2 2 2 2 2"),
            receptive_field=_column("3 5 6 6 10 14 18 28 28 28"),
        ),
    ),
    ReferenceSystem(
        "lite-m1",
        "c10r c20r M c10k1r c10r c20r M c10k1r c10k4r",
        n_parameters=6_590,
        best_accuracy=0.9895,
        last_accuracy=None,
        epochs=15,
        source="MNIST CNN Lite Model Architecture, TSAI ERA V3 Session 7",
        receptive_fields=_column("3 5 6 6 10 14 16 16 28"),
        published=PublishedTable(
            channels=_column("10 20 20 10 10 20 20 10 10"), side=_column("26 24 12 12 10 8 4 4 1")
        ),
    ),
    ReferenceSystem(
        # Published with dropout before the ReLU in places, which is the same: a ReLU passes 0 and positive factors.
        "lite-m2",
        "c8 c8 c16 M c8k1 c8 c16 c10k1- G | dropout=0.01",
        n_parameters=3_944,
        best_accuracy=0.9872,
        last_accuracy=None,
        epochs=15,
        source="MNIST CNN Lite Model Architecture, TSAI ERA V3 Session 7",
        receptive_fields=_column("3 5 7 8 8 12 16 16 28"),
        published=PublishedTable(channels=_column("8 8 16 16 8 8 16 10 10"), side=_column("26 24 22 11 11 9 7 7 1")),
    ),
    ReferenceSystem(
        "lite-m3",
        "c4 c8 c16 c16 M c8k1- c16 c16 G c10k1- | act-norm dropout=0.01",
        n_parameters=7_676,
        best_accuracy=0.9927,
        last_accuracy=None,
        epochs=15,
        source="MNIST CNN Lite Model Architecture, TSAI ERA V3 Session 7",
        receptive_fields=_column("3 5 7 9 10 10 14 18 28 28"),
        published=PublishedTable(
            channels=_column("4 8 16 16 16 8 16 16 16 10"), side=_column("26 24 22 20 10 10 8 6 1 1")
        ),
    ),
    ReferenceSystem(
        "lite-m4",
        "c8 c16 c10k1- M c10 c16 c16 c10- G | act-norm dropout=0.01",
        n_parameters=7_600,
        best_accuracy=0.9953,
        last_accuracy=None,
        epochs=15,
        source="MNIST CNN Lite Model Architecture, TSAI ERA V3 Session 7",
        receptive_fields=_column("3 5 5 6 10 14 18 22 28"),
        published=PublishedTable(channels=_column("8 16 10 10 10 16 16 10 10"), side=_column("26 24 24 12 10 8 6 4 1")),
    ),
    ReferenceSystem(
        "eva6s4-medium",
        "c8p1 c8p1 M c8k1+b- c8p1 c16p1 M c16k1+b- c16 c16 M G c10k1- | act-norm dropout=0.01",
        n_parameters=7_632,
        best_accuracy=0.9944,
        last_accuracy=None,
        epochs=19,
        source="Small CNNs for Handwritten Digit recognition, github.com/rajy4683/EVA6, EVA6S4",
        receptive_fields=_column("3 5 6 6 10 14 16 16 24 32 36 36 36"),
        published_receptive_field=32,
        remark="the published receptive field ends at the last 3×3 convolution; the pool behind it makes 32 36",
    ),
    ReferenceSystem(
        "eva6s4-small",
        "c8p1 c8p1 c8p1 M c8k1+b- c8p1 c16p1 c16s2p1 G c10k1- | act-norm dropout=0.01",
        n_parameters=5_616,
        best_accuracy=0.9925,
        last_accuracy=None,
        epochs=19,
        source="Small CNNs for Handwritten Digit recognition, github.com/rajy4683/EVA6, EVA6S4",
        receptive_fields=_column("3 5 7 8 8 12 16 20 44 44"),
        published_receptive_field=20,
        remark="the published receptive field ends at the last 3×3 convolution; the global pool makes 20 44",
    ),
    ReferenceSystem(
        "eva6s4-ultrasmall",
        "c8p1 c8p1 c8p1 c8s2p1 M c8k1+b- c8p1 c8p1 c16s2p1 G c10k1- | act-norm dropout=0.01",
        n_parameters=4_464,
        best_accuracy=0.9900,
        last_accuracy=None,
        epochs=19,
        source="Small CNNs for Handwritten Digit recognition, github.com/rajy4683/EVA6, EVA6S4",
        receptive_fields=_column("3 5 7 9 11 11 19 27 35 59 59"),
        published_receptive_field=35,
        remark="the published receptive field ends at the last 3×3 convolution; the global pool makes 35 59",
    ),
)

ZOO: dict[str, ReferenceSystem] = {system.name: system for system in _SYSTEMS}


def find(name: str) -> ReferenceSystem:
    """The reference system of this name. Raises `ArchitectureError` with the names there are."""
    if name not in ZOO:
        raise ArchitectureError(f"there is no reference system {name!r}: choose one of {', '.join(ZOO)}")
    return ZOO[name]


def resolve(text: str) -> Architecture:
    """The architecture that a reference system's name or a notation line denotes.

    Raises `ArchitectureError` if it is neither.
    """
    text = text.strip()
    if text in ZOO:
        return ZOO[text].architecture
    try:
        return parse(text)
    except ArchitectureError as error:
        if len(text.split()) != 1:
            raise
        raise ArchitectureError(f"{text!r} is no reference system ({', '.join(ZOO)}) and no line: {error}") from None
