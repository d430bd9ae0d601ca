"""The best confirmed network under each of several budgets: what accuracy costs in parameters.

Each budget has a search of its own, so that every draw is spent on networks of that size; a study that is there already
with this budget is gone on with. The largest comes first: its best networks, narrowed, are tried under the next. What a
small budget yields also competes under the larger ones.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from nas_mnist.model.architecture import parse
from nas_mnist.stages import confirm, search
from nas_mnist.stages.confirm import Confirmed, ConfirmSettings
from nas_mnist.stages.search import SearchSettings
from nas_mnist.study import studies
from nas_mnist.study.space import Parameters
from nas_mnist.workers.events import OnWorkerEvent, Worker
from nas_mnist.workers.local import run_workers

SIZES = {"params": "parameters", "macs": "multiply-adds", "ram": "bytes of RAM in int8"}  # what a budget can be of
N_HANDED_DOWN = 2  # from each budget to the next


@dataclass(frozen=True)
class FrontierSettings:
    """The search and the confirmation that every budget gets; their study's own budget is reused."""

    search: SearchSettings
    confirm: ConfirmSettings
    budgets: tuple[int, ...]
    over: str = "params"  # one of `SIZES`; the other budgets are those of the search

    def searches(self) -> list[SearchSettings]:
        """One for each budget, the smallest first, in studies named after it."""
        return [self._search(budget) for budget in sorted(set(self.budgets))]

    def _search(self, budget: int) -> SearchSettings:
        name = self.search.study_name
        if self.over != "params":
            limits = replace(self.search.limits, **{f"max_{self.over}": budget})
            return replace(self.search, limits=limits, study_name=f"{name}-{self.over}-{budget}")
        own = _own_budget(self.search)
        return replace(self.search, max_params=budget, study_name=name if budget == own else f"{name}-{budget}")

    def budget_of(self, searched: SearchSettings) -> int:
        return searched.max_params if self.over == "params" else getattr(searched.limits, f"max_{self.over}")


@dataclass(frozen=True)
class Best:
    """The best confirmed network under a budget, and the study it was found in.

    It has fewer than so many parameters, or at most so many multiply-adds or bytes of RAM.
    """

    budget: int
    study_name: str
    confirmed: Confirmed
    over: str = "params"

    @property
    def size(self) -> int:
        """What the budget is of."""
        if self.over == "params":
            return self.confirmed.n_parameters
        architecture = parse(self.confirmed.architecture)
        return architecture.n_macs if self.over == "macs" else architecture.ram

    def is_under(self, budget: int) -> bool:
        return self.size < budget if self.over == "params" else self.size <= budget


def frontier(
    settings: FrontierSettings,
    workers: list[Worker],
    follow: Callable[[SearchSettings | ConfirmSettings], AbstractContextManager[OnWorkerEvent]],
    run: Callable[..., None] = run_workers,
) -> list[Best]:
    """Search and confirm under each budget what is missing, and return the best under each, the smallest first.

    `follow` gives the consumer of events of each search and each confirmation. Raises as `search.search` and
    `confirm.confirm` do; `BudgetError` and `DataError` before anything is written.
    """
    for searched in settings.searches():
        search.check_budget(searched.max_params, searched.limits)
    confirm.check_train_images(settings.confirm)
    found: list[Best] = []
    above: tuple[SearchSettings, list[Confirmed]] | None = None
    for searched in reversed(settings.searches()):
        starts = _handed_down(*above, searched) if above else {}
        with follow(searched) as on_event:
            search.search(searched, workers, on_event, run, starts)
        confirmed = replace(settings.confirm, study_name=searched.study_name)
        with follow(confirmed) as on_event:
            ranking = [c for c in confirm.confirm(confirmed, workers, on_event) if not c.given_up]
        found += [Best(settings.budget_of(searched), searched.study_name, c, settings.over) for c in ranking]
        above = searched, ranking[:N_HANDED_DOWN]
    points = (best_under(settings.budget_of(searched), found) for searched in settings.searches())
    return [point for point in points if point]


def _handed_down(above: SearchSettings, best: list[Confirmed], searched: SearchSettings) -> dict[str, Parameters]:
    """The best of the search above, to be narrowed, and trained as networks of the new size are."""
    recipe = searched.reference_recipe
    changes = {"fill": 1.0, "learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    trials = above.load().get_trials(deepcopy=False)
    return {f"trial {c.trial} of study {above.study_name}": trials[c.trial].params | changes for c in best}


def best_under(budget: int, found: Iterable[Best]) -> Best | None:
    """The best of those that are under it, whichever search found it; None if the training of all diverged."""
    fitting = [best for best in found if best.is_under(budget)]
    best = max(fitting, key=lambda best: best.confirmed.mean, default=None)
    return best and replace(best, budget=budget)


def _own_budget(settings: SearchSettings) -> int:
    """That of the study of this name if it is there, else the one asked for."""
    identity = studies.identity_of(settings.storage, settings.study_name) or {}
    return int(identity.get("max_params", settings.max_params))
