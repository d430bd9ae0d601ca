"""How a network is trained, in one frozen value."""

from dataclasses import dataclass, field
from typing import Literal

from nas_mnist.task import MAX_EPOCHS
from nas_mnist.training.augmentation import Augmentation

Optimizer = Literal["sgd", "adamw", "soap"]
Schedule = Literal["one-cycle", "constant"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The learning rate rises to its maximum and falls to almost nothing, or stays there."""

    epochs: int = MAX_EPOCHS
    batch_size: int = 128
    optimizer: Optimizer = "sgd"  # sgd: Nesterov momentum
    learning_rate: float = 0.1  # the maximum, per step
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_fraction: float = 0.2  # of all steps, until the learning rate is at its maximum
    augmentation: Augmentation = field(default_factory=Augmentation)
    recalibrated: bool = False  # batch norm's statistics are measured anew after every epoch: `recalibrate`
    schedule: Schedule = "one-cycle"  # of the learning rate

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(
                f"a recipe needs at least 1 epoch and 2 images a batch, not {self.epochs} and {self.batch_size}"
            )
