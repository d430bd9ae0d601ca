"""`solve`: the whole way in one command."""

import contextlib
from pathlib import Path

from nas_mnist.cli.options import (
    add_command,
    add_data_dir,
    add_dataset,
    add_storage,
    add_workers,
    at_least,
    dataset_asked,
    study_asked,
    workers_of,
)
from nas_mnist.data.datasets import MNIST
from nas_mnist.errors import StudyError
from nas_mnist.extras import Extra, require
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS


def add_solve(commands) -> None:
    parser = add_command(
        commands,
        "solve",
        _solve,
        "search, confirm, retrain and export: the whole way; the same command goes on where it stopped",
        example="nas-mnist solve --trials 100 --out solution",
        goes_on=True,
    )
    parser.add_argument("--trials", type=at_least(1), default=100, metavar="N", help="to search (default: %(default)s)")
    parser.add_argument(
        "--max-params",
        type=at_least(1, MAX_PARAMS),
        default=MAX_PARAMS,
        metavar="N",
        help="a network has fewer (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images", type=at_least(2), metavar="N", help="in every stage, for a quick look (default: all)"
    )
    parser.add_argument(
        "--top", type=at_least(1), default=8, metavar="N", help="candidates to confirm (default: %(default)s)"
    )
    parser.add_argument(
        "--folds", type=at_least(2, 100), default=6, metavar="N", help="to confirm on (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=at_least(1, 1000), default=5, metavar="K", help="to retrain with (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("solution"), metavar="DIR", help="the folder to make (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace another study's solution in that folder")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if the task is not fulfilled")
    add_workers(parser)
    add_storage(parser)
    add_dataset(parser)
    add_data_dir(parser)


def _solve(arguments) -> int:
    require(Extra.export)
    from rich.console import Console

    from nas_mnist.solution import solve
    from nas_mnist.views import tables

    if arguments.check and dataset_asked(arguments) != MNIST:
        raise StudyError(f"--check judges the task, which is one of MNIST, not of {arguments.dataset}: leave it out")
    settings, console = _settings(arguments), Console(highlight=False)
    workers = workers_of(arguments)
    retrained, record = solve.solve(settings, workers, lambda stage: _follow(console, stage, workers))
    out = arguments.out
    console.print(tables.retrained_table(retrained), tables.verdict_lines(retrained), sep="\n")
    console.print(
        f"{out}: {record['n_parameters']:,} parameters, {record['test_accuracy']:.2%} of the test set",
        markup=False,
        soft_wrap=True,
    )
    return 1 if arguments.check and not retrained.verdict else 0


def _settings(arguments):
    from nas_mnist.solution.solve import ExportSettings, SolveSettings
    from nas_mnist.stages.confirm import ConfirmSettings
    from nas_mnist.stages.search import SearchSettings

    common = study_asked(arguments)
    return SolveSettings(
        SearchSettings(**common, n_trials=arguments.trials, max_params=arguments.max_params, epochs=arguments.epochs),
        ConfirmSettings(**common, top=arguments.top, n_folds=arguments.folds),
        ExportSettings(arguments.out, arguments.force),
        arguments.seeds,
        arguments.train_images,
    )


@contextlib.contextmanager
def _follow(console, stage, workers):
    """The display of a stage below a line that says which of the four it is; a search is published as `search` does."""
    from nas_mnist.solution.solve import ExportSettings
    from nas_mnist.stages.confirm import ConfirmSettings
    from nas_mnist.stages.retrain import RetrainSettings
    from nas_mnist.stages.search import SearchSettings
    from nas_mnist.views import progress
    from nas_mnist.views.publisher import publishing

    number = [SearchSettings, ConfirmSettings, RetrainSettings, ExportSettings].index(type(stage)) + 1
    console.print(f"stage {number} of 4: ", end="")
    if isinstance(stage, ExportSettings):
        console.print("[bold]exporting, and checking what is exported[/]")
        yield lambda worker, event: None
        return
    with publishing(stage, progress.follow(console, stage, workers)) as show:
        yield show
