"""Keeps what the dashboard shows of a study up to date while it is worked on."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nas_mnist.errors import StudyError
from nas_mnist.stages.search import SearchSettings
from nas_mnist.stages.trial import TrialEnded
from nas_mnist.study.storage import STORAGE_ERRORS, Storage
from nas_mnist.workers.events import OnWorkerEvent, Worker, tee

SECONDS_BETWEEN = 30  # two times of publishing; each takes about a second


@contextlib.contextmanager
def publishing(stage: Any, display: contextlib.AbstractContextManager[OnWorkerEvent]) -> Iterator[OnWorkerEvent]:
    """What takes the events of a stage: its display, and if it is a search, what publishes it; at the end once more."""
    if not isinstance(stage, SearchSettings):
        with display as show:
            yield show
        return
    publisher = Publisher(stage.storage, stage.study_name, stage.data_dir)
    with display as show:
        yield tee(show, publisher)
    publisher.publish()


class Publisher:
    """Publishes a study now and then: give it every event, as one gives them to a display."""

    def __init__(self, storage: Storage, study_name: str, data_dir: Path):
        self._arguments = storage, study_name, data_dir
        self._last = time.monotonic()

    def __call__(self, worker: Worker | None, event: Any) -> None:
        if isinstance(event, TrialEnded) and time.monotonic() - self._last > SECONDS_BETWEEN:
            self._last = time.monotonic()
            with contextlib.suppress(StudyError, *STORAGE_ERRORS):  # a note is not worth a search; next time
                self.publish()

    def publish(self) -> None:
        from nas_mnist.views import dashboard  # takes seconds to import, for which no worker shall wait

        dashboard.publish(*self._arguments)
