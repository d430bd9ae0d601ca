"""The model card of a solution: what it is, how good, how it was chosen, how to use and to reproduce it."""

import shlex
from typing import Any

from rich.console import Console

from nas_mnist import report
from nas_mnist.retrain import Retrained

SECTIONS = """# {title}

{verdict}

    {line}

{accuracy}

![loss and accuracy](figures/curves.png)

## Use

In Python, with torch alone (`model.py` and `weights.safetensors`):

```python
from model import load

logits = load()(images)  # (B, 1, 28, 28) float32, (x / 255 - 0.1307) / 0.3081 with the ink bright → (B, 10)
```

From the command line: `python model.py digit.png`. With ONNX (opset {opset}, any batch size):

```python
import onnxruntime

logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})[0]
```

## How it was chosen

{chosen}

## Accuracy of every seed

{seeds}

Epoch by epoch, seed {seed} (the exported one):

{log}

![confusion matrix](figures/confusion.png)

![misclassified test images](figures/misclassified.png)

## The network

```
{modules}
```

```
{fields}
```

```
{costs}
```

## The recipe

{recipe}

![augmented images](figures/augmented.png)

## Reproduce

```console
{commands}
```

{versions}
"""


def model_card(retrained: Retrained, record: dict[str, Any]) -> str:
    """Markdown, from the retraining and from what `solution.json` holds."""
    architecture = retrained.candidate.architecture
    return SECTIONS.format(
        title=f"MNIST with {record['n_parameters']:,} parameters",
        verdict="  \n".join(report.verdict_lines(retrained).plain.splitlines()),
        line=record["architecture"],
        accuracy=_accuracy(retrained, record),
        opset=record["onnx"]["opset"],
        chosen=_chosen(retrained, record),
        seeds=_seeds(retrained),
        seed=record["exported_seed"],
        log=_log(retrained),
        modules=report.module_table(architecture).strip(),
        fields=_plain(report.receptive_field_table(architecture)),
        costs=_plain(report.cost_table(architecture)),
        recipe=_recipe(record["recipe"]),
        commands=_commands(retrained, record),
        versions=_versions(record),
    )


def _plain(renderable) -> str:
    console = Console(width=110, color_system=None, record=True, file=_Nowhere())
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _accuracy(retrained: Retrained, record: dict[str, Any]) -> str:
    deviation = retrained.standard_deviation
    spread = "" if deviation is None else f" ± {100 * deviation:.2f} (SD)"
    n = len(retrained.runs)
    return (
        f"Test accuracy after the last epoch: **{100 * retrained.mean:.2f}{spread} %**, n = {n} seed{'s' * (n > 1)}. "
        f"The weights here are those of seed {record['exported_seed']}, the first, not the best: "
        f"{record['test_accuracy']:.2%}."
    )


def _chosen(retrained: Retrained, record: dict[str, Any]) -> str:
    lines = []
    if retrained.trial is None:
        lines.append("The architecture was named by hand; no search chose it.")
    else:
        score = "" if retrained.search_score is None else f", where it reached {retrained.search_score:.2%}"
        lines.append(
            f"Trial {retrained.trial} of study `{record['search']['study_name']}`, a search of "
            f"{record['search']['n_trials']} trained trials on 50,000 training images, scored on the other 10,000{score}."
        )
    c = retrained.confirmation
    if c:
        spread = "" if c["standard_deviation"] is None else f" ± {100 * c['standard_deviation']:.2f}"
        lines.append(
            f"Confirmed on {c['n']} fresh runs ({c['folds']} folds, {c['seeds']} seed each): {100 * c['mean']:.2f}{spread} %. "
            f"The search had been optimistic by {100 * c['optimism']:.2f} points."
        )
    else:
        lines.append("It was not confirmed on fresh folds: the search's score may be partly luck.")
    lines.append(
        "Then it was trained on all 60,000 training images, and only then met the test set, which chose nothing: "
        "neither the network, nor the epoch, nor the seed."
    )
    return " ".join(lines)


def _seeds(retrained: Retrained) -> str:
    rows = ["| seed | last epoch | worse of the last two | seconds |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {run.seed} | {run.accuracy:.2%} | {run.worst_of_last:.2%} | {run.seconds:.0f} |" for run in retrained.runs
    ]
    return "\n".join(rows)


def _log(retrained: Retrained) -> str:
    rows = ["| epoch | training loss | training accuracy | test loss | test accuracy | learning rate | seconds |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    rows += [
        f"| {e.number} | {e.train_loss:.4f} | {e.train_accuracy:.2%} | {e.val_loss:.4f} | {e.val_accuracy:.2%} "
        f"| {e.learning_rate:.2g} | {e.train_seconds + e.val_seconds:.1f} |"
        for e in retrained.runs[0].epochs
    ]
    return "\n".join(rows)


def _recipe(recipe: dict[str, Any]) -> str:
    flat = {**recipe, **recipe["augmentation"]}
    del flat["augmentation"]
    rows = [
        f"| {name.replace('_', ' ')} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for name, value in flat.items()
    ]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _commands(retrained: Retrained, record: dict[str, Any]) -> str:
    n = len(retrained.runs)
    if retrained.trial is None:
        retrain = f"nas-mnist retrain --architecture {shlex.quote(record['architecture'])} --seeds {n}"
        return f"{retrain}\nnas-mnist export"
    confirm = ["nas-mnist confirm"] * (retrained.confirmation is not None)
    search = f"nas-mnist search --trials {record['search']['n_trials']}"
    return "\n".join([search, *confirm, f"nas-mnist retrain --trial {retrained.trial} --seeds {n}", "nas-mnist export"])


def _versions(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    commit = f", commit {record['git_commit'][:10]}" if record["git_commit"] else ""
    return f"Trained on {record['device']} with {versions}{commit}. Everything above is in `solution.json` too."
