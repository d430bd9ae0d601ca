"""The studies of a storage: make one, open one, and what each is of.

One database holds several studies: the search, and beside it its confirmation, its retraining and the baselines.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from nas_mnist.data.datasets import DATASETS, MNIST, Dataset
from nas_mnist.data.unpacking import default_data_dir
from nas_mnist.errors import StudyError
from nas_mnist.study.records import TrialCounts, TrialRecord
from nas_mnist.study.storage import Storage, experimental


@dataclass(frozen=True)
class StudyRef:
    """Where a study is, and which images it is of; the settings of every stage say at least this."""

    storage: Storage
    study_name: str = "nas-mnist"
    train_images: int | None = None  # fewer for a quick look; None: as many as the stage has
    data_dir: Path = field(default_factory=default_data_dir)
    dataset: Dataset = MNIST

    def load(self) -> optuna.Study:
        """The study, to read. Raises `StudyError` if it is not there."""
        return load(self.storage.open(), self.study_name)


@dataclass(frozen=True)
class Identity:
    """What makes the results of a study comparable; a study of another identity is refused."""

    dataset: str
    max_params: int
    epochs: int
    train_images: int
    split: str
    optimizer: str
    space: str
    max_macs: int | None = None  # no limit, as in studies that were made before there was one
    max_ram: int | None = None


def create(storage: RDBStorage, name: str, *, metric: str, attributes: dict[str, Any]) -> None:
    """Make the study, which maximises `metric`, unless it is there, and compare its attributes.

    Raises `StudyError` if an attribute that is a dict (such as the identity) has other values in the stored study.
    """
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    with experimental():
        study.set_metric_names([metric])
    stored = study.user_attrs
    for key, value in attributes.items():
        if key not in stored:
            study.set_user_attr(key, value)
        elif isinstance(value, dict):
            _compare(name, stored[key], value)


def _compare(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        if stored.get(key) != value:
            raise StudyError(
                f"study {name!r} was made with {key} {stored.get(key)!r}, not {value!r}; results of both cannot be "
                "compared: use the same value, or another study",
                "study_name",
            )


def names(storage: RDBStorage) -> list[str]:
    """The names of all studies in the storage."""
    return sorted(optuna.study.get_all_study_names(storage))


def is_ours(study: optuna.Study) -> bool:
    """Whether the study carries an identity: others may keep theirs in the same database."""
    return isinstance(study.user_attrs.get("identity"), dict)


def load(storage: RDBStorage, name: str) -> optuna.Study:
    """An existing study, to read. Raises `StudyError` with the names there are if this one is not."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        there = ", ".join(names(storage)) or "none"
        raise StudyError(
            f"there is no study {name!r} in this storage (there: {there}): name another", "study_name"
        ) from None


def dataset_of(storage: Storage, name: str, asked: Dataset | None = None) -> Dataset:
    """The dataset of this study; if there is no such study yet, the one asked for, or else MNIST.

    Raises `StudyError` if the study is of another dataset than the one asked for.
    """
    identity = identity_of(storage, name)
    if identity is None:
        return asked or MNIST
    dataset = recorded_dataset(identity)
    if asked:
        _compare(name, {"dataset": dataset.name}, {"dataset": asked.name})
    return dataset


def identity_of(storage: Storage, name: str) -> dict[str, Any] | None:
    """What the study of this name was made with, empty if it was not written down; None if there is no such study."""
    if (storage.path and not storage.path.exists()) or name not in names(opened := storage.open()):
        return None
    return recorded_identity(load(opened, name))


def recorded_identity(study: optuna.Study) -> dict[str, Any]:
    """What the study was made with; empty if it was not written down."""
    return study.user_attrs.get("identity", {})


def recorded_dataset(identity: dict[str, Any]) -> Dataset:
    return DATASETS[identity.get("dataset", MNIST.name)]


def find_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """The trial of this number, which has drawn its architecture. Raises `StudyError` if there is none."""
    trials = study.get_trials(deepcopy=False)
    if not number < len(trials):
        raise StudyError(
            f"there is no trial {number} in study {study.study_name!r}, which has {len(trials)}, counted from 0: "
            "see `nas-mnist show`"
        )
    if TrialRecord.from_trial(trials[number]).architecture is None:
        raise StudyError(
            f"trial {number} has not drawn its network ({trials[number].state.name}): see `nas-mnist show`"
        )
    return trials[number]


def count_trained(storage: RDBStorage, name: str) -> int | None:
    """The trained trials of a study; None if there is no such study."""
    return TrialCounts.of(load(storage, name).get_trials(deepcopy=False)).trained if name in names(storage) else None
