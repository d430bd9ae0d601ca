"""`frontier`: look for networks under several budgets."""

import json
from pathlib import Path

from nas_mnist.cli.options import (
    add_command,
    add_data_dir,
    add_dataset,
    add_json,
    add_storage,
    add_workers,
    at_least,
    names,
    study_asked,
    workers_of,
)
from nas_mnist.task import MAX_EPOCHS

BUDGETS = {  # of `frontier`, for what they can be of; of RAM, the sizes that processors come in
    "params": (500, 1000, 2000, 4000, 8000),
    "macs": (100_000, 200_000, 400_000, 800_000, 1_600_000),
    "ram": (4096, 8192, 16_384, 32_768),
}


def add_frontier(commands) -> None:
    parser = add_command(
        commands,
        "frontier",
        _frontier,
        "search and confirm under several budgets, and draw accuracy against size",
        example="nas-mnist frontier --budgets 1000,2000 --out frontier.png",
        goes_on=True,
    )
    parser.add_argument(
        "--budgets",
        type=_budgets,
        metavar="N[,N…]",
        help="a network has fewer parameters, or at most so much of what --over names (default: "
        + "; ".join(f"{over} {','.join(map(str, budgets))}" for over, budgets in BUDGETS.items())
        + ")",
    )
    parser.add_argument(
        "--over",
        choices=tuple(BUDGETS),
        default="params",
        help="budgets of parameters, or at most so many multiply-adds or bytes of RAM in int8 (default: %(default)s)",
    )
    parser.add_argument(
        "--trials", type=at_least(1), default=100, metavar="N", help="trained trials for each (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a trial (default: %(default)s)"
    )
    parser.add_argument("--train-images", type=at_least(2), metavar="N", help="for a quick look (default: all)")
    parser.add_argument(
        "--top", type=at_least(1), default=4, metavar="N", help="candidates to confirm of each (default: %(default)s)"
    )
    parser.add_argument(
        "--folds", type=at_least(2, 100), default=6, metavar="N", help="to confirm on (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it into this PNG, SVG or PDF file")
    add_json(parser)
    add_workers(parser)
    add_storage(parser)
    add_dataset(parser)
    add_data_dir(parser)


def _budgets(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(1), names(text)))


def _frontier(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import confirm, frontier, search
    from nas_mnist.views import progress, tables
    from nas_mnist.views.publisher import publishing

    if arguments.out:
        tables.check_figure_path(arguments.out)
    common = study_asked(arguments)
    settings = frontier.FrontierSettings(
        search.SearchSettings(**common, n_trials=arguments.trials, epochs=arguments.epochs),
        confirm.ConfirmSettings(**common, top=arguments.top, n_folds=arguments.folds),
        arguments.budgets or BUDGETS[arguments.over],
        arguments.over,
    )
    workers = workers_of(arguments)
    console = Console(stderr=arguments.json, highlight=False)
    points = frontier.frontier(
        settings, workers, lambda stage: publishing(stage, progress.follow(console, stage, workers))
    )
    if arguments.out:
        tables.save_figure(tables.frontier_figure(points, settings.search.dataset), arguments.out)
    if arguments.json:
        print(json.dumps(tables.frontier_values(points), indent=2, ensure_ascii=False))
        return 0
    console.print(tables.frontier_table(points, settings.search.dataset), crop=False)
    return 0
