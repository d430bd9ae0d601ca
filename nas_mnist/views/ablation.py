"""An ablation as a table for a terminal, as rows of text, and as a figure."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from nas_mnist.stages.ablate import Ablated, Difference
from nas_mnist.views.tables import percentage_points, plain_table

WIDTH, ROW_HEIGHT = 8.0, 0.3  # inches
TICKS = (-100, -10, -1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 10, 100)  # percentage points


def ablation_table(rows: Sequence[Ablated], *, climbing: bool = False) -> Table:
    """Each row, and its difference to the first one or, `climbing`, to the one before; in percentage points."""
    published = any(row.change.published for row in rows)
    numbers = ("params", *["published"] * published, "accuracy ± SD", "n", "difference ± SE", "p")
    title = "one step after the other" if climbing else "one change at a time"
    table = _foldable(plain_table(title, "", *numbers, left=("",)), 0)
    for row in rows:
        parameters, *told, accuracy, deviation, n, difference, error, p = cells(row, published)
        spread = f"{accuracy} ± {deviation}" if deviation else accuracy
        compared = f"{difference} ± {error}" if error else difference
        table.add_row(row.change.name, parameters, *told, spread, n, compared, p, style=_style(row.difference))
    return table


def networks_table(rows: Sequence[Ablated], *, climbing: bool = False) -> Table:
    """The network as it is, and those of the rows that have another."""
    table = _foldable(plain_table("networks", "", "network", left=("", "network")), 0, 1)
    before = None
    for row in rows:
        architecture = row.change.candidate.architecture
        if architecture != before:
            table.add_row(row.change.name, Text(str(architecture)))
        before = architecture if climbing or before is None else before
    return table


def _foldable(table: Table, *places: int) -> Table:
    """Names and networks are folded where the terminal is narrow, numbers never."""
    for i in places:
        table.columns[i].no_wrap, table.columns[i].overflow = False, "fold"
    return table


def ablation_note(rows: Sequence[Ablated], *, climbing: bool = False) -> Text:
    """How to read the table."""
    other = "the row before" if climbing else "the first row"
    return Text(
        f"differences to {other} in percentage points, paired by fold and seed; p of a paired t-test, two-sided; "
        f"coloured where p < 0.05: of {len(rows) - 1} comparisons one in twenty would be by chance alone",
        "dim",
    )


def ablation_rows(rows: Sequence[Ablated]) -> list[list[str]]:
    """The same for a model card: a header, and a row of text for each change."""
    header = ["", "parameters", "accuracy", "± SD", "n", "difference", "± SE", "p", "network"]
    return [header, *([r.change.name, *cells(r, False), f"`{r.change.candidate.architecture}`"] for r in rows)]


def cells(row: Ablated, published: bool) -> tuple[str, ...]:
    """Parameters, what was published if that is asked for, accuracy, SD, n, difference, its standard error, p."""
    known = row.change.published
    told = [f"{known:.2%}" if known else ""] * published
    diverged = f" ({row.n_diverged} diverged)" if row.n_diverged else ""
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.3%}"
    measured = (accuracy, percentage_points(row.standard_deviation), f"{len(row.outcomes)}{diverged}")
    return (f"{row.change.n_parameters:,}", *told, *measured, *_difference_cells(row.difference))


def _difference_cells(difference: Difference | None) -> tuple[str, str, str]:
    if difference is None:
        return "", "", ""
    error = "" if math.isnan(difference.accuracy_error) else f"{100 * difference.accuracy_error:.3f}"
    p = "" if math.isnan(difference.p) else "< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}"
    return f"{100 * difference.accuracy:+.3f}", error, p


def _style(difference: Difference | None) -> str:
    if difference is None or not difference.significant:
        return ""
    return "green" if difference.accuracy > 0 else "red"


def ablation_figure(rows: Sequence[Ablated], *, climbing: bool = False):
    """The differences with bars of two standard errors; of a ladder the accuracies, and what was published."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.outcomes and (climbing or row.difference)]
    figure = Figure(figsize=(WIDTH, 1.2 + ROW_HEIGHT * len(shown)), layout="constrained")
    axes = figure.subplots()
    (_draw_ladder if climbing else _draw_differences)(axes, shown)
    axes.set_yticks(range(len(shown)), [row.change.name for row in shown])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    return figure


def _draw_differences(axes, rows: Sequence[Ablated]) -> None:
    for i, row in enumerate(rows):
        error = 0.0 if math.isnan(row.difference.accuracy_error) else 200 * row.difference.accuracy_error
        colour = "0.5" if not row.difference.significant else "C2" if row.difference.accuracy > 0 else "C3"
        axes.errorbar(100 * row.difference.accuracy, i, xerr=error, fmt="o", color=colour, capsize=3)
    from matplotlib.ticker import NullLocator

    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xticks(TICKS, [f"{points:+g}" if points else "0" for points in TICKS], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(*_padded(rows))
    n = max((row.difference.n for row in rows), default=0)
    axes.set_xlabel(f"difference in accuracy, percentage points, ± two standard errors; n = {n} pairs")


def _padded(rows: Sequence[Ablated]) -> tuple[float, float]:
    """The limits that all points and their bars have room in, and a twentieth of a point at least."""
    known = [row.difference for row in rows if row.difference]
    ends = [(100 * d.accuracy, 0 if math.isnan(d.accuracy_error) else 200 * d.accuracy_error) for d in known]
    low, high = min((x - e for x, e in ends), default=0), max((x + e for x, e in ends), default=0)
    return min(1.2 * low, -0.06), max(1.2 * high, 0.06)


def _draw_ladder(axes, rows: Sequence[Ablated]) -> None:
    places = range(len(rows))
    means = [100 * row.accuracy for row in rows]
    spread = [100 * (row.standard_deviation or 0) for row in rows]
    axes.errorbar(
        means, places, xerr=spread, fmt="o", color="C0", capsize=3, label="measured on fresh folds, mean ± SD"
    )
    known = [(100 * row.change.published, i) for i, row in enumerate(rows) if row.change.published]
    axes.plot(*zip(*known, strict=True), "^", color="C1", label="published: test set, one run, best epoch")
    axes.set_xlabel("accuracy in %")
    axes.legend(loc="best")
