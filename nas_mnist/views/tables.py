"""Tables and figures from results. Draws and formats; what it shows has been computed elsewhere."""

import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.errors import NasMnistError
from nas_mnist.files import whole_file
from nas_mnist.model.architecture import Architecture, LayerShape
from nas_mnist.model.zoo import MARKS, ZOO, Mark, ReferenceSystem
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS, TARGET_ACCURACY

if TYPE_CHECKING:
    from nas_mnist.stages.baselines import BaselineResult, Training
    from nas_mnist.stages.confirm import Confirmed
    from nas_mnist.stages.frontier import Best
    from nas_mnist.stages.retrain import Retrained
    from nas_mnist.training.lr_finder import RateCurve
    from nas_mnist.training.recipe import Recipe

BAR_WIDTH = 10


def plain_table(title: str, *columns: str, left: Iterable[str] = ()) -> Table:
    """A plain table whose columns are numbers, except those named in `left`."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", header_style="dim", no_wrap=True)
    return table


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]], alignment: str) -> str:
    """`alignment` has a letter for each column, l or r. A bar in a cell does not end it."""
    names = [("\u2003" if letter == "r" else "") + name for name, letter in zip(header, alignment, strict=True)]  # room
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    cells = ([re.sub(r"(?<!\\)\|", r"\\|", str(cell)) for cell in row] for row in (names, rule, *rows))
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def percentage_points(deviation: float | None) -> str:
    """A standard deviation in percentage points; nothing if there is none."""
    return "" if deviation is None else f"{100 * deviation:.2f}"


def plus_minus(deviation: float | None) -> str:
    """The same, to stand behind a mean."""
    return "" if deviation is None else f" ± {percentage_points(deviation)}"


# --- one architecture ------------------------------------------------------------------------------------------------


def description(architecture: Architecture, n_parameters: int, max_params: int) -> RenderableType:
    """All there is to say about an architecture before it is trained; `n_parameters` counted from the built network."""
    return Group(
        Text(str(architecture), style="bold"),
        "",
        Text(module_table(architecture), no_wrap=True, overflow="ignore"),
        "",
        receptive_field_table(architecture),
        Text("kernel k, stride s, padding p, side n of the map; jump j, receptive field r in pixels", "dim"),
        "",
        cost_table(architecture),
        "",
        multiply_adds_line(architecture),
        "",
        ram_table(architecture),
        "",
        budget_line(n_parameters, max_params),
    )


def program_table(architecture: Architecture, batch_size: int, optimizer: str) -> Table:
    """The instructions of a training step on a CPU: a line each, in their order; a bar beside those of one sweep."""
    from nas_mnist.kernels.instructions import Mode
    from nas_mnist.training.plan import plan

    made = plan(architecture, batch_size, Mode.TRAIN, optimizer)
    megabytes = made.size * 4 / 1e6
    title = f"{len(made.instructions)} instructions a step of {batch_size} images, {megabytes:.1f} MB"
    left = ("instruction", "from", "to", "parameters")
    table = plain_table(title, "", "", "instruction", "from", "to", "parameters", left=left)
    marks = [mark for n in made.sweeps for mark in (("┌", *"│" * (n - 2), "└") if n > 1 else ("",))]
    for number, (instruction, mark) in enumerate(zip(made.instructions, marks, strict=True)):
        backward = instruction.gy is not None
        source, target = (instruction.gy, instruction.gx) if backward else (instruction.x, instruction.y)
        table.add_row(
            str(number),
            mark,
            instruction.op.name.lower().replace("_", " "),
            *(f"map {m.number}: {m.channels} × {m.side}²" if m else "" for m in (source, target)),
            instruction.about,
        )
    table.caption = "in brackets: done for one channel after another, whose maps stay in the cache"
    return table


def description_values(architecture: Architecture, n_parameters: int, max_params: int) -> dict[str, Any]:
    """The same as plain values for JSON: lengths in pixels, multiply-adds for one image."""
    return {
        "architecture": str(architecture),
        "n_parameters": n_parameters,
        "max_params": max_params,
        "within_budget": n_parameters < max_params,
        "n_macs": architecture.n_macs,
        "ram": architecture.ram,
        "receptive_field": architecture.receptive_field,
        "layers": [shape._asdict() | {"layer": str(shape.layer), "ram": shape.ram} for shape in architecture.shapes],
    }


def module_table(architecture: Architecture) -> str:
    """torchinfo's table of the built network, for a batch of one image; nothing is allocated."""
    import torch
    import torchinfo

    from nas_mnist.model.network import Network

    with torch.device("meta"):
        network = Network(architecture)
    columns = ("output_size", "num_params", "mult_adds")
    summary = torchinfo.summary(
        network, (1, 1, 28, 28), device="meta", depth=3, col_names=columns, col_width=16, verbose=0
    )
    return str(summary).replace("(Units.MEGABYTES)", "(M)")  # torchinfo 1.8 prints its enum's name from Python 3.12 on


def receptive_field_table(architecture: Architecture) -> Table:
    table = plain_table(
        "receptive field", "#", "layer", "channels", "k", "s", "p", "n in", "n out", "j", "r", left=["layer"]
    )
    for number, s in enumerate(architecture.shapes, 1):
        numbers = (s.kernel, s.stride, s.padding, s.in_side, s.side, s.jump, s.receptive_field)
        table.add_row(str(number), str(s.layer), f"{s.in_channels} → {s.channels}", *map(str, numbers))
    return table


def cost_table(architecture: Architecture) -> Table:
    """Where the parameters and the multiply-adds are spent, layer by layer."""
    left = ("layer", "", " ")
    table = plain_table(
        "parameters and multiply-adds",
        "#",
        "layer",
        "parameters",
        "share",
        "",
        "multiply-adds",
        "share",
        " ",
        left=left,
    )
    totals = architecture.n_parameters, architecture.n_macs
    for number, s in enumerate(architecture.shapes, 1):
        table.add_row(str(number), str(s.layer), *_cost_cells(s, *totals))
    table.add_section()
    table.add_row("", "total", f"{totals[0]:,}", "", "", f"{totals[1]:,}", "", "", style="bold")
    return table


def _cost_cells(shape: LayerShape, n_parameters: int, n_macs: int) -> list[RenderableType]:
    cells: list[RenderableType] = []
    for part, total, colour in ((shape.n_parameters, n_parameters, "cyan"), (shape.n_macs, n_macs, "magenta")):
        cells += [f"{part:,}", f"{part / total:.1%}", Bar(total, 0, part, width=BAR_WIDTH, color=colour)]
    return cells if shape.n_macs else ["", "", "", "", "", ""]


def ram_table(architecture: Architecture) -> Table:
    """The bytes of int8 maps that are alive at once, layer by layer, in the order in which the C computes them."""
    table = plain_table(
        "RAM in int8", "#", "layer", "reads", "writes", "bytes at once", "", "peak", left=["layer", "", "peak"]
    )
    peak = architecture.ram
    for number, s in enumerate(architecture.shapes, 1):
        maps = (f"{channels}×{side}×{side}" for channels, side in ((s.in_channels, s.in_side), (s.channels, s.side)))
        bar = Bar(peak, 0, s.ram, width=BAR_WIDTH, color="yellow")
        table.add_row(str(number), str(s.layer), *maps, f"{s.ram:,}", bar, "◀" * (s.ram == peak))
    return table


def multiply_adds_line(architecture: Architecture) -> str:
    return f"{architecture.n_macs:,} multiply-adds for one image (torchinfo also counts norms and biases)"


def published_lines(system: ReferenceSystem) -> Text:
    """What the authors of a reference system report of it."""
    last = f"{system.last_accuracy:.2%} in the last epoch, " if system.last_accuracy else ""
    text = (
        f"published: {last}{system.best_accuracy:.2%} in the best of {system.epochs} epochs, one run\n"
        f"source: {system.source}"
    )
    return Text(f"{text}\n{system.remark}" if system.remark else text, "dim")


def budget_line(n_parameters: int, max_params: int) -> Text:
    """The verdict: strictly fewer than the limit."""
    left = max_params - 1 - n_parameters
    if left >= 0:
        return Text(f"✓ {n_parameters:,} parameters: fewer than {max_params:,}, {left:,} left to spend", "green")
    return Text(f"✗ {n_parameters:,} parameters: not fewer than {max_params:,}, {-left:,} too many", "red")


def recipe_values(recipe: "Recipe") -> dict[str, str]:
    """A recipe's values by name, as people read them."""
    flat = {**asdict(recipe), **asdict(recipe.augmentation)}
    del flat["augmentation"]
    if recipe.optimizer != "sgd":
        del flat["momentum"]  # the others have none that anybody sets
    return {
        name.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in flat.items()
    }


# --- learning-rate range test ----------------------------------------------------------------------------------------


def rate_curve_lines(curve: "RateCurve") -> Text:
    """What to make of it, in words."""
    return Text.assemble(
        ("lowest loss at    ", "dim"),
        f"{curve.minimum:<8.2g}a one-cycle schedule may rise to about here\n",
        ("a tenth of that   ", "dim"),
        f"{curve.tenth_of_minimum:<8.2g}the customary choice for a constant rate\n",
        ("steepest descent  ", "dim"),
        f"{curve.steepest:<8.2g}the loss falls fastest here",
    )


def rate_curve_plot(curve: "RateCurve", width: int) -> Text:
    """The smoothed loss over the learning rate, drawn in characters."""
    import plotext

    low, high = _loss_limits(curve)
    exponents = [math.log10(rate) for rate in curve.learning_rates]  # plotext's own logarithmic axis starts at 1
    figure = plotext.figure.clear().plot_size(width, 18)
    visible = [min(loss, high) for loss in curve.smoothed_losses]
    figure.draw(figure.signal(exponents, visible, marker="braille").lines())
    for rate in (curve.steepest, curve.tenth_of_minimum):
        figure.draw(figure.signal([math.log10(rate)] * 2, [low, high], marker="┊").lines())
    decades = range(math.ceil(exponents[0] - 1e-9), math.floor(exponents[-1] + 1e-9) + 1)
    figure.ruler("x").ticks(list(decades), [f"{10.0**decade:g}" for decade in decades])
    figure.label("learning rate", "x")
    figure.title("training loss in nats; dotted: the two lower suggestions")
    return Text.from_ansi(str(figure.build()))


def rate_curve_figure(curve: "RateCurve", title: str):
    """The range test as a matplotlib figure: each batch's loss, the smoothed loss, and both suggestions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(curve.learning_rates, curve.losses, color="0.75", linewidth=0.8, label="one batch")
    axes.semilogx(curve.learning_rates, curve.smoothed_losses, color="C0", linewidth=2, label="smoothed")
    for name, rate, colour in (
        ("steepest descent", curve.steepest, "C2"),
        ("lowest loss ÷ 10", curve.tenth_of_minimum, "C1"),
    ):
        axes.axvline(rate, color=colour, linestyle="--", label=f"{name}: {rate:.2g}")
    axes.set(xlabel="learning rate", ylabel="training loss in nats", ylim=_loss_limits(curve))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return figure


def rate_curve_values(curve: "RateCurve") -> dict[str, Any]:
    """The same as plain values for JSON; losses in nats."""
    return asdict(curve) | {"tenth_of_minimum": curve.tenth_of_minimum}


def _loss_limits(curve: "RateCurve") -> tuple[float, float]:
    """From just below the lowest smoothed loss to just above the first: the explosion would flatten the rest."""
    low, first = min(curve.smoothed_losses), curve.smoothed_losses[0]
    margin = 0.15 * (first - low)
    return max(0.0, low - margin), first + 2 * margin


# --- baselines -------------------------------------------------------------------------------------------------------


def baselines_table(results: Iterable["BaselineResult"], dataset: Dataset = MNIST) -> Table:
    """Published against reproduced, in per cent of the test set; `worst` is that of the last two epochs of any run.

    What was published is of MNIST: for another dataset there is nothing to compare.
    """
    compared = ("published", "reproduced", "± SD", "runs", "worst", "diff", "seconds")
    alone = ("accuracy", "± SD", "runs", "worst", "seconds")
    columns = ("system", "params", *(compared if dataset == MNIST else alone))
    table = plain_table(f"reference systems on {dataset.title}", *columns, left=("system",))
    table.padding = (0, 1, 0, 0)
    for result in results:
        cells = _baseline_cells(result)
        table.add_row(*(cells.get(name, "") for name in columns))
    return table


def _baseline_cells(result: "BaselineResult") -> dict[str, RenderableType]:
    """What there is to say of a system, by column."""
    system, difference = result.system, result.difference
    cells: dict[str, RenderableType] = {
        "system": f"{system.name} (own)" if result.training.own else system.name,
        "params": f"{system.n_parameters:,}",
        "published": f"{system.published_accuracy:.2%}{'*' if system.last_accuracy is None else ' '}",
        "runs": f"{len(result.runs)}" + (f"+{result.n_diverged}†" if result.n_diverged else ""),
    }
    if result.runs:
        cells |= {
            "reproduced": f"{result.mean:.2%}",
            "accuracy": f"{result.mean:.2%}",
            "± SD": percentage_points(result.standard_deviation),
            "worst": f"{result.worst_of_last:.2%}",
            "seconds": f"{result.seconds:,.0f}",
        }
    if difference is not None:
        cells["diff"] = Text(f"{100 * difference:+.2f}", "green" if difference >= 0 else "red")
    return cells


def baselines_note(
    recipe: "Recipe", n_images: int, dataset: Dataset = MNIST, own: Iterable["BaselineResult"] = ()
) -> Text:
    """The recipe that all of them share, those that some have besides, and how to read the table."""
    published = "published: the last epoch of one run, or * its best; reproduced"
    lines = [
        f"recipe: {recipe.epochs} epochs of {n_images:,} images, {_recipe_text(recipe)}",
        *(f"(own) {result.system.name}: {_training_text(result.training)}" for result in own),
        f"{published if dataset == MNIST else 'accuracy'}: the mean of the last epoch on the test set",
        "worst: of the last two epochs of any run; seconds: a run, training and testing; † diverged",
    ]
    return Text("\n".join(lines), "dim")


def _training_text(training: "Training") -> str:
    first_weights = {"default": "", "positive": "; He's initialisation, no negative weight in the last layer"}
    return _recipe_text(training.recipe) + first_weights[training.initialisation]


def _recipe_text(recipe: "Recipe") -> str:
    a = recipe.augmentation
    optimizer = f"SGD with Nesterov momentum {recipe.momentum:g}" if recipe.optimizer == "sgd" else recipe.optimizer
    augmentation = (
        f"rotation ±{a.rotation_degrees:g}°, shift ±{a.translation:.0%}, scale ±{a.scale:.0%}, "
        f"shear ±{a.shear_degrees:g}°"
    )
    return (
        f"{optimizer}, one cycle up to a learning rate of {recipe.learning_rate:g}, batches of {recipe.batch_size}, "
        f"weight decay {recipe.weight_decay:g}; {augmentation if a else 'no augmentation'}"
    )


def baseline_values(result: "BaselineResult") -> dict[str, Any]:
    """The same as plain values for JSON: accuracies as fractions, one for each epoch of each run."""
    system = result.system
    return {
        "system": system.name,
        "architecture": str(system.architecture),
        "n_parameters": system.n_parameters,
        "dataset": result.dataset.name,
        "published": {"last": system.last_accuracy, "best": system.best_accuracy, "source": system.source}
        if result.dataset == MNIST
        else None,
        "own_recipe": bool(result.training.own),
        "training": asdict(result.training),
        "epochs": result.training.recipe.epochs,
        "mean": result.mean,
        "standard_deviation": result.standard_deviation,
        "worst_of_last": result.worst_of_last,
        "difference": result.difference,
        "seconds": result.seconds,
        "n_diverged": result.n_diverged,
        "runs": [asdict(run) for run in result.runs],
    }


# --- confirmation and retraining -------------------------------------------------------------------------------------


def confirmation_table(ranking: list["Confirmed"]) -> Table:
    """Candidates by their mean on fresh folds; optimism is how much better the search believed them to be."""
    columns = ("trial", "params", "search", "confirmed", "± SD", "n", "optimism", "", "architecture")
    table = plain_table("confirmed on fresh folds and seeds", *columns, left=("", "architecture"))
    table.columns[-1].no_wrap, table.columns[-1].overflow = False, "fold"
    for c in ranking:
        deviation = percentage_points(c.standard_deviation)
        numbers = (f"{c.n_parameters:,}", f"{c.search_score:.2%}", f"{c.mean:.3%}", deviation, f"{len(c.accuracies)}")
        given_up = "given up" if c.given_up else ""
        table.add_row(str(c.trial), *numbers, f"{100 * c.optimism:+.2f}", given_up, Text(c.architecture))
    return table


def lead_line(ranking: list["Confirmed"], p_value: float | None, significant: float) -> Text:
    """Whether the first is really ahead of the second."""
    if len(ranking) < 2:
        return Text("one candidate: nothing to compare it with", "dim")
    first, second = ranking[:2]
    if p_value is None:
        return Text(f"trials {first.trial} and {second.trial} are equal on every fold and seed", "yellow")
    n = min(len(first.accuracies), len(second.accuracies))  # one that was given up has fewer
    difference = (sum(first.accuracies[:n]) - sum(second.accuracies[:n])) / n
    really = "is ahead of" if p_value < significant else "is not certainly ahead of"
    return Text(
        f"trial {first.trial} {really} trial {second.trial}: {100 * difference:+.3f} points, "
        f"p = {p_value:.2f} (one-sided Wilcoxon test over common folds and seeds)",
        "green" if p_value < significant else "yellow",
    )


def retrained_table(retrained: "Retrained") -> Table:
    """Test accuracy of each seed: the last epoch counts."""
    table = plain_table("test accuracy", "seed", "last", "last two, worse", "seconds")
    for run in retrained.runs:
        table.add_row(str(run.seed), f"{run.accuracy:.2%}", f"{run.worst_of_last:.2%}", f"{run.seconds:.0f}")
    for seed in retrained.diverged:
        table.add_row(str(seed), "diverged", "", "")
    table.add_section()
    spread = plus_minus(retrained.standard_deviation)
    worst = min(retrained.runs, key=lambda run: run.worst_of_last)
    table.add_row("mean", f"{retrained.mean:.3%}{spread}", f"worst {worst.worst_of_last:.2%} (seed {worst.seed})", "")
    return table


def verdict_lines(retrained: "Retrained") -> Text:
    """The task, condition by condition; on another dataset than MNIST there is no accuracy to reach."""
    v = retrained.verdict
    every_seed = "every seed" + " that did not diverge" * (not v.every_seed)
    conditions = [
        (v.few_parameters, f"{v.n_parameters:,} parameters: fewer than {MAX_PARAMS:,}"),
        (v.few_epochs, f"{v.n_epochs} epochs: at most {MAX_EPOCHS}"),
    ]
    if v.of_the_task:
        rule = f"{v.worst_of_last:.2%} at worst: {TARGET_ACCURACY:.2%} in each of the last two epochs, {every_seed}"
        conditions.append((v.accurate, rule))
    if not v.every_seed:
        seeds = ", ".join(map(str, retrained.diverged))
        conditions.append(
            (False, f"{v.n_diverged} of {v.n_diverged + len(retrained.runs)} seeds diverged ({seeds}): none does")
        )
    lines = [Text(f"{'✓' if met else '✗ not:'} {rule}", "green" if met else "red") for met, rule in conditions]
    if not v.of_the_task:
        of_dataset = f"{retrained.dataset.title}: the task's {TARGET_ACCURACY:.2%} is asked for on MNIST alone"
        lines.append(Text(f"{v.worst_of_last:.2%} at worst of the last two epochs, {every_seed}, of {of_dataset}"))
    return Text("\n").join(lines)


def retrained_values(retrained: "Retrained") -> dict[str, Any]:
    """The same as plain values for JSON; accuracies as fractions."""
    verdict = retrained.verdict
    return {
        **retrained.candidate.to_dict(),
        "trial": retrained.trial,
        "n_train_images": retrained.n_train_images,
        "mean": retrained.mean,
        "standard_deviation": retrained.standard_deviation,
        "runs": [
            asdict(run) | {"accuracy": run.accuracy, "worst_of_last": run.worst_of_last} for run in retrained.runs
        ],
        "diverged": list(retrained.diverged),
        "dataset": retrained.dataset.name,
        "verdict": {"fulfilled": verdict.fulfilled, **asdict(verdict)},
    }


# --- frontier --------------------------------------------------------------------------------------------------------

SIZE_KEYS = {"params": "n_parameters", "macs": "n_macs", "ram": "ram"}  # as `describe --json` calls them


def frontier_table(points: Iterable["Best"], dataset: Dataset = MNIST) -> Table:
    """The best confirmed network under each budget, beside the best published under it, on MNIST's test set."""
    published = ("published, test",) if dataset == MNIST else ()
    points = list(points)
    over = points[0].over if points else "params"
    published = published if over == "params" else ()
    columns = (*_frontier_heads(over), *published, "found by", "architecture")
    table = plain_table("the best under each budget", *columns, left=("found by", "architecture"))
    table.columns[-1].no_wrap, table.columns[-1].overflow, table.columns[-1].min_width = False, "fold", 24
    for point in points:
        c = point.confirmed
        deviation = plus_minus(c.standard_deviation)
        marks = [f"{100 * m.accuracy:.2f} at {m.n_parameters:,}" for m in best_published(point.budget)] or ["none"]
        numbers = (f"{point.budget:,}", f"{100 * c.mean:.2f}{deviation}", f"{len(c.accuracies)}", f"{point.size:,}")
        found_by = Text(f"{point.study_name}, trial {c.trial}")
        table.add_row(*numbers, *marks[: len(published)], found_by, Text(c.architecture))
    return table


def frontier_values(points: Iterable["Best"]) -> list[dict[str, Any]]:
    """The same as plain values for JSON; accuracies as fractions."""
    return [
        {f"max_{p.over}": p.budget, "study": p.study_name, **p.confirmed.to_dict(), SIZE_KEYS[p.over]: p.size}
        for p in points
    ]


def _frontier_heads(over: str) -> tuple[str, str, str, str]:
    return ("below" if over == "params" else "at most", "confirmed, %", "n", over)


def best_published(budget: int) -> list[Mark]:
    """The most accurate published network with fewer parameters, if there is any."""
    systems = [Mark(s.n_parameters, s.published_accuracy, s.name) for s in ZOO.values()]
    fitting = [mark for mark in (*MARKS, *systems) if mark.n_parameters < budget]
    return sorted(fitting, key=lambda mark: -mark.accuracy)[:1]


def frontier_figure(points: list["Best"], dataset: Dataset = MNIST):
    """Accuracy against what the budget is of: the confirmed networks with their standard deviations.

    Against parameters, also what was published.
    """
    from matplotlib.figure import Figure

    from nas_mnist.stages.frontier import SIZES

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    confirmed = [point.confirmed for point in points]
    sizes = [point.size for point in points]
    over = points[0].over if points else "params"
    spread = [100 * (c.standard_deviation or 0) for c in confirmed]
    means = [100 * c.mean for c in confirmed]
    axes.errorbar(sizes, means, spread, fmt="o-", color="C0", capsize=3, label="confirmed on fresh folds, mean ± SD")
    if dataset == MNIST and over == "params":
        _draw_published(axes)
    axes.set(xscale="log", xlabel=SIZES[over], ylabel="accuracy in %")
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    axes.xaxis.set_minor_formatter(lambda n, _: "")
    axes.set_xticks([point.budget for point in points])
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    return figure


def _draw_published(axes) -> None:
    systems = [(s.n_parameters, s.published_accuracy) for s in ZOO.values()]
    marks = [(m.n_parameters, m.accuracy) for m in MARKS]
    for points, marker, label in (
        (systems, "^", "reference systems, test set, one run"),
        (marks, "*", "published marks, test set"),
    ):
        sizes, accuracies = zip(*points, strict=True)
        percent = [100 * accuracy for accuracy in accuracies]
        axes.plot(sizes, percent, marker, color="C1", markersize=8, alpha=0.8, label=label)


# --- files -----------------------------------------------------------------------------------------------------------


def check_figure_path(path: Path) -> None:
    """Raise `NasMnistError` if a figure cannot be written there: better before the work than after it."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise NasMnistError(f"a figure is a .png, .svg or .pdf file, not {path}: give another name", "out")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise NasMnistError(f"{path.parent} must be a folder that can be written: give another one", "out")


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
