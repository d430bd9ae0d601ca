"""Figures of a study: what they show of which trials, and what they say when there is nothing to show."""

import json
from itertools import pairwise

import pytest
from synthetic import draw_trial, draw_trials, new_study

from nas_mnist.data.datasets import DATASETS
from nas_mnist.model.zoo import ZOO
from nas_mnist.stages.confirm import Confirmed
from nas_mnist.study.records import is_trained, leaderboard
from nas_mnist.views import study_figures
from nas_mnist.views.study_figures import NothingToDraw


@pytest.fixture(scope="module")
def many():
    return _numbered(draw_trials(300))


def _numbered(trials):
    for number, trial in enumerate(trials):
        trial.number = number
    return trials


def _trace(figure, name):
    (trace,) = [trace for trace in figure.data if trace.name and trace.name.startswith(name)]
    return trace


def test_the_front_has_no_trial_that_another_beats_in_size_and_accuracy(many):
    best = leaderboard(many)
    front = study_figures.pareto_front(best)
    for kept in front:
        size, accuracy = kept.user_attrs["n_parameters"], kept.value
        assert not [t for t in best if t.user_attrs["n_parameters"] <= size and t.value > accuracy]
    assert all(a.user_attrs["n_parameters"] < b.user_attrs["n_parameters"] for a, b in pairwise(front))
    assert max(t.value for t in best) == front[-1].value


def test_published_accuracies_are_named_as_test_accuracies_apart_from_validation(many):
    figure = study_figures.accuracy_against_parameters(many, 8000)
    published = _trace(figure, "published")
    assert "test set" in published.name and "one run" in published.name
    assert list(published.x) == [system.n_parameters for system in ZOO.values()]
    assert all(name in hover for name, hover in zip(ZOO, published.customdata, strict=True))
    trials = _trace(figure, "trials")
    assert "validation" in trials.name and len(trials.x) == sum(study_figures.outcome(t) == "finished" for t in many)


def test_nothing_was_published_of_another_dataset(many):
    names = [t.name for t in study_figures.accuracy_against_parameters(many, 8000, dataset=DATASETS["kmnist"]).data]
    assert len(names) == 2 and not any("published" in name for name in names)


def test_confirmed_means_stand_beside_what_the_search_believed(many):
    confirmed = Confirmed(3, "c8 M c16 G c10k1-", 2000, 0.995, (0.992, 0.993, 0.994), 3, 1, given_up=False)
    trace = _trace(study_figures.accuracy_against_parameters(many, 8000, [confirmed]), "confirmed")
    assert list(trace.x) == [2000] and trace.y[0] == pytest.approx(0.7)
    assert "99.30% ± 0.10 (n = 3)" in trace.customdata[0]


def test_accuracy_axes_are_labelled_with_accuracies_of_the_errors(many):
    axis = study_figures.optimisation_history(many).layout.yaxis
    assert axis.type == "log" and axis.range[0] > axis.range[1]
    assert len(axis.tickvals) >= 4
    assert [float(text) for text in axis.ticktext] == [pytest.approx(100 - error) for error in axis.tickvals]


@pytest.mark.parametrize("errors", [[0.5, 0.9], [0.4, 90.0], [0.01, 100.0], [0.47, 0.48], [60.0, 62.0]])
def test_accuracy_axes_have_ticks_that_stand_apart(errors):
    figure = study_figures._show_errors_as_accuracy(study_figures._figure("", ""), errors)
    assert 1 <= len(figure.layout.yaxis.tickvals) <= 15


def test_the_history_shows_the_best_so_far(many):
    best = _trace(study_figures.optimisation_history(many), "best so far")
    assert all(a >= b for a, b in pairwise(best.y))
    assert best.y[-1] == pytest.approx(
        100 * (1 - max(t.value for t in many if t.value and study_figures.outcome(t) == "finished"))
    )
    assert best.x[-1] == 299


def test_the_best_ten_curves_are_highlighted_and_every_other_is_there(many):
    figure = study_figures.learning_curves(many)
    n_curves = {trace.name: list(trace.x).count(None) for trace in figure.data}
    assert n_curves["the best"] == 1 and n_curves["the next 9"] == 9
    assert sum(n_curves.values()) == sum(bool(t.intermediate_values) for t in many)
    best = leaderboard(many)[0]
    assert list(_trace(figure, "the best").y)[:15] == [
        pytest.approx(100 * (1 - value)) for value in best.intermediate_values.values()
    ]


def test_epochs_spent_stay_below_what_full_training_would_cost(many):
    full, spent = study_figures.epochs_spent(many, 15).data
    trained = [t for t in many if is_trained(t)]
    assert spent.y[-1] == sum(len(t.intermediate_values) for t in trained)
    assert full.y[-1] == 15 * len(trained)
    assert f"{full.y[-1] - spent.y[-1]:,} saved" in spent.customdata[-1]


def test_candidates_over_the_budget_show_by_how_much(many):
    over = _trace(study_figures.parameters_drawn(many, 8000), "over budget")
    assert len(over.y) > 5 and all(size >= 8000 for size in over.y)
    assert all(f"{size - 7999:,} too many" in hover for size, hover in zip(over.y, over.customdata, strict=True))
    assert f"{len(over.y)} of {sum('n_parameters' in t.user_attrs for t in many)}" in over.name


def test_importance_is_a_share_for_each_of_the_first_parameters(many):
    bar = study_figures.parameter_importance(new_study(many)).data[0]
    assert len(bar.x) == study_figures.N_IMPORTANT and list(bar.x) == sorted(bar.x) and 0 < sum(bar.x) <= 1


def test_importance_is_not_drawn_from_too_few_trials():
    study = new_study(draw_trials(12))
    with pytest.raises(NothingToDraw, match=r"^4 trials were trained to the end; with fewer than 20 .*\.$"):
        study_figures.parameter_importance(study)


def test_the_timeline_has_a_row_for_each_worker_and_a_bar_for_each_trial(many):
    figure = study_figures.timeline(many)
    assert len(figure.layout.yaxis.categoryarray) == 4
    assert sum(len(trace.y) for trace in figure.data) == 300
    finished = _trace(figure, "finished")
    assert finished.x[0] == pytest.approx(1000 * 60 * 15 / 16)


NO_TRIALS = {
    "accuracy": lambda trials: study_figures.accuracy_against_parameters(trials, 8000),
    "history": study_figures.optimisation_history,
    "curves": study_figures.learning_curves,
    "epochs": lambda trials: study_figures.epochs_spent(trials, 15),
    "drawn": lambda trials: study_figures.parameters_drawn(trials, 8000),
    "timeline": study_figures.timeline,
}


@pytest.mark.parametrize("name", NO_TRIALS)
def test_an_empty_study_gets_a_sentence_instead_of_a_figure(name):
    with pytest.raises(NothingToDraw, match=r"^[A-Z].*\.$"):
        NO_TRIALS[name]([])


@pytest.mark.parametrize("outcome", [*study_figures.OUTCOMES, "finished"])
@pytest.mark.parametrize("name", NO_TRIALS)
def test_a_single_trial_of_any_outcome_is_a_figure_or_a_sentence(name, outcome):
    try:
        figure = NO_TRIALS[name](_numbered([draw_trial(0, outcome)]))
    except NothingToDraw as reason:
        assert str(reason).endswith(".")
    else:
        assert len(figure.data) > 0 and len(json.loads(figure.to_json())["data"]) > 0


def test_text_from_the_database_is_no_markup_in_a_figure():
    trial = draw_trial(0)
    trial.number = 0
    trial.set_user_attr("architecture", '<a href="https://x">c8</a></script>')
    for draw in NO_TRIALS.values():
        try:
            assert "<a" not in draw([trial]).to_json() and "</script" not in draw([trial]).to_json()
        except NothingToDraw:
            continue
