"""The whole way, from nothing to a solution that one can carry away: search, confirm, retrain, export.

Each stage goes on from what the storage holds, so the same call does what is left, wherever it was stopped.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas_mnist.errors import SolutionError
from nas_mnist.extras import Extra, require
from nas_mnist.solution import export
from nas_mnist.solution.export import Source
from nas_mnist.solution.predict import RECORD, check
from nas_mnist.stages import confirm, retrain, search
from nas_mnist.stages.confirm import ConfirmSettings
from nas_mnist.stages.retrain import Retrained, RetrainSettings
from nas_mnist.stages.search import SearchSettings
from nas_mnist.workers.events import OnWorkerEvent, Worker


@dataclass(frozen=True)
class ExportSettings:
    """The folder to make."""

    out: Path
    force: bool = False  # replace another study's solution


@dataclass(frozen=True)
class SolveSettings:
    """What each stage is asked to do; search and confirmation are of one study."""

    search: SearchSettings
    confirm: ConfirmSettings
    export: ExportSettings
    n_seeds: int = 5  # of the retraining
    retrain_images: int | None = None  # None: all

    def retrain(self) -> RetrainSettings:
        """The retraining of the confirmed winner. Raises `StudyError` if there is none."""
        return RetrainSettings(
            storage=self.search.storage,
            chosen=retrain.choose(self.search.storage, self.search.study_name),
            study_name=self.search.study_name,
            n_seeds=self.n_seeds,
            train_images=self.retrain_images,
            data_dir=self.search.data_dir,
            dataset=self.search.dataset,
        )


Stage = SearchSettings | ConfirmSettings | RetrainSettings | ExportSettings


def solve(
    settings: SolveSettings,
    workers: list[Worker],
    follow: Callable[[Stage], AbstractContextManager[OnWorkerEvent]],
) -> tuple[Retrained, dict[str, Any]]:
    """Do what is left of the four stages; return the retrained winner and what its `solution.json` holds.

    `follow` gives the consumer of events of each stage. A solution of the same study in the folder is replaced if the
    winner, or its runs, have become others. Raises as the stages do; what can be known beforehand (a folder in the way,
    a package that is missing, a budget, a number of images) before anything is trained.
    """
    require(Extra.export)
    _check_place(settings)
    search.check_budget(settings.search.max_params)
    confirm.check_train_images(settings.confirm)
    with follow(settings.search) as on_event:
        search.search(settings.search, workers, on_event)
    with follow(settings.confirm) as on_event:
        confirm.confirm(settings.confirm, workers, on_event)
    to_retrain = settings.retrain()
    with follow(to_retrain) as on_event:
        retrained = retrain.retrain(to_retrain, workers, on_event)
    with follow(settings.export):
        return retrained, _export(settings, retrained)


def _check_place(settings: SolveSettings) -> None:
    """Raise `SolutionError` before hours of training if the folder could not be put in its place after them."""
    export.check_place(settings.export.out.resolve(), settings.export.force or _is_of_this_study(settings))


def _export(settings: SolveSettings, retrained: Retrained) -> dict[str, Any]:
    there = _exported(settings.export.out)
    if there and _is_of_this_study(settings) and _is_of(there, retrained) and _is_whole(settings.export.out):
        return there
    force = settings.export.force or _is_of_this_study(settings)
    source = Source.find(settings.search.storage, settings.search.study_name, retrained.candidate)
    return export.export(retrained, source, settings.search.data_dir, settings.export.out, force=force)


def _exported(out: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None if it is no exported solution."""
    try:
        record = json.loads((out / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("search"), dict) else None


def _is_of_this_study(settings: SolveSettings) -> bool:
    record = _exported(settings.export.out)
    if record is None:
        return False
    names = record["search"].get("storage"), record["search"].get("study_name")
    return names == (str(settings.search.storage), settings.search.study_name)


def _is_whole(out: Path) -> bool:
    try:
        check(out)
    except SolutionError:
        return False
    return True


def _is_of(record: dict[str, Any], retrained: Retrained) -> bool:
    """Whether the record tells of these very runs."""
    told = json.loads(json.dumps([asdict(run) for run in retrained.runs]))
    return bool(record.get("architecture") == str(retrained.candidate.architecture) and record.get("runs") == told)
