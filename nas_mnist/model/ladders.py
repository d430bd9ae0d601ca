"""The steps by which two of the reference systems came to be, as their authors tell them.

What was published of a step is its number of parameters and its best test accuracy, one run. The lines are rebuilt from
the numbers: eva-drilldown's skeleton is the only line of the family `c8 c16 M c8k1 …` with 4,572 parameters, and no
line has 4,572 without norms and 5,088 with them, so the step that added the norms changed widths as well; what stands
here has the published count and the fewest changes. Of step-by-step's skeleton "5.3k" was published.
"""

from dataclasses import dataclass
from functools import cached_property

from nas_mnist.model.architecture import Architecture, parse


@dataclass(frozen=True)
class Rung:
    """One step. `published` is the best test accuracy of all epochs, a fraction."""

    name: str
    notation: str
    published: float
    augmented: bool = False
    one_cycle: bool = False  # or a constant rate

    @cached_property
    def architecture(self) -> Architecture:
        return parse(self.notation)


LADDERS = {
    "eva-drilldown": (
        Rung("skeleton", "c8r c16r M c8k1r c10r c10r c16r G c10k1-", 0.9843),
        Rung("+ batch norm", "c8 c16 M c8k1- c8 c12 c16 G c16k1 c10k1-", 0.9904),
        Rung("+ dropout", "c8 c16 M c8k1- c8 c12 c16 G c16k1 c10k1- | dropout=0.1", 0.9864),
        Rung("+ layer after the pool", "c8 c16 M c8k1 c10 c16 c16 G c10k1- | dropout=0.1", 0.9922),
        Rung("+ augmentation", "c8 c16 M c8k1 c10 c16 c16 G c10k1- | dropout=0.1", 0.9932, augmented=True),
        Rung(
            "+ capacity, OneCycleLR",
            "c8 c16 M c8k1- c10 c16 c18 G c16k1 c10k1- | dropout=0.01",
            0.9953,
            augmented=True,
            one_cycle=True,
        ),
    ),
    "step-by-step": (
        Rung("skeleton", "c8r c16r M c8k1r c12r c16r c10- G", 0.9882),
        Rung(
            "+ capacity, augmentation",
            "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.01",
            0.9943,
            augmented=True,
        ),
        Rung(
            "+ OneCycleLR",
            "c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.01",
            0.9953,
            augmented=True,
            one_cycle=True,
        ),
    ),
}
