import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore

from nas_mnist.errors import StudyError
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.study.artifacts import WEIGHTS, Artifacts


@pytest.fixture
def artifacts(tmp_path):
    return Artifacts(optuna.create_study(), tmp_path / "artifacts")


@pytest.fixture
def trial(artifacts):
    """One that has finished, as those have whose files come and go."""
    trial = artifacts.study.ask()
    artifacts.study.tell(trial, 1.0)
    return artifacts.study.trials[0]


def test_files_of_a_finished_trial_come_and_go(artifacts, trial):
    first, second = artifacts.add(trial, "a.png", b"12345"), artifacts.add(trial, "b.svg", b"678")
    assert artifacts.of(trial) == {"a.png": first, "b.svg": second} and artifacts.n_bytes() == 8
    assert artifacts.read(first) == b"12345"
    artifacts.remove(trial, first)
    assert artifacts.of(trial) == {"b.svg": second} and artifacts.n_bytes() == 3
    artifacts.remove(trial, first)  # gone already
    assert [path.name for path in artifacts.folder.iterdir()] == [second]


def test_entry_without_its_file_never_exists(artifacts, trial, monkeypatch):
    def write(store, artifact_id, content):
        (store._base_path / artifact_id).write_bytes(b"hal")
        raise OSError("No space left on device")

    monkeypatch.setattr(FileSystemArtifactStore, "write", write)
    with pytest.raises(OSError, match="No space left"):
        artifacts.add(trial, "a.png", b"half")
    assert artifacts.of(trial) == {} and list(artifacts.folder.iterdir()) == []


def test_weights_come_back_as_they_were(artifacts, trial):
    assert artifacts.weights_of(trial) is None
    network = build(parse("c4 M G c10k1-"), seed=1)
    artifacts.add_weights(trial, network)
    weights = artifacts.weights_of(trial)
    assert weights.keys() == network.state_dict().keys()
    assert all((weights[name] == tensor).all() for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("content", "message"), [(None, "one is missing: copy that folder"), (b"junk", "is damaged")])
def test_weights_that_are_missing_or_damaged_are_one_clear_line(artifacts, trial, content, message):
    artifacts.add_weights(trial, build(parse("c4 M G c10k1-"), seed=1))
    path = artifacts.folder / artifacts.of(trial)[WEIGHTS]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(StudyError, match=message):
        artifacts.weights_of(trial)
