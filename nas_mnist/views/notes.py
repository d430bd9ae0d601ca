"""What the dashboard tells of a study and of a trial, in Markdown."""

import re
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial

from nas_mnist.model.architecture import Architecture
from nas_mnist.study.records import TrialCounts, TrialRecord
from nas_mnist.study.space import Candidate, distributions, fingerprint
from nas_mnist.study.studies import recorded_identity
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS, N_FINAL_EPOCHS, TARGET_ACCURACY
from nas_mnist.views.tables import markdown_table

N_LISTED = 10
OPTIMIZERS = {"sgd": "SGD with Nesterov momentum", "adamw": "AdamW", "soap": "SOAP"}
TASK = (
    f"The task: a convolutional network with fewer than {MAX_PARAMS:,} parameters that gets {TARGET_ACCURACY:.1%} of "
    f"MNIST's test images right in each of the last {N_FINAL_EPOCHS} of at most {MAX_EPOCHS} epochs. "
    "Each trial has a note of its own."
)


UNITS = {"macs": "multiply-adds", "ram": "bytes of RAM"}  # of the parts of a budget; parameters are called that


def trial_note(trial: FrozenTrial, drawing_url: str) -> str:
    """The network of a trial: its line, a drawing, where its parameters are, and how it is trained."""
    record = TrialRecord.from_trial(trial)
    candidate = record.candidate
    architecture = candidate.architecture
    parts = [f"`{architecture}`", f"![{architecture.line}]({drawing_url})"]
    if record.excess:
        over = [f"{excess:,} {UNITS.get(name, name)}" for name, excess in record.excess.items()]
        parts.append(f"**Over the budget by {' and '.join(over)}**; recorded, never trained.")
    parts.append(
        f"{record.n_parameters:,} parameters, {architecture.n_macs:,} multiply-adds for an image, "
        f"receptive field {architecture.receptive_field}×{architecture.receptive_field}."
    )
    if record.reference:
        parts.append(f"Not drawn by the sampler: **{record.reference}**.")
    elif record.origin:
        parts.append(f"Where it comes from: **{_plain(record.origin)}**.")
    return "\n\n".join([*parts, layer_table(architecture), "### Recipe", _recipe_lines(candidate)])


def layer_table(architecture: Architecture) -> str:
    """One row a layer: what it makes of its input, what one output sees of the image, what it costs."""
    rows = [
        (
            f"`{s.layer}`",
            f"{s.channels}×{s.side}×{s.side}",
            f"{s.receptive_field}×{s.receptive_field}",
            s.jump,
            f"{s.n_parameters:,}",
            f"{s.n_parameters / architecture.n_parameters:.0%}",
            f"{s.n_macs:,}",
        )
        for s in architecture.shapes
    ]
    header = ("layer", "output", "receptive field", "jump", "parameters", "share", "multiply-adds")
    return markdown_table(header, rows, "lrrrrrr")


def _recipe_lines(candidate: Candidate) -> str:
    """Short lines: the dashboard makes its page as wide as the longest."""
    r = candidate.recipe
    a = r.augmentation
    facts = {
        "optimizer": OPTIMIZERS[r.optimizer],
        "learning rate": f"one cycle up to {r.learning_rate:.3g}",
        "length": f"{r.epochs} epochs in batches of {r.batch_size}",
        "weight decay": f"{r.weight_decay:.2g}",
        "label smoothing": f"{r.label_smoothing:.2g}",
        "dropout": f"{candidate.architecture.dropout:g}",
        "augmentation": f"turned ±{a.rotation_degrees:.3g}°, shifted ±{a.translation:.1%}, scaled ±{a.scale:.1%}, "
        f"sheared ±{a.shear_degrees:.3g}°",
    }
    if r.recalibrated:
        facts["batch norm"] = "statistics of unaugmented images"
    return "\n".join(f"- **{name}**: {value}" for name, value in facts.items())


def study_note(
    study: optuna.Study, trials: list[FrozenTrial], best: Iterable[FrozenTrial], n_bytes: int, command: str | None
) -> str:
    """What a study is, how far it has come, and its leaderboard; of a search also its command and its space."""
    now, identity = TrialCounts.of(trials), recorded_identity(study)
    facts = {
        "objective": (study.metric_names or ["accuracy"])[0],
        **{key.replace("_", " ").replace("max params", "parameters, fewer than"): v for key, v in identity.items()},
        "trained": f"{now.trained} trials, {now.pruned} of them pruned early; {now.over_budget} over the budget, "
        f"{now.failed} failed, {now.running} running",
        "files": f"{n_bytes / 1e6:.1f} MB: drawings, and weights and pictures of the best candidates",
    }
    lines = "\n".join(f"- **{key}**: {_plain(value)}" for key, value in facts.items() if value is not None)
    parts = [f"# {_plain(study.study_name)}", TASK, lines, "## Leaderboard", _leaderboard(best)]
    if command:
        known = identity["space"] == fingerprint(identity["optimizer"])
        ranges = space_table(identity["optimizer"]) if known else "That of an earlier version of nas-mnist."
        parts += ["## Command", f"```\n{command}\n```", "## Space", ranges]
    return "\n\n".join(parts)


def space_table(optimizer: str) -> str:
    """Every parameter that a trial draws, and its range."""
    rows = [(f"`{name}`", _code(_range(d))) for name, d in distributions(optimizer).items()]
    return markdown_table(("parameter", "range"), rows, "ll")


def _range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    return f"{distribution.low:g} – {distribution.high:g}" + ", log" * distribution.log


def _leaderboard(best: Iterable[FrozenTrial]) -> str:
    rows = [
        (rank, r.number, f"{t.value:.2%}", f"{r.n_parameters:,}", _code(r.architecture))
        for rank, (t, r) in enumerate(((t, TrialRecord.from_trial(t)) for t in best), 1)
    ][:N_LISTED]
    header = ("rank", "trial", "accuracy", "parameters", "architecture")
    return markdown_table(header, rows, "rrrrl") if rows else "No candidate has been trained to the end yet."


def _code(text: str) -> str:
    """A bar would end the cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def _plain(value: Any) -> str:
    """Text that is nobody's Markdown: a study may have any name."""
    text = f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", text)
