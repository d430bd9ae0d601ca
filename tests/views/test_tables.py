"""What is drawn says what was computed."""

import io
import json
from dataclasses import replace

import pytest
import torchinfo
from PIL import Image
from rich.console import Console

from nas_mnist.errors import NasMnistError
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.model.zoo import ZOO
from nas_mnist.stages.baselines import OWN_TRAINING, RECIPE, BaselineResult, BaselineRun, Training
from nas_mnist.stages.confirm import Confirmed
from nas_mnist.training.loop import Recipe
from nas_mnist.training.lr_finder import RateCurve
from nas_mnist.views import tables

ARCHITECTURE = ZOO["eva6s4-medium"].architecture
CURVE = RateCurve(
    tuple(10 ** (e / 10) for e in range(-40, 1)),
    tuple(2.0 - e / 40 for e in range(41)),
    tuple(2.0 - e / 40 for e in range(41)),
    steepest=0.01,
    minimum=0.5,
)


def printed(*renderables, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(*renderables, sep="\n", crop=False, highlight=False)
    return console.file.getvalue()


def run(seed, *accuracies):
    return BaselineRun(seed, accuracies, 60.0, "cpu", "torch")


def test_description_has_a_row_for_each_layer_in_both_tables_and_fits_80_columns():
    text = printed(tables.receptive_field_table(ARCHITECTURE), tables.cost_table(ARCHITECTURE))
    rows = [line.split() for line in text.splitlines()]
    for number, shape in enumerate(ARCHITECTURE.shapes, 1):
        numbers = [shape.kernel, shape.stride, shape.padding, shape.in_side, shape.side]
        channels = [str(shape.in_channels), "→", str(shape.channels)]
        numbers = [*numbers, shape.jump, shape.receptive_field]
        assert [str(number), str(shape.layer), *channels, *map(str, numbers)] in rows
    costs = [row for row in rows if row[:2] == ["10", "c16"]][1]
    assert costs[2:4] == ["2,336", "30.6%"] and costs[5:7] == ["20,736", "2.2%"]
    assert "…" not in text and ["total", "7,632", "950,304"] in rows


def test_shares_of_the_parameters_add_up_to_all_of_them():
    rows = [line.split() for line in printed(tables.cost_table(ARCHITECTURE)).splitlines()]
    shares = [float(row[3].rstrip("%")) for row in rows if len(row) > 4 and row[0].isdigit()]
    assert sum(shares) == pytest.approx(100, abs=0.3)


@pytest.mark.parametrize("name", ZOO)
def test_torchinfo_counts_the_parameters_of_every_reference_system(name):
    table = tables.module_table(ZOO[name].architecture)
    assert f"Total params: {ZOO[name].n_parameters:,}\n" in table and "Units." not in table


def test_torchinfo_prints_the_published_multiply_adds_of_era1a7():
    summary = torchinfo.summary(build(ZOO["era1a7"].architecture, seed=0), (128, 1, 28, 28), verbose=0)
    assert summary.total_mult_adds == 128 * (798_072 + 448) == 102_210_560


@pytest.mark.parametrize(("n", "verdict"), [(7_999, "✓ 7,999 parameters: fewer"), (8_000, "✗ 8,000 parameters: not")])
def test_budget_is_met_by_strictly_fewer_parameters(n, verdict):
    assert tables.budget_line(n, 8_000).plain.startswith(verdict)
    assert tables.description_values(ARCHITECTURE, n, 8_000)["within_budget"] is (n < 8_000)


def test_description_in_json_has_every_layer():
    values = json.loads(json.dumps(tables.description_values(ARCHITECTURE, 7_632, 8_000)))
    assert [layer["layer"] for layer in values["layers"]] == ARCHITECTURE.line.split()
    assert sum(layer["n_parameters"] for layer in values["layers"]) == values["n_parameters"] == 7_632
    assert parse(values["architecture"]) == ARCHITECTURE


def test_terminal_plot_has_the_decades_and_stays_within_its_width():
    text = tables.rate_curve_plot(CURVE, 70).plain
    for rate in ("0.0001", "0.001", "0.01", "0.1"):
        assert rate in text.splitlines()[-2]
    assert max(map(len, text.splitlines())) <= 70


def test_figure_is_an_image_and_nothing_else_is_left(tmp_path):
    tables.save_figure(tables.rate_curve_figure(CURVE, "title"), tmp_path / "lr.png")
    with Image.open(tmp_path / "lr.png") as image:
        assert image.size == (1200, 675)
    assert [path.name for path in tmp_path.iterdir()] == ["lr.png"]


@pytest.mark.parametrize("name", ["lr.txt", "lr", "nowhere/lr.png"])
def test_figure_that_cannot_be_written_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(NasMnistError, match=r"another (name|one)") as error:
        tables.check_figure_path(tmp_path / name)
    assert error.value.settings == ("out",)


COMMON = Training(RECIPE)


def test_baselines_table_fits_80_columns_and_marks_best_epochs_and_diverged_runs():
    several = BaselineResult(ZOO["era1a7"], COMMON, (run(0, 0.9, 0.9950, 0.9940), run(1, 0.9, 0.9930, 0.9960)), 0)
    one = BaselineResult(ZOO["eva6s4-ultrasmall"], COMMON, (run(0, 0.985),), 1)
    none = BaselineResult(ZOO["lite-m1"], OWN_TRAINING["lite-m1"], (), 2)
    text = printed(tables.baselines_table([several, one, none]))
    rows = [line.split() for line in text.splitlines()[2:]]
    assert rows[0] == ["era1a7", "4,392", "99.46%", "99.50%", "0.14", "2", "99.30%", "+0.04", "60"]
    assert rows[1] == ["eva6s4-ultrasmall", "4,464", "99.00%*", "98.50%", "1+1†", "98.50%", "-0.50", "60"]
    assert rows[2] == ["lite-m1", "(own)", "6,590", "98.95%*", "0+2†"]
    assert "…" not in text


@pytest.mark.parametrize(("optimizer", "has_one"), [("sgd", True), ("adamw", False), ("soap", False)])
def test_only_sgd_has_a_momentum(optimizer, has_one):
    values = tables.recipe_values(Recipe(optimizer=optimizer))
    assert values["optimizer"] == optimizer and ("momentum" in values) == has_one


def test_note_states_the_recipe():
    text = tables.baselines_note(replace(RECIPE, epochs=7), 60_000).plain
    for part in ("7 epochs of 60,000 images", "learning rate of 0.1", "batches of 128", "weight decay 0.0005", "±10°"):
        assert part in text


def test_note_tells_of_each_system_with_a_recipe_of_its_own():
    own = [BaselineResult(ZOO[name], training, (), 0) for name, training in OWN_TRAINING.items()]
    text = tables.baselines_note(RECIPE, 60_000, own=own).plain
    for part in ("(own) era1a7: SGD", "rate of 1,", "(own) lite-m1:", "no augmentation; He's initialisation"):
        assert part in text


def confirmed(trial, *accuracies):
    return Confirmed(trial, "x", 1, 0.99, accuracies, len(accuracies), 1, False)


@pytest.mark.parametrize(
    ("others", "p_value", "line"),
    [
        ([], None, "one candidate: nothing to compare it with"),
        ([confirmed(2, 0.98, 0.99)], None, "trials 1 and 2 are equal on every fold and seed"),
        ([confirmed(2, 0.97, 0.99)], 0.5, "trial 1 is not certainly ahead of trial 2: +0.500 points, p = 0.50"),
        ([confirmed(2, 0.97, 0.99)], 0.01, "trial 1 is ahead of trial 2: +0.500 points, p = 0.01"),
        ([confirmed(2, 0.97)], 0.01, "trial 1 is ahead of trial 2: +1.000 points, p = 0.01"),
    ],
)
def test_lead_is_called_certain_only_below_the_level(others, p_value, line):
    assert tables.lead_line([confirmed(1, 0.98, 0.99), *others], p_value, 0.05).plain.startswith(line)


def test_bar_in_a_cell_does_not_end_it():
    table = tables.markdown_table(("a", "b"), [("`c8 | hardswish`", r"`c8 \| dropout=0.1`")], "ll")
    assert table.splitlines()[-1] == r"| `c8 \| hardswish` | `c8 \| dropout=0.1` |"
