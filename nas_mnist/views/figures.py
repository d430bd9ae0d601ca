"""The pictures of a solution, drawn by matplotlib; legible in print."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from nas_mnist.training.loop import EpochResult

SMALLEST_ERROR = 0.01  # %: one test image; none at all has no place on a logarithmic axis


def curves(runs: Sequence[Sequence[EpochResult]], held_out: str, target: float | None = None) -> Figure:
    """Loss and accuracy over the epochs of one run for each seed: the mean over the seeds, and the range between them.

    `held_out` says which images were evaluated after every epoch, test or validation; `target` is drawn as a line.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for prefix, label, colour in (("train", "training, augmented", "C1"), ("eval", held_out, "C0")):
        losses, accuracies = (
            torch.tensor([[getattr(e, f"{prefix}_{kind}") for e in epochs] for epochs in runs])
            for kind in ("loss", "accuracy")
        )
        _draw_range(left, losses, label, colour)
        _draw_range(right, (100 * (1 - accuracies)).clamp(min=SMALLEST_ERROR), label, colour)
    left.set(ylabel="cross-entropy in nats", yscale="log")
    _show_errors_as_accuracy(right)
    if target is not None:
        right.axhline(100 * (1 - target), color="0.4", linestyle="--", linewidth=1, label="the task")
    right.legend(loc="lower right")
    if len(runs) > 1:
        figure.suptitle(f"{len(runs)} seeds: mean and range", fontsize=10)
    return figure


def _draw_range(axes: Axes, values: Tensor, label: str, colour: str) -> None:
    """Values (seeds, epochs): their mean over the seeds, and the band between the lowest and the highest."""
    epochs = range(1, values.shape[1] + 1)
    marker = "o" if len(epochs) == 1 else ""
    axes.plot(epochs, values.mean(0).numpy(), color=colour, label=label, marker=marker)
    axes.fill_between(epochs, values.amin(0).numpy(), values.amax(0).numpy(), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _show_errors_as_accuracy(axes: Axes) -> None:
    """Errors in %, on a logarithmic axis upside down: the first epoch and the last tenths are both legible."""
    axes.set(ylabel="accuracy in %", yscale="log")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(FixedLocator([90, 50, 20, 10, 5, 2, 1, 0.6, 0.4, 0.2, 0.1, 0.05]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda error, _: f"{100 - error:g}")


def confusion(labels: Tensor, predictions: Tensor, classes: tuple[str, ...]) -> Figure:
    """How often each class (rows) was taken for each (columns); the errors are what is coloured."""
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    errors = counts.clone().fill_diagonal_(0)
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(errors.numpy(), cmap="Reds", vmin=0, vmax=max(1, int(errors.max()) * 1.5))
    for row in range(10):
        for column in range(10):
            n = int(counts[row, column])
            if n:
                axes.text(column, row, n, ha="center", va="center", fontsize=9, color="0.45" if row == column else "k")
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(10), classes, rotation=90 if max(map(len, classes)) > 3 else 0)
    axes.set_yticks(range(10), classes)
    axes.set_title(f"{int(errors.sum())} of {len(labels):,} test images wrong", fontsize=10)
    return figure


def gallery(pixels: Tensor, captions: list[str], title: str) -> Figure:
    """Images (N, 28, 28), dark ink on white, each with its caption below; ten in a row, more if there are very many."""
    n_columns = max(10, math.ceil(math.sqrt(len(pixels))))
    n_rows = max(1, math.ceil(len(pixels) / n_columns))
    font_size = 6.5 if any("\n" in caption for caption in captions) else 9
    height, width = 40, 34  # of a cell in pixels of the images: room for the caption and a gap
    sheet = torch.zeros(n_rows * height, n_columns * width)
    figure = Figure(figsize=(0.85 * n_columns, 1.0 * n_rows + 0.4), layout="constrained")
    axes = figure.subplots()
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        top, left = i // n_columns * height, i % n_columns * width + 3
        sheet[top : top + 28, left : left + 28] = image
        axes.text(left + 14, top + 29, caption, ha="center", va="top", fontsize=font_size)
    axes.imshow(sheet.numpy(), cmap="gray_r", interpolation="nearest")
    axes.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure


def mistakes(
    pixels: Tensor, labels: Tensor, predictions: Tensor, shown: Tensor, classes: tuple[str, ...], title: str
) -> Figure:
    """The images (N, 28, 28) at the positions `shown`, each with its true and its predicted class."""
    arrow = " → " if max(map(len, classes)) == 1 else "\n→ "
    captions = [f"{classes[labels[i]]}{arrow}{classes[predictions[i]]}" for i in shown]
    return gallery(pixels[shown], captions, title)


def augmented(originals: Tensor, variants: list[Tensor]) -> Figure:
    """A row for each original (N, 28, 28): itself, then what augmentation made of it (variants of (N, 28, 28))."""
    columns = [originals.float(), *variants]
    figure = Figure(figsize=(0.85 * len(columns), 0.9 * len(originals) + 0.6), layout="constrained")
    cells = figure.subplots(len(originals), len(columns), squeeze=False)
    for row, line in enumerate(cells):
        for column, axes in enumerate(line):
            axes.axis("off")
            axes.imshow(columns[column][row].numpy(), cmap="gray_r", interpolation="nearest")
    cells[0][0].set_title("original", fontsize=9)
    cells[0][1].set_title("augmented", fontsize=9, loc="left")
    return figure
