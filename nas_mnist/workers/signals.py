"""Ctrl-C, and SIGTERM, which Slurm and Kubernetes send: both stop a command, once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stopped_once(*, for_good: bool = False) -> Iterator[None]:
    """Within, the first of the signals raises `KeyboardInterrupt`; those after it are ignored: cleaning up is short.

    A block within another one leaves it to that one, and so does a thread that is not the main one. A signal that was
    ignored from the start (as a shell does for its background jobs) stays ignored. With `for_good` the block is the
    last thing that the process does, and once stopped it is left in peace to its end.
    """
    if threading.current_thread() is not threading.main_thread() or _is_inner():
        yield
        return
    previous = {s: signal.getsignal(s) for s in SIGNALS}
    for s in SIGNALS:
        if previous[s] is not signal.SIG_IGN:
            signal.signal(s, _stop)
    try:
        yield
    finally:
        for s, handler in previous.items():
            if not (for_good and signal.getsignal(s) is _ignore):
                signal.signal(s, handler)


@contextlib.contextmanager
def blocked_for_children() -> Iterator[None]:
    """A process that is started within gets neither signal, which may reach the whole group; here they are put off."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_inner() -> bool:
    return any(signal.getsignal(s) in (_stop, _ignore) for s in SIGNALS)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    for s in SIGNALS:
        if signal.getsignal(s) is _stop:
            signal.signal(s, _ignore)
    raise KeyboardInterrupt


def _ignore(signal_number: int, frame: FrameType | None) -> None:
    pass
