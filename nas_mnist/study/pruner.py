"""When a trial is stopped: at a rung, unless its averaged weights are among the best that came there of late.

A network's accuracy in the middle of a one-cycle schedule is mostly noise. The loss of its averaged weights ranks
candidates; `studies/README.md` has the figures.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from optuna import Study
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.study.records import epochs_of
from nas_mnist.training.loop import EpochResult

RUNGS = {2: 1 / 2, 5: 1 / 4}  # epoch: the share of those that come there which goes on
N_RECENT = 24  # trials that a trial is compared with: later ones are better, and earlier ones would be beaten by all


class RungPruner(BasePruner):
    """Successive halving that waits for nobody: a trial is compared with those that came to the rung before it.

    After L. Li et al., A System for Massively Parallel Hyperparameter Tuning (ASHA), 2020, arXiv 1810.05934.
    """

    def __init__(self, rungs: Mapping[int, float] = RUNGS, n_recent: int = N_RECENT):
        self._rungs, self._n_recent = dict(rungs), n_recent

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        epoch = trial.last_step
        own = signal(epochs_of(trial), epoch)
        if epoch not in self._rungs or own is None:
            return False
        states = (TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE)
        others = [t for t in study.get_trials(deepcopy=False, states=states) if t.number != trial.number]
        recent = [s for t in others if (s := signal(epochs_of(t), epoch)) is not None][-self._n_recent :]
        return sum(s > own for s in recent) >= math.ceil(self._rungs[epoch] * (len(recent) + 1))


def signal(epochs: Sequence[EpochResult], epoch: int | None) -> float | None:
    """How good the averaged weights were after this epoch, the larger the better: less their loss, in nats."""
    if epoch is None or not 1 <= epoch <= len(epochs):
        return None
    loss = epochs[epoch - 1].averaged_loss
    return None if loss is None or not math.isfinite(loss) else -loss


def best_first(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of which a rung or the end is known, best first, however far each came.

    What was seen late is taken down by what trials gain on average until then, in the logarithm of the loss: most are
    stopped early, and one that was trained to its end need not be better than one that was not.
    """
    known = {trial.number: seen for trial in trials if (seen := _seen(trial))}
    gains = {(a, b): _gain(known, a, b) for a, b in pairwise((*RUNGS, math.inf))}
    worth = {n: seen[max(seen)] - sum(g for (_, b), g in gains.items() if b <= max(seen)) for n, seen in known.items()}
    return sorted((trial for trial in trials if trial.number in worth), key=lambda trial: -worth[trial.number])


def _seen(trial: FrozenTrial) -> dict[float, float]:
    """Less the logarithm of the loss at every rung that the trial came to, and at the end (infinity)."""
    epochs = epochs_of(trial)
    seen: dict[float, float] = {epoch: -math.log(-s) for epoch in RUNGS if (s := signal(epochs, epoch))}
    if trial.state == TrialState.COMPLETE and epochs:
        seen[math.inf] = -math.log(max(epochs[-1].eval_loss, 1e-9))
    return seen


def _gain(known: Mapping[int, Mapping[float, float]], early: float, late: float) -> float:
    gains = [seen[late] - seen[early] for seen in known.values() if early in seen and late in seen]
    return sum(gains) / len(gains) if gains else 0.0
