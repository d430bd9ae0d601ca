"""The model card of a solution: what it is, how good, how it was chosen, how to use and to reproduce it."""

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from nas_mnist.data.datasets import MNIST
from nas_mnist.data.folds import n_search_images
from nas_mnist.stages.ablate import Ablated
from nas_mnist.stages.retrain import Retrained
from nas_mnist.study.space import RECIPE
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS
from nas_mnist.training.recipe import Recipe
from nas_mnist.views import tables
from nas_mnist.views.ablation import ablation_rows

SECTIONS = """# {title}

{verdict}

    {line}

{accuracy}

![loss and accuracy](figures/curves.png)

## Use

To draw digits and watch the network, open `demo.html` in a browser; it needs nothing else and loads nothing.

In Python, with torch alone (`model.py` and `weights.safetensors`):

```python
from model import load

logits = load()(images)  # (B, 1, 28, 28) float32, (x / 255 - {mean}) / {std} with the ink bright → (B, 10)
```

From the command line: `python model.py picture.png`. With ONNX (opset {opset}, any batch size):

```python
import onnxruntime

logits = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})[0]
```

{embedded}

## How it was chosen

{chosen}

## Why it is good

{ablation}

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


def model_card(retrained: Retrained, record: dict[str, Any], ablation: Sequence[Ablated] = ()) -> str:
    """Markdown, from the retraining, from what `solution.json` holds, and from an ablation if there is one."""
    architecture = retrained.candidate.architecture
    return SECTIONS.format(
        title=f"{retrained.dataset.title} with {record['n_parameters']:,} parameters",
        verdict="  \n".join(tables.verdict_lines(retrained).plain.splitlines()),
        line=record["architecture"],
        accuracy=_accuracy(retrained, record),
        opset=record["onnx"]["opset"],
        **record["normalisation"],
        embedded=_embedded(record),
        chosen=_chosen(retrained, record),
        ablation=_ablation(ablation),
        seeds=_seeds(retrained),
        seed=record["exported_seed"],
        log=_log(retrained),
        modules=tables.module_table(architecture).strip(),
        fields=_plain(tables.receptive_field_table(architecture)),
        costs=_plain(tables.cost_table(architecture)),
        recipe=_recipe(retrained.candidate.recipe),
        commands=_commands(retrained, record),
        versions=_versions(record),
    )


def _embedded(record: dict[str, Any]) -> str:
    """The int8 network, and what the C takes on two processors."""
    int8, n_images = record["int8"]["test_accuracy"], record["int8"]["n_calibration_images"]
    lost = 100 * (record["test_accuracy"] - int8)
    told = (
        f"`model_int8.onnx` computes in bytes: {int8:.2%} of the test set, {record['test_accuracy']:.2%} in float32 "
        f"(lost: {lost:+.2f} points). It was quantised after the training, calibrated on {n_images:,} training images. "
        "Where an x86 processor has AVX2 and no VNNI, onnxruntime needs `session.x64quantprecision` set to 1 in its "
        "session's options: without, sums overflow there."
    )
    measured = _measured(record["c"], record) if "c" in record else "`nas-mnist export --c` writes it as C, too."
    return f"## On a microcontroller\n\n{told}\n\n{measured}"


def _measured(c: dict[str, Any], record: dict[str, Any]) -> str:
    told = (
        "`c/` has both as C99 without a library and without allocation: `make` there builds an example that reads a "
        "28×28 image and prints the class."
    )
    if not c["boards"]:
        return f"{told} It was not measured on a board, {c['not_measured']}."
    how = (
        "Flash and RAM are the model's own, from the linker's map, without the stack; instructions are the "
        f"mean of {c['n_images']} test images in QEMU, which counts instructions and no cycles."
    )
    return f"{told} {how} {'; '.join(c['tools'])}.\n\n{_boards(c, record)}"


def _boards(c: dict[str, Any], record: dict[str, Any]) -> str:
    accuracy = {"model_int8": record["int8"]["test_accuracy"], "model_float": record["test_accuracy"]}
    sizes = ("flash, bytes", "RAM, bytes", "multiply-adds", "instructions an image")
    rows = [
        (
            b["board"],
            b["function"].removeprefix("model_"),
            *(f"{n:,}" for n in (b["flash"], b["ram"], record["n_macs"], b["instructions"])),
            f"{accuracy[b['function']]:.2%}",
        )
        for b in c["boards"]
    ]
    return tables.markdown_table(("processor", "arithmetic", *sizes, "accuracy"), rows, "l" * 7)


def _plain(renderable) -> str:
    console = Console(width=110, color_system=None, record=True, file=_Nowhere(), force_jupyter=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _accuracy(retrained: Retrained, record: dict[str, Any]) -> str:
    deviation = retrained.standard_deviation
    spread = "" if deviation is None else f"{tables.plus_minus(deviation)} (SD)"
    n = len(retrained.runs)
    lost = f" ({len(retrained.diverged)} more diverged)" if retrained.diverged else ""
    return (
        f"Test accuracy after the last epoch: **{100 * retrained.mean:.2f}{spread} %**, "
        f"n = {n} seed{'s' * (n > 1)}{lost}. "
        f"The weights here are those of seed {record['exported_seed']}, the first, not the best: "
        f"{record['test_accuracy']:.2%}."
    )


def _chosen(retrained: Retrained, record: dict[str, Any]) -> str:
    how = [_named() if retrained.trial is None else _found(retrained, record["search"])]
    how += [_confirmed(retrained.confirmation)] * (retrained.trial is not None)
    n, n_all = retrained.n_train_images, retrained.dataset.n_train_images
    images = f"all {n:,} training images" if n == n_all else f"{n:,} of the {n_all:,} training images, for a quick look"
    how.append(
        f"Then it was trained on {images}, and only then met the test set, which chose nothing: "
        "neither the network, nor the epoch, nor the seed."
    )
    return " ".join(how)


def _named() -> str:
    return "The architecture was named by hand; no search chose it."


def _found(retrained: Retrained, search: dict[str, Any]) -> str:
    score = "" if retrained.search_score is None else f", where it reached {retrained.search_score:.2%}"
    n_split = n_search_images(retrained.dataset)
    n_images = search["identity"].get("train_images", n_split)
    return (
        f"Trial {retrained.trial} of study `{search['study_name']}`, a search of {search['n_trials']} trained trials "
        f"on {n_images:,} training images, scored on {retrained.dataset.n_train_images - n_split:,} others{score}."
    )


def _confirmed(confirmation: dict[str, Any] | None) -> str:
    if confirmation is None:
        return "It was not confirmed on fresh folds: the search's score may be partly luck."
    c = confirmation
    deviation = c["standard_deviation"]
    spread = "" if deviation is None else f"{tables.plus_minus(deviation)} (SD)"
    given_up = ", and then given up" if c["given_up"] else ""
    return (
        f"Confirmed on fresh folds of the training images ({c['folds']} folds, seeds on each: {c['seeds']}{given_up}): "
        f"{100 * c['mean']:.2f}{spread} %, n = {c['n']}. "
        f"Search score less confirmed mean, its optimism: {100 * c['optimism']:+.2f} points."
    )


def _ablation(ablation: Sequence[Ablated]) -> str:
    if not ablation:
        return "Nobody has taken it apart yet: `nas-mnist ablate` does, and the next export tells what came of it."
    header, *rows = ablation_rows(ablation)
    table = tables.markdown_table(header, rows, "l" + "r" * (len(header) - 2) + "l")
    return (
        "One change at a time, each trained beside the network as it is on the same held-out folds and from the same "
        "seeds; differences in percentage points, p of a paired t-test. A change of structure has its widths scaled to "
        f"the same number of parameters.\n\n{table}\n\n![differences in accuracy](figures/ablation.png)"
    )


def _seeds(retrained: Retrained) -> str:
    header = ("seed", "last epoch", "worse of the last two", "seconds")
    rows = [(r.seed, f"{r.accuracy:.2%}", f"{r.worst_of_last:.2%}", f"{r.seconds:.0f}") for r in retrained.runs]
    return tables.markdown_table(header, rows, "llll")


def _log(retrained: Retrained) -> str:
    header = (
        "epoch",
        "training loss",
        "training accuracy",
        "test loss",
        "test accuracy",
        "learning rate",
        "seconds",
    )
    rows = [
        (
            e.number,
            f"{e.train_loss:.4f}",
            f"{e.train_accuracy:.2%}",
            f"{e.eval_loss:.4f}",
            f"{e.eval_accuracy:.2%}",
            f"{e.learning_rate:.2g}",
            f"{e.train_seconds + e.eval_seconds:.1f}",
        )
        for e in retrained.runs[0].epochs
    ]
    return tables.markdown_table(header, rows, "lllllll")


def _recipe(recipe: Recipe) -> str:
    return tables.markdown_table(("", ""), tables.recipe_values(recipe).items(), "ll")


def _commands(retrained: Retrained, record: dict[str, Any]) -> str:
    """What leads from nothing to this folder. A search by several workers draws other trials each time."""
    place = {"study_name": retrained.dataset.study, "dataset": MNIST.name}
    study = _options(record["search"] | {"dataset": record["dataset"]}, place, {"study_name": "study"})
    seeds = f" --seeds {len(retrained.runs) + len(retrained.diverged)}"
    n_all = {"n_train_images": retrained.dataset.n_train_images}
    seeds += _options(record, n_all, {"n_train_images": "train-images"})
    export = f"nas-mnist export{' --c' * ('c' in record)}{study}"
    if retrained.trial is None:
        epochs = _options(record["recipe"], {"epochs": MAX_EPOCHS})
        line = shlex.quote(record["architecture"])
        return f"nas-mnist retrain --architecture {line}{epochs}{seeds}{study}\n{export}"
    n_images = n_search_images(retrained.dataset)
    defaults = {"train_images": n_images, "epochs": MAX_EPOCHS, "max_params": MAX_PARAMS, "optimizer": RECIPE.optimizer}
    defaults |= {"max_macs": None, "max_ram": None}
    searched = f"nas-mnist search --trials {record['search']['n_trials']}"
    commands = [f"{searched}{_options(record['search']['identity'], defaults)}{study}"]
    if retrained.confirmation:
        commands.append(f"nas-mnist confirm{_options(retrained.confirmation, {'folds': 6, 'seeds': 1})}{study}")
    return "\n".join([*commands, f"nas-mnist retrain --trial {retrained.trial}{seeds}{study}", export])


def _options(values: dict[str, Any], defaults: dict[str, Any], names: dict[str, str] | None = None) -> str:
    """The options of a command whose values are not the defaults."""
    given = {name: values[name] for name, default in defaults.items() if values.get(name, default) != default}
    return "".join(
        f" --{(names or {}).get(name, name).replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in given.items()
    )


def _versions(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    commit = f", commit {record['git_commit']}" if record["git_commit"] else ""
    return (
        f"Trained on {record['device']} with {record['runs'][0]['versions']}; exported with {versions}{commit}. "
        "Everything above is in `solution.json` too."
    )
