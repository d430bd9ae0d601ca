"""What the dashboard tells of a study and of a trial, in Markdown."""

import re
from collections.abc import Iterable
from typing import Any

from optuna.trial import FrozenTrial

from nas_mnist import study
from nas_mnist.architecture import Architecture
from nas_mnist.space import Candidate

N_LISTED = 10
PURPOSE = (
    "Tiny convolutional networks under a hard budget of parameters and epochs. Each trial has a note with a drawing."
)
NEXT_STEPS = """```
nas-mnist search --trials N   # goes on, to N trained trials
nas-mnist confirm             # the best again, on fresh folds and seeds
nas-mnist retrain             # the winner on all images; then the test set
```"""


def trial_note(trial: FrozenTrial, drawing_url: str) -> str:
    """The network of a trial: its line, a drawing, where its parameters are, and how it is trained."""
    candidate = Candidate.from_dict({name: trial.user_attrs[name] for name in ("architecture", "recipe")})
    architecture, attributes = candidate.architecture, trial.user_attrs
    parts = [f"`{architecture}`", f"![{architecture.line}]({drawing_url})"]
    if study.is_over_budget(trial):
        excess = max(trial.constraints.values())
        parts.append(f"**Over the budget by {excess:,.0f} parameters**; recorded, never trained.")
    parts.append(
        f"{attributes['n_parameters']:,} parameters, {architecture.n_macs:,} multiply-adds for an image, "
        f"receptive field {architecture.receptive_field}×{architecture.receptive_field}."
    )
    if "reference" in attributes:
        parts.append(f"This is the published network **{attributes['reference']}**.")
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
    return _table(header, rows, "lrrrrrr")


def _recipe_lines(candidate: Candidate) -> str:
    """Short lines: the dashboard makes its page as wide as the longest."""
    r = candidate.recipe
    a = r.augmentation
    facts = {
        "optimizer": "SGD with Nesterov momentum" if r.optimizer == "sgd" else "AdamW",
        "learning rate": f"one cycle up to {r.learning_rate:.3g}",
        "length": f"{r.epochs} epochs in batches of {r.batch_size}",
        "weight decay": f"{r.weight_decay:.2g}",
        "label smoothing": f"{r.label_smoothing:.2g}",
        "dropout": f"{candidate.architecture.dropout:g}",
        "augmentation": f"turned ±{a.rotation_degrees:.3g}°, shifted ±{a.translation:.1%}, scaled ±{a.scale:.1%}, "
        f"sheared ±{a.shear_degrees:.3g}°",
    }
    return "\n".join(f"- **{name}**: {value}" for name, value in facts.items())


def study_note(
    name: str,
    metric: str,
    identity: dict[str, Any],
    trials: list[FrozenTrial],
    best: Iterable[FrozenTrial],
    n_bytes: int,
) -> str:
    """What a study is, how far it has come, and its leaderboard."""
    now = study.progress(trials)
    facts = {
        "objective": metric,
        **{key.replace("_", " ").replace("max params", "parameters, fewer than"): v for key, v in identity.items()},
        "trained": f"{now.trained} trials, {now.pruned} of them pruned early; {now.over_budget} over the budget, "
        f"{now.failed} failed, {now.running} running",
        "files": f"{n_bytes / 1e6:.1f} MB: drawings, and weights and pictures of the best candidates",
    }
    lines = "\n".join(f"- **{key}**: {_plain(value)}" for key, value in facts.items())
    return "\n\n".join([f"# {_plain(name)}", PURPOSE, lines, "## Leaderboard", _leaderboard(best), NEXT_STEPS])


def _leaderboard(best: Iterable[FrozenTrial]) -> str:
    rows = [
        (rank, t.number, f"{t.value:.2%}", f"{t.user_attrs['n_parameters']:,}", _code(t.user_attrs["architecture"]))
        for rank, t in enumerate(best, 1)
    ][:N_LISTED]
    header = ("rank", "trial", "accuracy", "parameters", "architecture")
    return _table(header, rows, "rrrrl") if rows else "No candidate has been trained to the end yet."


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]], alignment: str) -> str:
    """`alignment` has a letter for each column, l or r."""
    header = [
        ("\u2003" if letter == "r" else "") + name for name, letter in zip(header, alignment, strict=True)
    ]  # room
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows))


def _code(text: str) -> str:
    """A bar would end the cell of a table."""
    return f"`{text}`".replace("|", "\\|")


def _plain(value: Any) -> str:
    """Text that is nobody's Markdown: a study may have any name."""
    text = f"{value:,}" if isinstance(value, int) else " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", text)
