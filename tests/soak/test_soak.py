"""The soak's checks find what they are there for."""

import optuna
import pytest
import soak
from optuna.trial import TrialState, create_trial


def trial(number, state, history=(), epochs=soak.EPOCHS, **changes):
    values = {epoch: 0.5 for epoch in range(1, epochs + 1)}
    made = create_trial(
        state=state,
        value=0.5 if state == TrialState.COMPLETE else None,
        intermediate_values=values,
        system_attrs={"retry_history": list(history)} if history else {},
        **changes,
    )
    made.number = number
    return made


SOUND = [
    trial(0, TrialState.FAIL),
    trial(1, TrialState.COMPLETE),
    trial(2, TrialState.FAIL, [0]),
    trial(3, TrialState.FAIL, [0, 2]),
    trial(4, TrialState.COMPLETE),
]


def test_study_as_promised_has_no_violations():
    assert list(soak.violations(SOUND, 2)) == []


@pytest.mark.parametrize(
    ("trials", "n_trials", "complaint"),
    [
        (SOUND, 3, "2 trials are trained, not 3"),
        ([*SOUND, trial(5, TrialState.COMPLETE)], 2, "3 trials are trained, not 2"),
        ([*SOUND, trial(5, TrialState.RUNNING)], 2, "1 trials are left running"),
        ([*SOUND, trial(5, TrialState.FAIL)], 2, "trial 5 was interrupted and never queued again"),
        ([*SOUND, trial(5, TrialState.FAIL, [0, 2, 3])], 2, "trial 5 is the 3th repetition"),
        ([*SOUND, trial(5, TrialState.COMPLETE, [0])], 3, "were queued again twice"),
        ([*SOUND[:4], trial(4, TrialState.COMPLETE, epochs=1)], 2, "complete with 1 of 2 epochs"),
    ],
)
def test_each_violation_is_found(trials, n_trials, complaint):
    assert any(complaint in found for found in soak.violations(trials, n_trials))


def test_finished_trial_that_is_gone_or_changed_is_lost():
    before = soak.finished(SOUND)
    assert soak.lost(before, SOUND) == []
    assert soak.lost(before, SOUND[:4]) == [4]
    assert soak.lost(before, [*SOUND[:4], trial(4, TrialState.COMPLETE, user_attrs={"x": 1})]) == [4]


def test_damaged_database_is_found(tmp_path):
    path = tmp_path / "s.db"
    found = optuna.create_study(storage=f"sqlite:///{path}")
    for _ in range(20):
        found.enqueue_trial({"x": 1})
    found._storage._backend.engine.dispose()
    assert soak.damage(path) is None
    content = bytearray(path.read_bytes())
    content[-3 * 4096 :] = bytes(3 * 4096)
    path.write_bytes(content)
    assert soak.damage(path)
