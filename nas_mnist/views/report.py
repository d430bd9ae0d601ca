"""A study as one HTML page that needs no network: summary, figures, best candidates with drawings.

The page carries plotly's script (4.8 MB) and forbids itself everything else: its content security policy names the two
scripts that may run and no address to fetch from. Text from the database is escaped wherever it goes.
"""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import optuna
import plotly.graph_objects as go
from markupsafe import Markup
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from plotly.offline import get_plotlyjs

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.data.folds import n_search_images
from nas_mnist.errors import ArchitectureError, NasMnistError, StudyError
from nas_mnist.files import whole_file
from nas_mnist.model import diagram
from nas_mnist.model.architecture import parse
from nas_mnist.model.zoo import ZOO
from nas_mnist.stages import ablate, confirm, retrain, search
from nas_mnist.stages.ablate import Ablated
from nas_mnist.stages.confirm import Confirmed
from nas_mnist.stages.retrain import Retrained
from nas_mnist.study import studies
from nas_mnist.study.records import TrialCounts, TrialRecord, ancestors, how_far, is_trained, leaderboard, n_epochs
from nas_mnist.study.storage import Storage
from nas_mnist.views import study_figures, tables
from nas_mnist.views.ablation import cells
from nas_mnist.views.progress import duration

PAGE = "index.html"
GENERATOR = b'content="nas-mnist report"'  # by it a page is known that may be replaced
N_BEST = 10


@dataclass(frozen=True)
class Candidate:
    """One of the best, as the page shows it."""

    rank: int
    trial: FrozenTrial
    record: TrialRecord
    drawing: Markup | None  # None if the line in the database is none
    recipe: dict[str, str]


def write(storage: Storage, study_name: str, out: Path) -> Path:
    """Write the page of a study, running or finished, into the folder `out` and return its path.

    Raises `StudyError` if the study is no search, `NasMnistError` if the folder cannot be written or has another page.
    """
    if (out / PAGE).exists() and GENERATOR not in (out / PAGE).read_bytes()[:4096]:
        raise NasMnistError(f"{out / PAGE} is no report and must not be lost: name another folder", "out")
    opened = storage.open()
    study = studies.load(opened, study_name)
    ranking, retrained = confirm.ranking(opened, study_name), retrain.results(opened, study_name)
    html = page(study, ranking, retrained, _ablation(opened, study, retrained))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(out / PAGE) as temporary:
            temporary.write_text(html, encoding="utf-8")
    except OSError as error:
        raise NasMnistError(
            f"{out} must be a folder that can be written ({error.strerror}): give another one", "out"
        ) from error
    return out / PAGE


def page(
    study: optuna.Study,
    ranking: Sequence[Confirmed] = (),
    retrained: Sequence[Retrained] = (),
    ablation: Sequence[Ablated] = (),
) -> str:
    """The page as HTML. Raises `StudyError` if the study is no search."""
    identity = studies.recorded_identity(study)
    if not {"max_params", "epochs", "space"} <= identity.keys():
        raise StudyError(
            f"study {study.study_name!r} is not a search, so there is nothing to report: name a search", "study_name"
        )
    dataset = studies.recorded_dataset(identity)
    trials = study.get_trials(deepcopy=False)
    drawn, missing = _draw(_figures(study, trials, identity, dataset, ranking, retrained, ablation))
    scripts = {"plotly": get_plotlyjs(), "page": _resource("report.js")}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "error": _standard_error,
        "percent": _percent,
        "ablation_cells": partial(cells, published=False),
        "spread": tables.plus_minus,
        "duration": duration,
    }
    return environment.from_string(_resource("report.html")).render(
        name=study.study_name,
        now=datetime.now(),
        identity=identity,
        dataset=dataset,
        n_val_images=dataset.n_train_images - n_search_images(dataset),
        finished=search.is_finished(study),
        summary=_summary(study, identity["epochs"], ranking, retrained),
        settings=_settings(study, trials, identity),
        candidates=_candidates(trials),
        family=_family(trials),
        front=_front(trials),
        references=[
            (letter, ZOO[name]) for name, letter in study_figures.reference_letters().items() if dataset == MNIST
        ],
        ranking=ranking,
        lead=_lead(ranking),
        retrained=retrained,
        ablation=ablation,
        verdicts=[tables.verdict_lines(r).plain.splitlines() for r in retrained],
        failures=_failures(trials),
        missing=missing,
        heights={name: figure.layout.height for name, figure in drawn.items()},
        figures=Markup(_json(drawn)),
        scripts={name: Markup(script) for name, script in scripts.items()},
        script_hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts.values()),
    )


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(
    study: optuna.Study,
    trials: Sequence[FrozenTrial],
    identity: dict[str, Any],
    dataset: Dataset,
    ranking: Sequence[Confirmed],
    retrained: Sequence[Retrained],
    ablation: Sequence[Ablated],
) -> dict[str, Callable[[], go.Figure]]:
    max_params, epochs = identity["max_params"], identity["epochs"]
    return {
        "accuracy": partial(study_figures.accuracy_against_parameters, trials, max_params, ranking, retrained, dataset),
        "ablation": partial(study_figures.ablation, ablation),
        "history": partial(study_figures.optimisation_history, trials),
        "curves": partial(study_figures.learning_curves, trials),
        "epochs": partial(study_figures.epochs_spent, trials, epochs),
        "importance": partial(study_figures.parameter_importance, study),
        "budget": partial(study_figures.parameters_drawn, trials, max_params),
        "timeline": partial(study_figures.timeline, trials),
    }


def _draw(functions: dict[str, Callable[[], go.Figure]]) -> tuple[dict[str, go.Figure], dict[str, str]]:
    """The figures that can be drawn, and of the others the reason why not."""
    drawn, missing = {}, {}
    for name, function in functions.items():
        try:
            drawn[name] = function()
        except study_figures.NothingToDraw as reason:
            missing[name] = str(reason)
    return drawn, missing


def _json(drawn: dict[str, go.Figure]) -> str:
    """One object of all figures, which no text in it can break out of."""
    text = ",".join(f'"{name}":{figure.to_json()}' for name, figure in drawn.items())
    return "{" + text.replace("<", "\\u003c") + "}"


# --- tables ----------------------------------------------------------------------------------------------------------


def _summary(
    study: optuna.Study, max_epochs: int, ranking: Sequence[Confirmed], retrained: Sequence[Retrained]
) -> dict[str, str]:
    """What the study has come to, as names and values."""
    trials = study.get_trials(deepcopy=False)
    now = TrialCounts.of(trials)
    trained = [trial for trial in trials if is_trained(trial)]
    diverged = sum(study_figures.outcome(trial) == "diverged" for trial in trials)
    n_drawn = sum(TrialRecord.from_trial(trial).n_parameters is not None for trial in trials)
    under_way = (now.running or now.waiting) and f"{now.running:,} running, {now.waiting:,} waiting"
    values = {
        "best": _best(trials),
        "confirmed": ranking and _confirmed(ranking[0]),
        "retrained": retrained and _retrained(retrained[0]),
        "trained": f"{now.trained:,} trials: {now.trained - now.pruned:,} to the end, {now.pruned:,} stopped early"
        + (f", {diverged:,} of these because they diverged" if diverged else ""),
        "over budget": f"{now.over_budget:,} of {n_drawn:,} drawn"
        + (f" ({now.over_budget / n_drawn:.1%}); recorded, never trained" if now.over_budget else ""),
        "failed": f"{now.failed:,}",
        "under way": not search.is_finished(study) and under_way,
        "epochs": _epochs(trained, max_epochs),
        "time": _time(trials),
    }
    return {name: value for name, value in values.items() if value}


def _ablation(opened: RDBStorage, study: optuna.Study, retrained: Sequence[Retrained]) -> Sequence[Ablated]:
    """What was ablated of this study: of a network that was retrained, or else of one of the best candidates."""
    best = leaderboard(study.get_trials(deepcopy=False))
    candidates = [r.candidate for r in retrained] + [TrialRecord.from_trial(trial).candidate for trial in best[:N_BEST]]
    return ablate.results_of(opened, study.study_name, candidates)


def _epochs(trained: Sequence[FrozenTrial], max_epochs: int) -> str:
    spent, full = sum(n_epochs(trial) for trial in trained), len(trained) * max_epochs
    saved = max(0, full - spent)
    return f"{spent:,} trained, {saved:,} saved by pruning" + (f" ({saved / full:.0%})" if full else "")


def _confirmed(confirmed: Confirmed) -> str:
    mean = study_figures.mean_text(confirmed.mean, confirmed.standard_deviation, len(confirmed.accuracies))
    return f"{mean} of fresh folds (trial {confirmed.trial})"


def _retrained(retrained: Retrained) -> str:
    mean = study_figures.mean_text(retrained.mean, retrained.standard_deviation, len(retrained.runs))
    return f"{mean} of the test set ({study_figures.name_of(retrained)})"


def _best(trials: Sequence[FrozenTrial]) -> str:
    best = next(iter(leaderboard(trials)), None)
    if best is None:
        return "no trial has been trained to its end yet"
    return (
        f"{best.value:.2%} of the validation images with {TrialRecord.from_trial(best).n_parameters:,} parameters "
        f"(trial {best.number})"
    )


def _time(trials: Sequence[FrozenTrial]) -> str:
    """From the first start to the last end, and what all workers trained together."""
    begun = [trial.datetime_start for trial in trials if trial.datetime_start]
    if not begun:
        return "not begun"
    ended = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    trained = sum(TrialRecord.from_trial(trial).seconds for trial in trials)
    end = f" to {max(ended):%Y-%m-%d %H:%M}" if ended else ""
    return f"{min(begun):%Y-%m-%d %H:%M}{end}; {duration(trained)} of training, all workers together"


def _settings(study: optuna.Study, trials: Sequence[FrozenTrial], identity: dict[str, Any]) -> dict[str, str]:
    names = {"max_params": "budget", "max_macs": "multiply-adds at most", "max_ram": "bytes of RAM at most"}
    names |= {"train_images": "training images", "space": "space (fingerprint)"}
    values = {
        names.get(name, name): f"{value:,}" if isinstance(value, int) else str(value)
        for name, value in identity.items()
        if value is not None
    }
    values["budget"] = f"fewer than {identity['max_params']:,} parameters"
    values["objective"] = f"{', '.join(study.metric_names or ['value'])}, mean of the last two epochs"
    records = [TrialRecord.from_trial(trial) for trial in trials]
    return values | {"hardware": _counted(r.device for r in records), "versions": _counted(r.versions for r in records)}


def _counted(values: Iterable[str | None]) -> str:
    """The values there are, and of how many trials if there are several."""
    counts = Counter(str(value) for value in values if value is not None)
    if len(counts) < 2:
        return next(iter(counts), "none yet")
    return "; ".join(f"{value} ({n:,} trials)" for value, n in counts.most_common())


def _candidates(trials: Sequence[FrozenTrial]) -> list[Candidate]:
    return [
        Candidate(rank, trial, record, _drawing(record.architecture), tables.recipe_values(record.recipe))
        for rank, (trial, record) in enumerate(_recorded(leaderboard(trials)[:N_BEST]), 1)
    ]


def _recorded(trials: Iterable[FrozenTrial]) -> list[tuple[FrozenTrial, TrialRecord]]:
    return [(trial, TrialRecord.from_trial(trial)) for trial in trials]


def _front(trials: Sequence[FrozenTrial]) -> list[tuple[FrozenTrial, TrialRecord]]:
    return _recorded(study_figures.pareto_front(leaderboard(trials)))


def _family(trials: Sequence[FrozenTrial]) -> list[tuple[str, TrialRecord]]:
    """What the best trial and its ancestors have reached, the first of them first."""
    best = next(iter(leaderboard(trials)), None)
    line = ancestors(best, trials) if best else []
    return [(_reached(trial), record) for trial, record in _recorded(line) if record.origin]


def _reached(trial: FrozenTrial) -> str:
    if trial.state == optuna.trial.TrialState.COMPLETE:
        return f"{trial.value:.2%}"
    return f"stopped {how_far(trial)}"


def _drawing(line: str) -> Markup | None:
    try:
        return Markup(diagram.svg(parse(line)))
    except ArchitectureError:
        return None


def _lead(ranking: Sequence[Confirmed]) -> str:
    if not ranking:
        return ""
    p_value = confirm.lead(*ranking[:2]) if len(ranking) > 1 else None
    return tables.lead_line(list(ranking), p_value, confirm.SIGNIFICANT_P).plain


def _failures(trials: Sequence[FrozenTrial]) -> list[tuple[int, str, str]]:
    """Number, what became of it, and why, of trials that failed or diverged."""
    ended_badly = [trial for trial in trials if study_figures.outcome(trial) in ("failed", "diverged")]
    return [(t.number, study_figures.outcome(t), _why(t)) for t in ended_badly]


def _why(trial: FrozenTrial) -> str:
    return TrialRecord.from_trial(trial).reason or "its process was stopped or died; it was queued again, at most twice"


def _percent(fraction: float, digits: int = 2) -> str:
    return f"{fraction:.{digits}%}"


def _standard_error(accuracy: float, n_images: int) -> str:
    """Of an accuracy that n images were asked for, in points."""
    return f"{100 * math.sqrt(accuracy * (1 - accuracy) / n_images):.2g}"
