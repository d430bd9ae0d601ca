import math
from dataclasses import asdict

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from nas_mnist.study.pruner import BEGINNING, RUNGS, SHORT_EPOCHS, SHORT_RUN, RungPruner, best_first, signal
from nas_mnist.study.records import how_far, n_epochs, write_epochs, write_short_run
from nas_mnist.training.loop import EpochResult

SECOND = max(RUNGS)


DENSE = {"blocks": 2, "convs_1": 2, "convs_2": 2, "separable_1": False, "separable_2": False}
SEPARABLE = DENSE | {"separable_1": True, "separable_2": True}
RANGES = {name: CategoricalDistribution([value, SEPARABLE[name]]) for name, value in DENSE.items()}


def run(losses, **settings):
    """Trials that stand at these losses wherever they are looked at, and the last epoch of each: of short runs ≤ 0."""
    study = optuna.create_study(direction="maximize", pruner=RungPruner(**settings))
    return study, [_run(study, loss) for loss in losses]


def _run(study, loss, later=None, network=DENSE):
    study.enqueue_trial(network)
    trial, short_run, epochs = study.ask(RANGES), [], []
    for epoch, factor in (1, 2.0), (SHORT_EPOCHS, 1.0):
        short_run.append(EpochResult(epoch, 0.1, 0.97, factor * loss, 0.98, 0.1, 1.0, 0.1))
        write_short_run(trial, short_run)
        if epoch == SHORT_EPOCHS:
            trial.report(0.98, SHORT_RUN)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return epoch - SHORT_EPOCHS
    for epoch in range(1, 16):
        averaged = (later or loss * (1 - 0.02 * epoch)) if epoch in RUNGS else None
        eval_loss = loss * (1 - 0.02 * epoch)
        epochs.append(EpochResult(epoch, 0.1, 0.97, eval_loss, 0.98, 0.1, 1.0, 0.1, averaged_loss=averaged))
        write_epochs(trial, epochs)
        trial.report(0.98, epoch)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return epoch
    study.tell(trial, 0.99 - (loss if math.isfinite(loss) else 0.5) / 10)
    return 15


def test_first_trial_is_trained_to_the_end_and_a_worse_one_stops_after_its_short_run():
    assert run([0.1, 0.2, 0.05])[1] == [15, 0, 15]


def test_of_candidates_in_random_order_the_share_of_each_rung_goes_on():
    shuffled = [0.05 + 0.001 * (37 * i % 100) for i in range(100)]
    given = run(shuffled)[1]
    came = [sum(last > rung for last in given) for rung in (BEGINNING, SHORT_RUN, SECOND)]
    assert 0.6 < came[0] / 100 < 0.75 and 0.1 < came[1] / came[0] < 0.2 and 0.25 < came[2] / came[1] < 0.75
    assert sum(SHORT_EPOCHS + last for last in given) / 100 <= 5


def test_a_bad_network_ends_after_an_epoch():
    study, given = run([0.1, 0.11, 0.12, 0.3])
    assert given[-1] == BEGINNING and n_epochs(study.trials[-1]) == 1
    assert how_far(study.trials[-1]) == "in its short run"
    assert signal(study.trials[-1], BEGINNING) == pytest.approx(-0.6) and signal(study.trials[-1], SHORT_RUN) is None
    assert [trial.number for trial in best_first(study.trials)] == [0, 1, 2, 3]


def test_trials_are_compared_with_those_of_late():
    """Every trial is better than all before it, as in a search that gets somewhere: only the last decide."""
    better_and_better = [0.5 - 0.002 * i for i in range(60)]
    worse_than_of_late = 0.5 - 0.002 * 55
    assert run([*better_and_better, worse_than_of_late], n_recent=10)[1][-1] == 0
    assert run([*better_and_better, worse_than_of_late], n_recent=60)[1][-1] > 0


def test_nothing_is_decided_between_rungs_or_without_a_signal():
    study, given = run([0.1, math.nan])
    assert given == [15, 15]
    first, second = study.trials
    assert signal(first, 1) is None and signal(first, SECOND) == pytest.approx(-0.1 * (1 - 0.02 * SECOND))
    assert signal(first, SHORT_RUN) == pytest.approx(-0.1)
    assert signal(second, SHORT_RUN) is None and signal(second, SECOND) is None


def test_a_good_short_run_stands_where_averaged_weights_are_useless():
    """As `c5 c5k1 M d10 d8 d11 d11 G c10k1-` was stopped for, the best of a search below 1,000 parameters."""
    study = optuna.create_study(pruner=RungPruner())
    given = [
        _run(study, short, averaged) for short, averaged in [(0.1, 0.08), (0.09, 0.079), (0.07, 0.3), (0.06, 0.05)]
    ]
    assert given == [15, 15, 15, 15]
    assert [trial.number for trial in best_first(study.trials)] == [3, 2, 1, 0]


def test_separable_layers_learn_later_and_are_not_stopped_for_it():
    """As `c18 M d19 d25 d27 d30 G c10k1-` was, below 4,000 parameters: 22.6 thousandths, where dense ones had 20.3."""
    for network in DENSE, SEPARABLE:
        study, _ = run([0.021, 0.0203])
        assert (_run(study, 0.0226, network=network) > SHORT_RUN) == (network == SEPARABLE)


def test_trials_are_ranked_however_far_each_came():
    """The second was stopped after its short run; the third, better there, must not be behind the first for that."""
    study, given = run([0.10, 0.30, 0.09, 0.11, 0.05])
    assert given[:2] == [15, 0] and given[2] == 15
    assert [trial.number for trial in best_first(study.trials)] == [4, 2, 0, 3, 1]


def test_a_poor_first_trial_is_not_the_best_because_it_was_trained_to_its_end():
    study, given = run([0.5, 0.4, 0.3, 0.2, 0.21, 0.22, 0.23])
    assert given[0] == 15 and min(given[4:]) < 15
    assert best_first(study.trials)[-1].number == 0


def test_a_trial_of_which_nothing_is_known_is_not_ranked():
    study = optuna.create_study()
    study.ask()
    assert best_first(study.trials) == []


def test_what_failed_or_diverged_is_not_among_the_best():
    """The first is queued again and would be there twice; the second only looked good before its loss was no number."""
    study, _ = run([0.3, 0.2, 0.1])
    for state, reason in (TrialState.FAIL, {}), (TrialState.PRUNED, {"reason": "the training loss was nan"}):
        good = [asdict(EpochResult(1, 0.1, 0.97, 0.001, 0.98, 0.1, 1.0, 0.1))]
        study.add_trial(
            create_trial(state=state, params=DENSE, distributions=RANGES, user_attrs={"short_run": good} | reason)
        )
    assert [trial.number for trial in best_first(study.trials)] == [2, 1, 0]
