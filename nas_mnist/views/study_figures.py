"""Interactive figures of a study, drawn by plotly for its report and for optuna-dashboard.

Each function takes trials and returns a figure on a light background that suits any page; the report recolours it for
readers who prefer the dark. Accuracies stand on an axis of the error, logarithmic and upside down, so that both the
first epochs and the last hundredths of a per cent can be read. Colours are those of Okabe and Ito, told apart with any
colour vision, and none is the only sign of what it means.
"""

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import accumulate

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.model.zoo import ZOO
from nas_mnist.stages.ablate import Ablated
from nas_mnist.stages.confirm import Confirmed
from nas_mnist.stages.retrain import Retrained
from nas_mnist.study.records import (
    TrialRecord,
    how_far,
    is_over_budget,
    is_trained,
    leaderboard,
    n_epochs,
    short_run_of,
)
from nas_mnist.views.tables import plus_minus

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "#8a8f98"
SMALLEST_ERROR = 0.01  # %: none at all has no place on a logarithmic axis
N_BEST = 10
TRIALS_FOR_IMPORTANCE = 20  # Optuna compares the best tenth with all: with fewer that is a single trial
N_IMPORTANT = 15
OUTCOMES = {
    "finished": BLUE,
    "pruned": GREY,
    "diverged": PURPLE,
    "over budget": ORANGE,
    "failed": VERMILLION,
    "running": SKY,
}
_AXIS = {"gridcolor": "#e3e6eb", "linecolor": "#9aa1ac", "zeroline": False, "title_standoff": 8}
_CLOCK = [{"dtickrange": [None, 86_399_999], "value": "%H:%M"}, {"dtickrange": [86_400_000, None], "value": "%-d %b"}]
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1b1f27"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        # Room for labels across the axis alone: with room along it too, plotly may not come to rest.
        "xaxis": {**_AXIS, "automargin": "height"},
        "yaxis": {**_AXIS, "automargin": "width"},
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "xref": "paper"},
        "margin": {"l": 10, "r": 14, "t": 14, "b": 10},
        "hoverlabel": {"align": "left", "font": {"size": 12}},
        "hovermode": "closest",
        "bargap": 0.25,
    }
)


class NothingToDraw(Exception):
    """There is too little for this figure yet; the message is a sentence that says why."""


# --- what a study found ----------------------------------------------------------------------------------------------


def accuracy_against_parameters(
    trials: Sequence[FrozenTrial],
    max_params: int,
    confirmed: Sequence[Confirmed] = (),
    retrained: Sequence[Retrained] = (),
    dataset: Dataset = MNIST,
) -> go.Figure:
    """Finished trials with their Pareto front, and the reference systems, lettered as `reference_letters` has them.

    Trials and confirmations are accuracies of validation images; those of the reference systems, of which there are
    none on another dataset than MNIST, and of retrained candidates are of the test set.
    """
    best = leaderboard(trials)
    if not best:
        raise NothingToDraw("No trial has been trained to its end yet, so there is no accuracy to set against a size.")
    figure = _figure("parameters", "accuracy in %", 480)
    front = pareto_front(best)
    sizes, errors = _sizes(best), [_error(t.value) for t in best]
    _points(figure, "trials (validation)", sizes, errors, [_hover(t) for t in best], BLUE, "circle", opacity=0.65)
    x, y = [*_sizes(front), max(sizes)], [*(_error(t.value) for t in front), _error(front[-1].value)]
    line = {"color": BLUE, "shape": "hv", "width": 2}
    figure.add_scatter(x=x, y=y, mode="lines", name="Pareto front of the trials", line=line, hoverinfo="skip")
    errors += _add_retrained(figure, retrained) + _add_confirmed(figure, confirmed)
    if dataset == MNIST:
        errors += _add_references(figure)
    figure.add_vline(max_params, line={"color": GREY, "dash": "dash", "width": 1})
    figure.update_xaxes(tickformat=",", range=[0, 1.04 * max(max_params, *sizes)])
    return _show_errors_as_accuracy(figure, errors)


def pareto_front(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The finished trials than which none is both smaller and at least as accurate, the smallest first."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda t: (_n_parameters(t), -t.value)):
        if not front or trial.value > front[-1].value:
            front.append(trial)
    return front


def reference_letters() -> dict[str, str]:
    """The letter that stands for each reference system in a figure, by name."""
    return {name: chr(ord("A") + i) for i, name in enumerate(ZOO)}


def _add_references(figure: go.Figure) -> list[float]:
    letters = reference_letters()
    errors = [_error(system.published_accuracy) for system in ZOO.values()]
    hover = [
        f"{letters[name]}: {name}, {system.n_parameters:,} parameters<br>"
        f"{system.published_accuracy:.2%} of the test set, published, one run"
        f"{'' if system.last_accuracy else ', best epoch'}"
        for name, system in ZOO.items()
    ]
    figure.add_scatter(
        x=[system.n_parameters for system in ZOO.values()],
        y=errors,
        name=f"published systems A–{max(letters.values())} (test set, one run)",
        mode="markers+text",
        text=list(letters.values()),
        textfont={"size": 11, "color": "#000000"},
        marker={"symbol": "circle", "size": 17, "color": "#f6d9a0", "line": {"color": ORANGE, "width": 1.5}},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    return errors


def _add_confirmed(figure: go.Figure, confirmed: Sequence[Confirmed]) -> list[float]:
    errors = [_error(c.mean) for c in confirmed]
    hover = [
        f"trial {c.trial}, confirmed: {mean_text(c.mean, c.standard_deviation, len(c.accuracies))}" for c in confirmed
    ]
    if confirmed:
        name = "confirmed (mean on fresh folds)"
        _points(figure, name, [c.n_parameters for c in confirmed], errors, hover, GREEN, "diamond", size=11)
    return errors


def _add_retrained(figure: go.Figure, retrained: Sequence[Retrained]) -> list[float]:
    errors = [_error(r.mean) for r in retrained]
    hover = [
        f"{name_of(r)}, retrained: {mean_text(r.mean, r.standard_deviation, len(r.runs))} of the test set"
        for r in retrained
    ]
    if retrained:
        name = "retrained (test set, mean over seeds)"
        sizes = [r.candidate.architecture.n_parameters for r in retrained]
        _points(figure, name, sizes, errors, hover, VERMILLION, "star", size=26)
    return errors


def name_of(retrained: Retrained) -> str:
    return "a named architecture" if retrained.trial is None else f"trial {retrained.trial}"


def mean_text(mean: float, deviation: float | None, n: int) -> str:
    """99.40% ± 0.03 (n = 3), from fractions."""
    return f"{mean:.2%}{plus_minus(deviation)} (n = {n})"


# --- how it went -----------------------------------------------------------------------------------------------------


def optimisation_history(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Accuracy by trial number, and the best so far."""
    complete = sorted(leaderboard(trials), key=lambda t: t.number)
    pruned = [t for t in trials if outcome(t) == "pruned" and _last_accuracy(t) is not None]
    if not complete:
        raise NothingToDraw("No trial has been trained to its end yet, so there is no best accuracy to follow.")
    figure = _figure("trial", "validation accuracy in %")
    last = [_error(_last_accuracy(t)) for t in pruned]
    errors = [_error(t.value) for t in complete]
    if pruned:
        numbers, hover = [t.number for t in pruned], [_hover(t) for t in pruned]
        _points(figure, "pruned (its last epoch)", numbers, last, hover, GREY, "x-thin-open", size=7)
    numbers, hover = [t.number for t in complete], [_hover(t) for t in complete]
    _points(figure, "finished", numbers, errors, hover, BLUE, "circle")
    end = max(t.number for t in trials)
    best = list(accumulate(errors, min))
    line = {"color": VERMILLION, "shape": "hv", "width": 2}
    x, y = [*numbers, end], [*best, best[-1]]
    figure.add_scatter(x=x, y=y, mode="lines", name="best so far", line=line, hoverinfo="skip")
    figure.update_xaxes(tickformat="d")
    return _show_errors_as_accuracy(figure, errors + last)


def learning_curves(trials: Sequence[FrozenTrial], n_best: int = N_BEST) -> go.Figure:
    """Validation accuracy after every epoch of every trial that was more than a short run, the best highlighted."""
    trained = [t for t in trials if _curve(t)]
    if not trained:
        raise NothingToDraw("No trial has finished an epoch yet, so there is no learning curve.")
    best = leaderboard(trials)[:n_best]
    highlighted = {t.number for t in best}
    rest = [t for t in trained if t.number not in highlighted]
    finished = [t for t in rest if outcome(t) == "finished"]
    figure = _figure("epoch", "validation accuracy in %", 480)
    _curves(figure, "pruned, diverged, failed or running", [t for t in rest if t not in finished], GREY, 1, "dot", 0.75)
    _curves(figure, "other finished trials", finished, SKY, 1, "solid", 0.6)
    _curves(figure, f"the next {len(best) - 1}", best[1:], BLUE, 1.8, "solid", 0.9)
    _curves(figure, "the best", best[:1], VERMILLION, 3, "solid", 1.0)
    last = max(max(_curve(t)) for t in trained)
    figure.update_xaxes(tickformat="d", dtick=1 if last <= 20 else None, range=[0.7, last + 0.3])
    return _show_errors_as_accuracy(figure, [_error(v) for t in trained for v in _curve(t).values()])


def _curve(trial: FrozenTrial) -> dict[int, float]:
    """Accuracy by epoch, without the short run."""
    return {step: value for step, value in sorted(trial.intermediate_values.items()) if step > 0}


def _curves(
    figure: go.Figure, name: str, trials: Sequence[FrozenTrial], colour: str, width: float, dash: str, opacity: float
) -> None:
    """The curves of these trials as one trace with gaps: hundreds of traces would be slow and fill the legend."""
    if not trials:
        return
    x, y, hover, sizes = [], [], [], []
    for trial in trials:
        values = list(_curve(trial).items())
        # Without a mark, a curve of one epoch would not be seen.
        sizes += [5 if len(trials) == 1 or len(values) == 1 else 0] * len(values) + [0]
        x += [*(epoch for epoch, _ in values), None]
        y += [*(_error(value) for _, value in values), None]
        hover += [*(f"trial {trial.number}, epoch {epoch}: {value:.2%}" for epoch, value in values), ""]
    line = {"color": colour, "width": width, "dash": dash}
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines+markers" if any(sizes) else "lines",
        name=name,
        line=line,
        marker={"size": sizes, "line": {"width": 0}} if any(sizes) else None,
        opacity=opacity,
        connectgaps=False,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )


def epochs_spent(trials: Sequence[FrozenTrial], max_epochs: int) -> go.Figure:
    """Epochs trained so far, trial after trial, and what they would be if every trial had been trained to its end."""
    trained = sorted((t for t in trials if is_trained(t)), key=lambda t: t.datetime_complete)
    if not trained:
        raise NothingToDraw("No trial has been trained yet, so no epochs have been spent.")
    spent = list(accumulate(n_epochs(t) for t in trained))
    figure = _figure("trained trials", "epochs")
    numbers = list(range(1, len(trained) + 1))
    hover = [
        f"{n} trained trials: {e:,} epochs, {max(0, n * max_epochs - e):,} saved"
        for n, e in zip(numbers, spent, strict=True)
    ]
    figure.add_scatter(
        x=numbers,
        y=[n * max_epochs for n in numbers],
        name=f"{max_epochs} epochs for every trial",
        mode="lines+markers" if len(numbers) == 1 else "lines",
        line={"color": GREY, "dash": "dash"},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=numbers,
        y=spent,
        name="epochs trained",
        mode="lines+markers" if len(numbers) == 1 else "lines",
        line={"color": BLUE, "width": 2.5},
        fill="tozeroy",
        fillcolor="rgba(0,114,178,0.18)",
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_xaxes(tickformat="d").update_yaxes(tickformat=",", rangemode="tozero")
    return figure


def parameter_importance(study: optuna.Study) -> go.Figure:
    """Which parameters of the space separate the best trials from the rest, by Optuna's PED-ANOVA; shares of 1."""
    n = len(leaderboard(study.get_trials(deepcopy=False)))
    if n < TRIALS_FOR_IMPORTANCE:
        raise NothingToDraw(
            f"{n} trial{'s were' if n != 1 else ' was'} trained to the end; with fewer than {TRIALS_FOR_IMPORTANCE} "
            "the importance of a parameter would be chance, so it is not drawn."
        )
    ranked = list(optuna.importance.get_param_importances(study).items())
    shown = ranked[:N_IMPORTANT][::-1]
    figure = _figure("share of the importance", "", 130 + 24 * len(shown))
    figure.add_bar(
        x=[share for _, share in shown],
        y=[name for name, _ in shown],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.0%}" if share >= 0.005 else "<1%" for _, share in shown],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(tickformat=".0%", range=[0, 1.15 * shown[-1][1]]).update_yaxes(showgrid=False)
    return figure


def ablation(rows: Sequence[Ablated]) -> go.Figure:
    """Differences in accuracy, in percentage points, with bars of two standard errors; the first row at the top."""
    shown = [row for row in rows if row.difference][::-1]
    if not shown:
        raise NothingToDraw("No candidate of this study has been taken apart yet: that is what nas-mnist ablate does.")
    differences = [row.difference for row in shown]
    errors = [0 if math.isnan(d.accuracy_error) else 200 * d.accuracy_error for d in differences]
    colours = {True: {True: GREEN, False: VERMILLION}, False: {True: GREY, False: GREY}}
    figure = _figure("difference in points", "", 130 + 24 * len(shown))
    figure.add_scatter(
        x=[100 * d.accuracy for d in differences],
        y=[row.change.name for row in shown],
        error_x={"array": errors, "color": GREY},
        mode="markers",
        marker={"color": [colours[d.significant][d.accuracy > 0] for d in differences], "size": 9},
        customdata=[f"{100 * d.accuracy:+.3f} ± {error:.3f}" for d, error in zip(differences, errors, strict=True)],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
        showlegend=False,
    )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    return figure


def parameters_drawn(trials: Sequence[FrozenTrial], max_params: int) -> go.Figure:
    """Parameters of every candidate that was drawn, those over the budget marked."""
    drawn = [t for t in trials if _n_parameters(t) is not None]
    over = [t for t in drawn if is_over_budget(t)]
    if not drawn:
        raise NothingToDraw("No candidate has been drawn yet, so none can be over the budget.")
    if not over:
        raise NothingToDraw(
            f"None of the {len(drawn):,} candidates that were drawn is over the budget of fewer than {max_params:,} "
            "parameters, so there is no excess to show."
        )
    figure = _figure("trial", "parameters")
    within = [t for t in drawn if t not in over]
    if within:
        _points(figure, "within", [t.number for t in within], _sizes(within), list(map(_hover, within)), BLUE, "circle")
    hover = [f"{_hover(t)}<br>{_n_parameters(t) - max_params + 1:,} too many" for t in over]
    name = f"over budget: {len(over)} of {len(drawn)} ({len(over) / len(drawn):.1%})"
    _points(figure, name, [t.number for t in over], _sizes(over), hover, ORANGE, "x")
    figure.add_hline(max_params, line={"color": GREY, "dash": "dash", "width": 1})
    figure.update_xaxes(tickformat="d").update_yaxes(tickformat=",", rangemode="tozero")
    return figure


def timeline(trials: Sequence[FrozenTrial]) -> go.Figure:
    """What each worker was doing when; a trial that is still running ends with the epochs it has."""
    begun = sorted((t for t in trials if t.datetime_start), key=lambda t: t.datetime_start)
    if not begun:
        raise NothingToDraw("No trial has been started yet, so there is no timeline.")
    workers = list(dict.fromkeys(map(_worker, begun)))
    figure = _figure(f"from {begun[0].datetime_start:%Y-%m-%d %H:%M}", "", 150 + 26 * len(workers))
    for kind, colour in OUTCOMES.items():
        own = [t for t in begun if outcome(t) == kind]
        if not own:
            continue
        figure.add_bar(
            base=[t.datetime_start.isoformat() for t in own],
            x=[_milliseconds(t) for t in own],
            y=[f"worker {workers.index(_worker(t)) + 1}" for t in own],
            orientation="h",
            name=kind,
            marker={"color": colour, "line": {"color": "#ffffff", "width": 0.5}},
            customdata=[f"{_hover(t)}<br>{kind} after {_milliseconds(t) / 1000:,.0f} s" for t in own],
            hovertemplate="%{customdata}<extra></extra>",
        )
    names = [f"worker {i}" for i in range(1, len(workers) + 1)]
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False)
    figure.update_xaxes(type="date", tickformatstops=_CLOCK, tickangle=0, nticks=6).update_layout(barmode="overlay")
    return figure


def outcome(trial: FrozenTrial) -> str:
    """What became of a trial: one of `OUTCOMES`, or waiting."""
    if trial.state == TrialState.PRUNED:
        diverged = TrialRecord.from_trial(trial).reason is not None
        return "over budget" if is_over_budget(trial) else "diverged" if diverged else "pruned"
    states = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}
    return states.get(trial.state, "waiting")


def _worker(trial: FrozenTrial) -> str:
    return TrialRecord.from_trial(trial).process


def _milliseconds(trial: FrozenTrial) -> float:
    if trial.datetime_complete is None:
        return 1000 * TrialRecord.from_trial(trial).seconds
    return 1000 * (trial.datetime_complete - trial.datetime_start).total_seconds()


# --- drawing ---------------------------------------------------------------------------------------------------------


def _figure(x_title: str, y_title: str, height: int = 400) -> go.Figure:
    figure = go.Figure(layout={"template": TEMPLATE, "height": height})
    return figure.update_xaxes(title_text=x_title).update_yaxes(title_text=y_title)


def _points(figure: go.Figure, name: str, x, y, hover, colour: str, symbol: str, size: int = 8, opacity: float = 1.0):
    figure.add_scatter(
        x=x,
        y=y,
        mode="markers",
        name=name,
        marker={"color": colour, "symbol": symbol, "size": size, "opacity": opacity, "line": {"color": colour}},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _n_parameters(trial: FrozenTrial) -> int | None:
    return TrialRecord.from_trial(trial).n_parameters


def _sizes(trials: Iterable[FrozenTrial]) -> list[int]:
    return [_n_parameters(trial) for trial in trials]


def _hover(trial: FrozenTrial) -> str:
    """A trial in a few short lines; what comes from the database is no markup."""
    line = f"trial {trial.number}"
    if trial.state == TrialState.COMPLETE:
        line += f": {trial.value:.2%}"
    elif outcome(trial) in ("pruned", "diverged"):
        line += f": {outcome(trial)} {how_far(trial)}"
    record = TrialRecord.from_trial(trial)
    if record.n_parameters is not None:
        line += f", {record.n_parameters:,} parameters"
    notation = textwrap.wrap(record.architecture or "", 44)
    return "<br>".join(map(html.escape, [line, *notation]))


def _last_accuracy(trial: FrozenTrial) -> float | None:
    """In its last epoch that was judged; None if there was none. A short run reports its end alone."""
    if trial.intermediate_values:
        return trial.intermediate_values[max(trial.intermediate_values)]
    short_run = short_run_of(trial)
    return short_run[-1].eval_accuracy if short_run else None


def _error(accuracy: float) -> float:
    """In per cent."""
    return max(SMALLEST_ERROR, 100 * (1 - accuracy))


def _show_errors_as_accuracy(figure: go.Figure, errors: Sequence[float]) -> go.Figure:
    low, high = min(errors) / 1.12, min(100.0, max(errors) * 1.12)
    ticks = _accuracy_ticks(low, high)
    return figure.update_yaxes(
        type="log",
        range=[math.log10(high), math.log10(low)],
        tickvals=ticks,
        ticktext=[f"{100 - error:.4g}" for error in ticks],
    )


def _accuracy_ticks(low: float, high: float) -> list[float]:
    """Errors in % to label on a logarithmic axis: round ones first, then those between that are far enough apart."""
    mantissas = ((1,), (5,), (2,), (3, 7), (1.5, 8, 6, 4), (9, 5.5, 4.5, 3.5, 2.5))
    rounds = [[m * 10.0**exponent for exponent in range(-2, 2) for m in tier] for tier in mantissas]
    kept: list[float] = []
    apart = max(math.log(high / low) / 14, 0.04)
    for values in rounds:
        for value in values:
            if low <= value <= high and all(abs(math.log(value / k)) >= apart for k in kept):
                kept.append(value)
    return sorted(kept)
