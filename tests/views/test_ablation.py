import io
from dataclasses import replace

import pytest
from rich.console import Console
from synthetic import ablate_trial, draw_trial

from nas_mnist.stages.ablate import Ablated, Change, Difference, Outcome, ladder
from nas_mnist.views.ablation import ablation_figure, ablation_note, ablation_rows, ablation_table, networks_table


@pytest.fixture(scope="module")
def rows():
    return ablate_trial(draw_trial(0))


def climbed() -> list[Ablated]:
    made = [Ablated(row, (Outcome(0.03, 0.98), Outcome(0.03, 0.981)), 0, None) for row in ladder("step-by-step", 15)]
    difference = Difference(2, 0.004, 0.0005, -0.01, 0.001, 0.03)
    return [made[0], *(replace(row, difference=difference) for row in made[1:])]


def test_table_has_a_line_for_each_row_and_colours_what_is_significant(rows):
    table = ablation_table(rows)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["as it is", "no augmentation", rows[2].change.name]
    assert cells[3] == ["4", "4", "1 (3 diverged)"]
    assert cells[4] == ["", "-0.210 ± 0.040", "+0.030"] and cells[5] == ["", "0.012", ""]
    assert [row.style for row in table.rows] == ["", "red", ""]
    assert "of 2 comparisons" in ablation_note(rows).plain


def test_no_number_is_cut_on_a_narrow_terminal(rows):
    console = Console(width=80, file=io.StringIO())
    console.print(ablation_table(rows), ablation_table(climbed(), climbing=True))
    text = console.file.getvalue()
    assert "…" not in text and "-0.210 ± 0.040" in text and "+0.400 ± 0.050" in text


def test_ladder_tells_what_was_published_and_compares_with_the_row_before():
    table = ablation_table(climbed(), climbing=True)
    assert [str(cell) for cell in table.columns[2].cells] == ["98.82%", "99.43%", "99.53%"]
    assert "the row before" in ablation_note(climbed(), climbing=True).plain
    assert [row.style for row in table.rows] == ["", "green", "green"]


def test_networks_are_told_where_they_are_others(rows):
    assert list(networks_table(rows).columns[0].cells) == ["as it is"]  # the other two rows change the training
    assert len(networks_table(climbed(), climbing=True).rows) == 2


def test_rows_of_text_are_those_of_the_table(rows):
    header, *body = ablation_rows(rows)
    assert all(len(row) == len(header) for row in body) and body[1][0] == "no augmentation"


@pytest.mark.parametrize("climbing", [False, True])
def test_figure_has_a_place_for_each_row(rows, climbing):
    shown = climbed() if climbing else rows
    axes = ablation_figure(shown, climbing=climbing).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [row.change.name for row in shown if climbing or row.difference]


def test_row_that_was_not_trained_is_no_point_of_the_figure(rows):
    untrained = Ablated(Change("nothing", rows[0].change.candidate), (), 0, None)
    assert len(ablation_figure([*rows, untrained]).axes[0].get_yticklabels()) == 2
