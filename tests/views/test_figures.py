import numpy as np
import pytest
import torch

from nas_mnist.data.datasets import DATASETS, MNIST
from nas_mnist.training.loop import EpochResult
from nas_mnist.views import figures


def made(accuracies):
    return [EpochResult(i, 0.5 / i, a - 0.1, 0.2 / i, a, 0.1, 1.0, 1.0) for i, a in enumerate(accuracies, 1)]


def test_every_point_of_the_curves_is_within_the_axes_and_epochs_are_whole():
    figure = figures.curves([made([0.3, 0.98, 0.995]), made([0.5, 0.99, 1.0])], "test", target=0.994)
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        for line in axes.lines:
            assert all(low <= y <= high for y in line.get_ydata())
        assert all(float(x).is_integer() for x in axes.get_xticks())
    right = figure.axes[1]
    labels = {text.get_text() for text in right.get_yticklabels()}
    assert {"99.4", "99", "90"} <= labels
    top, bottom = right.transData.transform([(1, 0.1), (1, 10)])[:, 1]
    assert top > bottom  # the better the higher


def test_single_epoch_of_a_single_seed_is_still_to_be_seen():
    assert all(line.get_marker() == "o" for line in figures.curves([made([0.5])], "validation").axes[0].lines)


def test_confusion_counts_rows_as_true_and_columns_as_predicted():
    labels, predictions = torch.tensor([4, 4, 4, 9]), torch.tensor([4, 9, 9, 9])
    axes = figures.confusion(labels, predictions, MNIST.classes).axes[0]
    texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
    assert texts == {(4, 4): "1", (9, 4): "2", (9, 9): "1"}
    assert "2 of 4 test images wrong" in axes.get_title()


def test_confusion_names_the_classes():
    labels = torch.arange(10)
    axes = figures.confusion(labels, labels, DATASETS["fashion-mnist"].classes).axes[0]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert tuple(text.get_text() for text in ticks) == DATASETS["fashion-mnist"].classes


def test_target_is_drawn_only_where_there_is_one():
    runs = [made([0.5, 0.9])]
    without = len(figures.curves(runs, "test").axes[1].lines)
    assert len(figures.curves(runs, "test", target=0.994).axes[1].lines) == without + 1


@pytest.mark.parametrize("n", [0, 1, 10, 60])
def test_gallery_shows_every_image_with_its_caption(n):
    axes = figures.gallery(torch.full((n, 28, 28), 255), [str(i) for i in range(n)], "x").axes[0]
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(n)]
    assert int(np.asarray(axes.images[0].get_array()).sum()) == n * 28 * 28 * 255


def test_thousands_of_errors_share_one_image_so_that_they_are_drawn_in_seconds(tmp_path):
    """Axes are what takes time: 1,500 of them take minutes."""
    figure = figures.gallery(torch.zeros(1500, 28, 28), ["1 → 7"] * 1500, "x")
    (axes,) = figure.axes
    assert len(axes.images) == 1 and len(axes.texts) == 1500
    figure.savefig(tmp_path / "x.png", dpi=150)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert figure.get_size_inches() == pytest.approx((0.85 * 39, 39.4))  # as many columns as rows
