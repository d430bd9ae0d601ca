from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest

from nas_mnist.data.datasets import DATASETS
from nas_mnist.errors import BudgetError, DataError
from nas_mnist.model.architecture import parse
from nas_mnist.stages import frontier
from nas_mnist.stages.confirm import Confirmed, ConfirmSettings
from nas_mnist.stages.frontier import Best, FrontierSettings
from nas_mnist.stages.search import SearchSettings
from nas_mnist.study import space, studies
from nas_mnist.study.storage import Storage
from nas_mnist.views import tables
from nas_mnist.workers.events import Worker


@pytest.fixture
def settings(tmp_path, data_dir):
    common = {"storage": Storage.parse(str(tmp_path / "s.db")), "train_images": 300, "data_dir": data_dir}
    return FrontierSettings(
        SearchSettings(**common, n_trials=1, epochs=1),
        ConfirmSettings(**common, top=1, n_folds=2),
        budgets=(400, 200),
    )


def made(budget, n_parameters, *accuracies, name="s"):
    return Best(budget, name, Confirmed(3, "G c10k1-", n_parameters, 0.9, accuracies, 2, 1, given_up=False))


def test_every_budget_is_searched_and_confirmed_and_nothing_twice(settings):
    stages = []

    @contextmanager
    def follow(stage):
        stages.append((type(stage).__name__, stage.study_name))
        yield lambda worker, event: events.append(event)

    events = []
    points = frontier.frontier(settings, [Worker(0, "cpu")], follow)
    names = ["nas-mnist-400", "nas-mnist-200"]
    assert stages == [(kind, name) for name in names for kind in ("SearchSettings", "ConfirmSettings")]
    assert [point.budget for point in points] == [200, 400]
    assert all(point.confirmed.n_parameters < point.budget and len(point.confirmed.accuracies) == 2 for point in points)
    assert points[1].confirmed.mean >= points[0].confirmed.mean
    n_trained = {name: studies.count_trained(settings.search.storage.open(), name) for name in names}
    assert frontier.frontier(settings, [Worker(0, "cpu")], follow) == points
    assert {name: studies.count_trained(settings.search.storage.open(), name) for name in names} == n_trained


def test_the_best_of_a_budget_are_tried_under_the_next_smaller(settings):
    settings = replace(settings, search=replace(settings.search, warm_start=False), budgets=(1000, 2000))
    frontier.frontier(settings, [Worker(0, "cpu")], lambda stage: nullcontext(lambda worker, event: None))
    opened = settings.search.storage.open()
    large, small = (studies.load(opened, name).get_trials()[0] for name in ("nas-mnist-2000", "nas-mnist-1000"))
    recipe = space.reference_recipe(size=1000)
    assert small.params == large.params | {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    assert small.user_attrs["reference"] == "trial 0 of study nas-mnist-2000"
    assert small.user_attrs["n_parameters"] < 1000 <= large.user_attrs["n_parameters"] < 2000


@pytest.mark.parametrize(
    ("over", "key", "budgets"), [("macs", "n_macs", (400_000, 200_000)), ("ram", "ram", (8192, 4096))]
)
def test_budgets_can_be_of_multiply_adds_or_of_ram(over, key, budgets, settings):
    settings = replace(settings, search=replace(settings.search, warm_start=False), budgets=budgets, over=over)
    points = frontier.frontier(settings, [Worker(0, "cpu")], lambda stage: nullcontext(lambda worker, event: None))
    assert [point.budget for point in points] == sorted(budgets)
    for point, values in zip(points, tables.frontier_values(points), strict=True):
        architecture = parse(point.confirmed.architecture)
        assert {"macs": architecture.n_macs, "ram": architecture.ram}[over] == point.size <= point.budget
        assert (values[f"max_{over}"], values[key]) == (point.budget, point.size)
    small, large = (studies.identity_of(settings.search.storage, f"nas-mnist-{over}-{n}") for n in sorted(budgets))
    assert (small[f"max_{over}"], large[f"max_{over}"]) == tuple(sorted(budgets))
    assert small["max_params"] == large["max_params"] == 8000
    trial = studies.load(settings.search.storage.open(), f"nas-mnist-{over}-{min(budgets)}").get_trials()[0]
    assert (
        trial.user_attrs["reference"] == f"trial {points[1].confirmed.trial} of study nas-mnist-{over}-{max(budgets)}"
    )
    headers = [column.header for column in tables.frontier_table(points).columns]
    assert headers[0] == "at most" and over in headers and "published, test" not in headers
    axes = tables.frontier_figure(points).axes[0]
    assert axes.get_xlabel() == frontier.SIZES[over] and len(axes.get_legend_handles_labels()[1]) == 1


def test_study_of_one_of_the_budgets_is_reused(settings):
    opened = settings.search.storage.open(create=True)
    identity = {"max_params": 400}
    studies.create(opened, "nas-mnist", metric="accuracy", attributes={"identity": identity})
    assert [s.study_name for s in settings.searches()] == ["nas-mnist-200", "nas-mnist"]


def test_small_network_also_competes_under_a_larger_budget():
    small, large = made(500, 450, 0.98, 0.99), made(1000, 900, 0.97, 0.98)
    assert frontier.best_under(1000, [small, large]) == replace(small, budget=1000)
    assert frontier.best_under(500, [small, large]) == small
    assert frontier.best_under(450, [small, large]) is None


def test_budget_that_cannot_be_met_is_refused_before_anything_is_written(settings):
    with pytest.raises(BudgetError, match="fewer than 20 parameters"):
        frontier.frontier(replace(settings, budgets=(400, 20)), [Worker(0, "cpu")], None)
    assert not settings.search.storage.path.exists()


@pytest.mark.parametrize(("over", "what"), [("macs", "multiply-adds"), ("ram", "bytes of RAM")])
def test_smallest_reachable_is_named_where_a_budget_of_it_cannot_be_met(over, what, settings):
    smallest = space.smallest(lambda a: {"macs": a.n_macs, "ram": a.ram}[over])
    settings = replace(settings, budgets=(50_000, smallest - 1), over=over)
    with pytest.raises(BudgetError, match=rf"{smallest - 1:,} {what} cannot be met; .* takes {smallest:,}:"):
        frontier.frontier(settings, [Worker(0, "cpu")], None)
    assert not settings.search.storage.path.exists()


def test_images_that_a_fold_has_not_are_refused_before_anything_is_written(settings):
    common = {"train_images": 40_000}  # enough for the search, and not for one of two folds
    settings = replace(settings, search=replace(settings.search, **common), confirm=replace(settings.confirm, **common))
    with pytest.raises(DataError, match="2 to 30,000 training images to choose from, not 40,000"):
        frontier.frontier(settings, [Worker(0, "cpu")], None)
    assert not settings.search.storage.path.exists()


@pytest.mark.parametrize(("budget", "published"), [(697, []), (698, ["99.03"]), (4000, ["99.52"]), (7500, ["99.53"])])
def test_best_published_network_is_below_the_budget(budget, published):
    assert [f"{100 * mark.accuracy:.2f}" for mark in tables.best_published(budget)] == published


def test_what_was_published_of_mnist_is_not_held_against_another_dataset():
    points = [made(500, 450, 0.98, 0.99), made(1000, 900, 0.97, 0.98)]
    columns = [column.header for column in tables.frontier_table(points, DATASETS["kmnist"]).columns]
    assert "published, test" not in columns
    labels = tables.frontier_figure(points, DATASETS["kmnist"]).axes[0].get_legend_handles_labels()[1]
    assert labels == ["confirmed on fresh folds, mean ± SD"]
    assert len(tables.frontier_figure(points).axes[0].get_legend_handles_labels()[1]) == 3
