import time

from nas_mnist.errors import StudyError
from nas_mnist.stages.trial import TrialEnded
from nas_mnist.study.storage import Storage
from nas_mnist.views import dashboard
from nas_mnist.views.publisher import SECONDS_BETWEEN, Publisher


def test_search_publishes_while_it_runs_but_not_too_often(monkeypatch, tmp_path):
    published, arguments = [], (Storage.parse(str(tmp_path / "s.db")), "a", tmp_path)
    monkeypatch.setattr(dashboard, "publish", lambda *arguments: published.append(arguments))
    publisher = Publisher(*arguments)
    publisher(None, TrialEnded(1, False, "after epoch 1", 0.9))
    assert not published
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + SECONDS_BETWEEN + 1)
    publisher(None, "another event")
    assert not published
    for _ in range(2):
        publisher(None, TrialEnded(1, False, "after epoch 1", 0.9))
    assert published == [arguments]


def test_note_that_cannot_be_written_does_not_stop_a_search(monkeypatch, tmp_path):
    tried = []

    def publish(*arguments):
        tried.append(arguments)
        raise StudyError("no")

    monkeypatch.setattr(dashboard, "publish", publish)
    publisher = Publisher(Storage.parse(str(tmp_path / "s.db")), "a", tmp_path)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + SECONDS_BETWEEN + 1)
    publisher(None, TrialEnded(1, False, "after epoch 1", 0.9))
    assert len(tried) == 1
