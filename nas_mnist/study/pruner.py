"""When a trial is stopped: at a rung, unless it is among the best that came there of late.

A network's accuracy in the middle of a one-cycle schedule is mostly noise, enough to tell the worst third and no more.
What ranks candidates is the loss after a complete schedule, be it short, and later that of averaged weights beside it.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.study.records import epochs_of, short_run_of
from nas_mnist.study.space import separable_share

SHORT_EPOCHS = 3  # of the short run, a training of its own before that of all epochs
SHORT_RUN = 0  # the rung at its end; those in it are negative: so many epochs before that
BEGINNING = 1 - SHORT_EPOCHS  # after its first epoch
RUNGS = {BEGINNING: 2 / 3, SHORT_RUN: 1 / 8, 5: 1 / 4}  # epoch: the share of those that come there which goes on
AVERAGED_EPOCHS = tuple(rung for rung in RUNGS if rung > SHORT_RUN)
COMPARED = (TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE)  # one that failed is queued again
LATE_GAINS = {BEGINNING: 0.3, SHORT_RUN: 0.14, 5: 0.09}  # what separable layers gain more until the end, in log loss
N_RECENT = 24  # trials that are compared, itself among them: later ones are better, and would all beat earlier ones


class RungPruner(BasePruner):
    """Successive halving that waits for nobody: a trial is compared with those that came to the rung before it.

    After L. Li et al., A System for Massively Parallel Hyperparameter Tuning (ASHA), 2020, arXiv 1810.05934.
    """

    def __init__(self, rungs: Mapping[int, float] = RUNGS, n_recent: int = N_RECENT):
        self._rungs, self._n_recent = dict(rungs), n_recent

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        rung = _last_epoch(trial)
        own = signal(trial, rung)
        if rung not in self._rungs or own is None:
            return False
        others = [t for t in study.get_trials(deepcopy=False, states=COMPARED) if t.number != trial.number]
        recent = [s for t in others if (s := signal(t, rung)) is not None][1 - self._n_recent :]
        return sum(s > own for s in recent) >= math.ceil(self._rungs[rung] * (len(recent) + 1))


def signal(trial: FrozenTrial, rung: int | None) -> float | None:
    """How good a trial was at a rung, the larger the better: less its loss, in nats; None if it did not come there.

    Networks of separable layers learn later than dense ones: of two with the same loss at a rung they have less at the
    end, so what they gain more on average is taken off beforehand. Otherwise they are stopped where they would win.

    After the short run it is the smaller of two losses, the short run's and that of averaged weights. They rank about
    as well, but means over separable networks, whose weights move far, are now and then useless, and such a network
    is stopped for that. `studies/ranking/README.md` has the figures.
    """
    if rung not in LATE_GAINS:
        return None
    losses = [_short_loss(trial, SHORT_EPOCHS + min(rung, SHORT_RUN))]
    if rung > SHORT_RUN:
        epochs = epochs_of(trial)
        if rung > len(epochs) or epochs[rung - 1].averaged_loss is None:
            return None
        losses.append(epochs[rung - 1].averaged_loss)
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return -min(known) * math.exp(-LATE_GAINS[rung] * separable_share(trial.params)) if known else None


def _last_epoch(trial: FrozenTrial) -> int | None:
    """How far it came, in the numbers of the rungs. Optuna has no negative steps: of a short run, one is its end."""
    short_run = short_run_of(trial)
    return trial.last_step if trial.last_step is not None or not short_run else short_run[-1].number - SHORT_EPOCHS


def _short_loss(trial: FrozenTrial, epoch: int) -> float | None:
    return next((judged.eval_loss for judged in short_run_of(trial) if judged.number == epoch), None)


def best_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of which a rung or the end is known, best first, however far each came.

    What was seen late is taken down by what trials gain on average until then, in the logarithm of the loss: most are
    stopped early, and one that was trained to its end need not be better than one that was not.
    """
    known = {trial.number: seen for trial in trials if trial.state in COMPARED and (seen := _seen(trial))}
    gains = {(a, b): _gain(known, a, b) for a, b in pairwise((*RUNGS, math.inf))}
    worth = {n: seen[max(seen)] - sum(g for (_, b), g in gains.items() if b <= max(seen)) for n, seen in known.items()}
    return sorted((trial for trial in trials if trial.number in worth), key=lambda trial: -worth[trial.number])


def _seen(trial: FrozenTrial) -> dict[float, float]:
    """Less the logarithm of the loss at every rung that the trial came to, and at the end (infinity).

    Nothing of one that diverged after that: it was not as good as it looked.
    """
    if "reason" in trial.user_attrs:
        return {}
    epochs = epochs_of(trial)
    seen: dict[float, float] = {rung: -math.log(-s) for rung in RUNGS if (s := signal(trial, rung))}
    if trial.state == TrialState.COMPLETE and epochs:
        seen[math.inf] = -math.log(max(epochs[-1].eval_loss, 1e-9))
    return seen


def _gain(known: Mapping[int, Mapping[float, float]], early: float, late: float) -> float:
    gains = [seen[late] - seen[early] for seen in known.values() if early in seen and late in seen]
    return sum(gains) / len(gains) if gains else 0.0
