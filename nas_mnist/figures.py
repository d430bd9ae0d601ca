"""The pictures of a solution, drawn by matplotlib; legible in print."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from nas_mnist.retrain import Run
from nas_mnist.task import TARGET_ACCURACY


def curves(runs: tuple[Run, ...]) -> Figure:
    """Loss and accuracy over the epochs: the mean over the seeds, and the range between them."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, kind in ((left, "loss"), (right, "accuracy")):
        for prefix, label, colour in (("train", "training, augmented", "C1"), ("val", "test", "C0")):
            values = torch.tensor([[getattr(e, f"{prefix}_{kind}") for e in run.epochs] for run in runs])
            values = 100 * values if kind == "accuracy" else values
            epochs = range(1, values.shape[1] + 1)
            axes.plot(epochs, values.mean(0).numpy(), color=colour, label=label)
            axes.fill_between(epochs, values.amin(0).numpy(), values.amax(0).numpy(), color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    left.set(ylabel="cross-entropy in nats", yscale="log")
    low = min(e.val_accuracy for run in runs for e in run.epochs[1:] or run.epochs)
    right.set(ylabel="accuracy in %", ylim=(max(0, math.floor(100 * low) - 0.5), 100))
    right.axhline(100 * TARGET_ACCURACY, color="0.4", linestyle="--", linewidth=1, label=f"task: {TARGET_ACCURACY:.1%}")
    right.legend(loc="lower right")
    figure.suptitle(f"{len(runs)} seed{'s' * (len(runs) > 1)}: mean and range", fontsize=10)
    return figure


def confusion(labels: Tensor, predictions: Tensor) -> Figure:
    """How often each digit (rows) was taken for each (columns); the errors are what is coloured."""
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
    axes.set(xticks=range(10), yticks=range(10), xlabel="predicted digit", ylabel="true digit")
    axes.set_title(f"{int(errors.sum())} of {len(labels):,} test images wrong", fontsize=10)
    return figure


def gallery(pixels: Tensor, captions: list[str], title: str) -> Figure:
    """Images (N, 28, 28), dark ink on white, each with its caption below; ten in a row, more if there are very many."""
    n_columns = max(10, math.ceil(math.sqrt(len(pixels))))
    n_rows = max(1, math.ceil(len(pixels) / n_columns))
    height, width = 40, 34  # of a cell in pixels of the images: room for the caption and a gap
    sheet = torch.zeros(n_rows * height, n_columns * width)
    figure = Figure(figsize=(0.85 * n_columns, 1.0 * n_rows + 0.4), layout="constrained")
    axes = figure.subplots()
    for i, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        top, left = i // n_columns * height, i % n_columns * width + 3
        sheet[top : top + 28, left : left + 28] = image
        axes.text(left + 14, top + 29, caption, ha="center", va="top", fontsize=9)
    axes.imshow(sheet.numpy(), cmap="gray_r", interpolation="nearest")
    axes.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure


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
