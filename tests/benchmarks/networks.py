"""What `make bench` trains: networks of people and the winner of a search, each with the recipe it is searched by."""

from dataclasses import dataclass, replace

from nas_mnist.model.architecture import Architecture, parse
from nas_mnist.study.space import reference_recipe
from nas_mnist.training.recipe import Recipe


@dataclass(frozen=True)
class Case:
    line: str
    optimizer: str
    batch_size: int

    @property
    def architecture(self) -> Architecture:
        return parse(self.line)

    @property
    def recipe(self) -> Recipe:
        return replace(reference_recipe(self.optimizer), batch_size=self.batch_size)


CASES = {
    "step-by-step": Case("c8 c16 M c8k1 c12 c16 c20 G c16k1 c10k1- | dropout=0.05", "sgd", 128),
    "era1a7": Case("c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G | act-norm", "soap", 64),
    "winner": Case("c20 d24 d44 M c22k1- d24 d36 d44 c10k1- G", "soap", 64),
    "era1a7, narrow": Case("c9 d9 d19 M c9k1- d9 d14 d19 c10k1- G | act-norm", "soap", 64),
    "small": Case("c4 c8 M c8k1 c8 c10 G c10k1- | dropout=0.05", "sgd", 128),
}
