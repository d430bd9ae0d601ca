"""Files that belong to trials: kept in a folder beside the database, listed and shown by optuna-dashboard.

Their entries are attributes of the study, where the dashboard looks for them too: what Optuna's own `upload_artifact`
writes into a trial can never be taken back once the trial has finished, and candidates drop out of the best few later.
"""

import contextlib
import csv
import io
import json
import mimetypes
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import optuna
import safetensors.torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial
from torch import Tensor

from nas_mnist.errors import StudyError
from nas_mnist.model.network import Network

WEIGHTS = "weights.safetensors"
MISTAKES = "misclassified.csv"


class _WholeFiles(FileSystemArtifactStore):
    """A file is written under another name and renamed: what is there under its own is whole."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        partial = self._folder / f".{artifact_id}"
        try:
            super().write(partial.name, content_body)
            partial.replace(self._folder / artifact_id)
        finally:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Artifacts:
    """The files of the trials of one study."""

    study: optuna.Study
    folder: Path

    @property
    def store(self) -> FileSystemArtifactStore:
        return _WholeFiles(self.folder)

    def add(self, trial: optuna.Trial | FrozenTrial, name: str, content: bytes) -> str:
        """Keep a file with a trial, finished or not, and return its id. An entry without its file never exists."""
        self.folder.mkdir(parents=True, exist_ok=True)
        artifact_id = str(uuid.uuid4())
        self.store.write(artifact_id, io.BytesIO(content))
        mimetype, encoding = mimetypes.guess_type(name)
        entry = {
            "artifact_id": artifact_id,
            "filename": name,
            "mimetype": mimetype or "application/octet-stream",
            "encoding": encoding,
        }
        self._write_entry(trial, artifact_id, entry)
        return artifact_id

    def lacks(self, artifact_id: str | None) -> bool:
        """Whether there is no such file, or only its entry: a database may be copied without its folder."""
        return artifact_id is None or not (self.folder / artifact_id).exists()

    def put(self, trial: optuna.Trial | FrozenTrial, name: str, content: bytes, artifact_id: str | None) -> str:
        """Give an entry its missing file again, under its id; without an id, `add`. Returns the id."""
        if artifact_id is None:
            return self.add(trial, name, content)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store.write(artifact_id, io.BytesIO(content))
        return artifact_id

    def of(self, trial: optuna.Trial | FrozenTrial) -> dict[str, str]:
        """The ids of a trial's files by name."""
        return self.all().get(trial._trial_id, {})

    def all(self) -> dict[int, dict[str, str]]:
        """The ids of all files of the study by name, for each trial's id in the storage."""
        found: dict[int, dict[str, str]] = {}
        attributes = self.study._storage.get_study_system_attrs(self.study._study_id)
        for key, value in attributes.items():
            if key.startswith("dashboard:artifacts:") and (entry := json.loads(value)):
                found.setdefault(int(key.split(":")[2]), {})[entry["filename"]] = entry["artifact_id"]
        return found

    def read(self, artifact_id: str) -> bytes:
        """Raises `StudyError` if the file is not there any more."""
        try:
            with self.store.open_reader(artifact_id) as file:
                return file.read()
        except (OSError, ArtifactNotFound) as error:
            raise StudyError(
                f"the files of study {self.study.study_name!r} must be in {self.folder}, and one is missing: copy that "
                "folder along with the database"
            ) from error

    def add_weights(self, trial: optuna.Trial | FrozenTrial, network: Network) -> None:
        weights = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
        self.add(trial, WEIGHTS, safetensors.torch.save(weights))  # never pickle

    def weights_of(self, trial: FrozenTrial) -> dict[str, Tensor] | None:
        """None if the trial kept none. Raises `StudyError` if the file is missing or damaged."""
        artifact_id = self.of(trial).get(WEIGHTS)
        if artifact_id is None:
            return None
        try:
            return safetensors.torch.load(self.read(artifact_id))
        except safetensors.SafetensorError as error:
            raise StudyError(
                f"{self.folder / artifact_id} must be the weights of trial {trial.number}, and is damaged ({error}): "
                "train it again in another study",
                "study_name",
            ) from error

    def add_mistakes(self, trial: optuna.Trial | FrozenTrial, mistakes: list[tuple[int, int, int]]) -> None:
        """What `training.find_mistakes` found, as a table."""
        lines = ["image,label,prediction", *(",".join(map(str, row)) for row in mistakes)]
        self.add(trial, MISTAKES, ("\n".join(lines) + "\n").encode())

    def mistakes_of(self, trial: FrozenTrial) -> list[tuple[int, int, int]] | None:
        """None if the trial kept none."""
        artifact_id = self.of(trial).get(MISTAKES)
        if artifact_id is None:
            return None
        _, *rows = csv.reader(self.read(artifact_id).decode().splitlines())
        return [tuple(map(int, row)) for row in rows]

    def remove(self, trial: optuna.Trial | FrozenTrial, artifact_id: str) -> None:
        """Delete the entry, then the file; what is gone already is no error."""
        self._write_entry(trial, artifact_id, None)
        with contextlib.suppress(ArtifactNotFound):
            self.store.remove(artifact_id)

    def n_bytes(self) -> int:
        """What the files of this study take on the disk."""
        paths = [self.folder / artifact_id for files in self.all().values() for artifact_id in files.values()]
        return sum(path.stat().st_size for path in paths if path.exists())

    def _write_entry(self, trial: optuna.Trial | FrozenTrial, artifact_id: str, entry: dict | None) -> None:
        key = f"dashboard:artifacts:{trial._trial_id}:{artifact_id}"
        self.study._storage.set_study_system_attr(self.study._study_id, key, json.dumps(entry))
