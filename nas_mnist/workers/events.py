"""What a worker is, and what it tells whoever started it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nas_mnist.errors import NasMnistError


@dataclass(frozen=True)
class Worker:
    """One process and the device it computes on."""

    index: int
    device: str  # "cpu", "cuda:0"


OnEvent = Callable[[Any], None]  # what takes the events of one worker, in its own process
OnWorkerEvent = Callable[[Worker | None, Any], None]  # what takes those of all of them; None: of who started them


def tee(*consumers: OnWorkerEvent) -> OnWorkerEvent:
    """Hands each event to all of them, in this order."""

    def on_event(worker: Worker | None, event: Any) -> None:
        for consumer in consumers:
            consumer(worker, event)

    return on_event


class Progress:
    """Base of the events that show that a worker gets on with its work, and is no hopeless case."""


class Completed(Progress):
    """Base of the events that show that a piece of work is done."""


@dataclass(frozen=True)
class WorkerDied:
    """The event that the parent itself makes when a worker ends before its work is done."""

    reason: str


class WorkerFailed(NasMnistError):
    """A worker kept dying; the message says why, and a traceback that it left is a note of the error."""
