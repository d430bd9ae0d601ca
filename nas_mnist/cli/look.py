"""`show`, `dashboard` and `report`: look at a study."""

import json
import sys
from pathlib import Path

from nas_mnist.cli.options import (
    add_command,
    add_data_dir,
    add_json,
    add_storage,
    at_least,
    data_dir_of,
    host_address,
    storage_of,
)
from nas_mnist.extras import Extra, require


def add_show(commands) -> None:
    parser = add_command(commands, "show", _show, "print the leaderboard of a study", example="nas-mnist show --top 20")
    parser.add_argument("--top", type=at_least(1), default=10, metavar="N", help="candidates (default: %(default)s)")
    add_json(parser)
    add_storage(parser)


def _show(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import search
    from nas_mnist.study import studies
    from nas_mnist.study.records import TrialCounts, leaderboard
    from nas_mnist.views import progress

    study = studies.load(storage_of(arguments, read_only=True).open(), arguments.study)
    trials = study.get_trials(deepcopy=False)
    best = leaderboard(trials)[: arguments.top]
    if arguments.json:
        print(json.dumps([search.leaderboard_entry(trial) for trial in best], indent=2))
        return 0
    counts = TrialCounts.of(trials)
    console = Console()
    console.print(progress.leaderboard_table(best) if best else "no candidate has been trained to the end yet")
    console.print(
        f"[dim]{counts.trained} trained, {counts.pruned} of them pruned early, {counts.over_budget} over budget, "
        f"{counts.failed} failed, {counts.running} running",
        highlight=False,
    )
    return 0


def add_dashboard(commands) -> None:
    parser = add_command(
        commands,
        "dashboard",
        _dashboard,
        "look at the studies in a browser, with optuna-dashboard",
        example="nas-mnist dashboard --open",
    )
    parser.add_argument(
        "--host", type=host_address, default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("--port", type=at_least(1, 65535), default=8080, help="(default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    add_storage(parser)
    add_data_dir(parser)


def _dashboard(arguments) -> int:
    from nas_mnist.views import dashboard

    if Extra.report.missing:
        print(f"nas-mnist: without the plots of a study, which plotly draws: {Extra.report.pip_line}", file=sys.stderr)
    storage = storage_of(arguments)
    dashboard.serve(storage, arguments.host, arguments.port, data_dir_of(arguments), open_browser=arguments.open)
    return 0


def add_report(commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        "write a study as one HTML page: figures, best candidates, settings",
        example="nas-mnist report --out report",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="the folder to write index.html into (default: %(default)s)",
    )
    add_storage(parser)


def _report(arguments) -> int:
    require(Extra.report)
    from nas_mnist.views import report

    path = report.write(storage_of(arguments, read_only=True), arguments.study, arguments.out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file that any browser opens without a network")
    return 0
