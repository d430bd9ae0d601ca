"""The command line: each command parses, calls one library function, and prints.

A domain error becomes one line on stderr and exit code 2. Only the standard library is imported at the top, so that
`--help` answers at once: torch and Optuna take seconds.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import sys
import warnings
from pathlib import Path

from nas_mnist.data.datasets import DATASETS, MNIST
from nas_mnist.errors import DeviceError, NasMnistError, explain, shown
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS
from nas_mnist.workers.signals import stopped_once

DEFAULT_STORAGE = "studies/nas_mnist.db"
OPTIMIZERS = ("soap", "sgd", "adamw")
MAX_NAME = 200  # characters; other studies add to it, and a database keeps 512


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {shown(message)}: see `{self.prog} --help`\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a verdict of no, 2 for bad input, 130 when stopped by Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name, or a terminal, that is not of this encoding
    arguments = build_parser().parse_args(argv)
    if "study" in arguments and arguments.study is None:
        arguments.study = _default_study(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # Optuna's notes on experimental functions
    with stopped_once(for_good=True):
        try:
            return arguments.run(arguments) or 0
        except KeyboardInterrupt:
            _say_stopped(argv, arguments.goes_on)
            return 130
        except BrokenPipeError:  # `nas-mnist show | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            return _say_error(error)


def _say_stopped(argv: list[str], goes_on: bool) -> None:
    how = f"; what was finished is kept. To go on:\n  {shown(shlex.join(['nas-mnist', *argv]))}" if goes_on else ""
    print(f"nas-mnist: stopped{how}", file=sys.stderr)


def _say_error(error: Exception) -> int:
    """One line about what the user or the machine did; anything else is a bug, and raised again."""
    message = str(error) if isinstance(error, NasMnistError) else explain(error)
    if message is None:
        raise error
    for note in getattr(error, "__notes__", ()):  # a worker's traceback
        print(*map(shown, note.splitlines()), sep="\n", file=sys.stderr)
    print(f"nas-mnist: {shown(message)}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nas-mnist", description="Search for the best tiny convolutional network on MNIST.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from importlib.metadata import version

        print(f"nas-mnist {version('nas-mnist')}")
        parser.exit()


def _command(commands, name: str, run, help: str, *, goes_on: bool = False) -> argparse.ArgumentParser:
    """A new command. If it was stopped and `goes_on`, giving it once more does what is left."""
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(run=run, goes_on=goes_on)
    return parser


def _add_storage(parser) -> None:
    parser.add_argument(
        "--storage", default=DEFAULT_STORAGE, metavar="URL", help="SQLite file or SQLAlchemy URL (default: %(default)s)"
    )
    parser.add_argument(
        "--study",
        type=_name,
        metavar="NAME",
        help=f"name of the study (default: {MNIST.study}, or nas- and another dataset)",
    )


def _add_data_dir(parser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the images are unpacked (default: $NAS_MNIST_DATA, or a cache folder)",
    )


def _add_dataset(parser, default: str = MNIST.name) -> None:
    parser.add_argument("--dataset", choices=DATASETS, help=f"{', '.join(DATASETS)} (default: {default})")


def _add_workers(parser) -> None:
    parser.add_argument(
        "--workers", type=_at_least(1), metavar="N", help="processes (default: one for each CPU core, several to a GPU)"
    )
    parser.add_argument(
        "--devices", type=_names, metavar="D[,D…]", help="cpu, cuda:0, … (default: every GPU, or the CPU)"
    )


def _add_json(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _at_least(low: int, high: int = 10**9):
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if not low <= value <= high:
            limits = f"at least {low}" if high == 10**9 else f"{low} to {high:,}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {value:,}")
        return value

    return integer


def _name(text: str) -> str:
    if not (text.strip() and text.isprintable() and len(text) <= MAX_NAME):
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_NAME} characters that can be printed, not {text[:40]!r}")
    return text


def _host(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must be an address, such as 127.0.0.1; an empty one would mean all")
    return text


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be one or several, with commas between them, not {text!r}")
    return names


def _storage(arguments):
    from nas_mnist.study.storage import Storage

    return Storage.parse(arguments.storage)


def _data_dir(arguments) -> Path:
    from nas_mnist.data.unpacking import default_data_dir

    return arguments.data_dir or default_data_dir()


def _dataset(arguments):
    return DATASETS[arguments.dataset or MNIST.name]


def _dataset_of(storage, study_name: str, arguments):
    """That of the study; the option can only repeat it."""
    from nas_mnist.study import shared as study

    return study.dataset_of(storage, study_name, DATASETS.get(arguments.dataset))


# --- search ----------------------------------------------------------------------------------------------------------


def _add_search(commands) -> None:
    parser = _command(
        commands,
        "search",
        _search,
        "search for the best network; the same command goes on where it stopped",
        goes_on=True,
    )
    parser.add_argument(
        "--trials",
        type=_at_least(1),
        default=100,
        metavar="N",
        help="trained trials the study shall have (default: 100)",
    )
    parser.add_argument(
        "--max-params",
        type=_at_least(1),
        default=MAX_PARAMS,
        metavar="N",
        help="a network has fewer (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=_at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a trial (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images",
        type=_at_least(2),
        metavar="N",
        help="fewer for a quick run (default: all of the split, 50,000 of MNIST)",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap", help="(default: %(default)s)")
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="of the sampler and the trials (default: %(default)s)"
    )
    parser.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="stop trials that cannot win (default: yes)",
    )
    parser.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="begin with the reference systems (default: yes)",
    )
    parser.add_argument(
        "--keep-weights",
        type=_at_least(0),
        default=5,
        metavar="K",
        help="keep weights and pictures of the best K candidates (default: %(default)s)",
    )
    _add_workers(parser)
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="place the workers on this Ray cluster; auto: the one of this machine"
    )
    _add_storage(parser)
    _add_dataset(parser)
    _add_data_dir(parser)
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print the summary alone")
    volume.add_argument("--verbose", action="store_true", help="print every epoch")


def _search(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import search
    from nas_mnist.views import progress as display
    from nas_mnist.views.publisher import Publisher

    settings = search.SearchSettings(
        storage=_storage(arguments),
        study_name=arguments.study,
        n_trials=arguments.trials,
        max_params=arguments.max_params,
        epochs=arguments.epochs,
        train_images=arguments.train_images,
        data_dir=_data_dir(arguments),
        optimizer=arguments.optimizer,
        seed=arguments.seed,
        prune=arguments.prune,
        dataset=_dataset(arguments),
        warm_start=arguments.warm_start,
        keep_weights=arguments.keep_weights,
    )
    console = Console()
    publisher = Publisher(settings.storage, settings.study_name, settings.data_dir)
    with (
        _placed(arguments, settings.storage) as (workers, run),
        display.SearchDisplay(console, settings, workers, quiet=arguments.quiet, verbose=arguments.verbose) as show,
    ):
        summary = search.search(settings, workers, _to_both(show, publisher), run)
    publisher.publish()
    display.print_summary(console, settings, summary)
    console.print(f"\n{_next_steps(arguments)}", highlight=False, soft_wrap=True)
    return 0


def _to_both(first, second):
    """One consumer of events that hands each to two."""

    def both(worker, event) -> None:
        first(worker, event)
        second(worker, event)

    return both


@contextlib.contextmanager
def _placed(arguments, storage):
    """The workers, on this machine or on a Ray cluster, and what runs them."""
    if arguments.ray is None:
        from nas_mnist.workers.local import plan_workers, run_workers

        yield plan_workers(arguments.workers, arguments.devices), run_workers
        return
    if arguments.devices:
        raise DeviceError(
            "--devices names those of this machine; with --ray the cluster chooses: leave one of them out"
        )
    try:
        from nas_mnist.workers import ray_cluster as ray_workers
    except ModuleNotFoundError:
        raise DeviceError("Ray is not installed: pip install 'nas-mnist[ray]'") from None
    with ray_workers.connected(arguments.ray, storage):
        yield ray_workers.plan_workers(arguments.workers), ray_workers.run_workers


def _next_steps(arguments) -> str:
    place = _place(arguments)
    return f"next: nas-mnist show{place}\n      nas-mnist dashboard{place}\n      nas-mnist confirm{place}"


def _place(arguments) -> str:
    """The options that the next command needs to find this study."""
    place = "" if arguments.storage == DEFAULT_STORAGE else f" --storage {shown(shlex.quote(arguments.storage))}"
    return place + ("" if arguments.study == MNIST.study else f" --study {shlex.quote(arguments.study)}")


def _default_study(arguments) -> str:
    """One of its own for each dataset, for results of two cannot be in one study."""
    name = DATASETS[getattr(arguments, "dataset", None) or MNIST.name].study
    return f"{name}-baselines" if arguments.command == "baselines" else name


# --- show ------------------------------------------------------------------------------------------------------------


def _add_show(commands) -> None:
    parser = _command(commands, "show", _show, "print the leaderboard of a study")
    parser.add_argument("--top", type=_at_least(1), default=10, metavar="N", help="candidates (default: %(default)s)")
    _add_json(parser)
    _add_storage(parser)


def _show(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import search
    from nas_mnist.study import shared as study
    from nas_mnist.views import progress as display

    found = study.load(_storage(arguments).open(), arguments.study)
    trials = found.get_trials(deepcopy=False)
    best = search.leaderboard(trials)[: arguments.top]
    if arguments.json:
        print(json.dumps([search.leaderboard_entry(trial) for trial in best], indent=2))
        return 0
    progress = study.progress(trials)
    console = Console()
    console.print(display.leaderboard_table(best) if best else "no candidate has been trained to the end yet")
    console.print(
        f"[dim]{progress.trained} trained, {progress.pruned} of them pruned early, {progress.over_budget} over budget, "
        f"{progress.failed} failed, {progress.running} running",
        highlight=False,
    )
    return 0


# --- dashboard -------------------------------------------------------------------------------------------------------


def _add_dashboard(commands) -> None:
    parser = _command(commands, "dashboard", _dashboard, "look at the studies in a browser, with optuna-dashboard")
    parser.add_argument("--host", type=_host, default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_at_least(1, 65535), default=8080, help="(default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    _add_storage(parser)
    _add_data_dir(parser)


def _dashboard(arguments) -> int:
    from nas_mnist.views import dashboard

    storage = _storage(arguments)
    dashboard.serve(storage, arguments.host, arguments.port, _data_dir(arguments), open_browser=arguments.open)
    return 0


# --- report ----------------------------------------------------------------------------------------------------------


def _add_report(commands) -> None:
    parser = _command(commands, "report", _report, "write a study as one HTML page: figures, best candidates, settings")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="the folder to write index.html into (default: %(default)s)",
    )
    _add_storage(parser)


def _report(arguments) -> int:
    from nas_mnist.views import report as study_report

    path = study_report.write(_storage(arguments), arguments.study, arguments.out)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, one file that any browser opens without a network")
    return 0


# --- describe --------------------------------------------------------------------------------------------------------


def _add_architecture(parser, **options) -> None:
    parser.add_argument(
        "architecture",
        metavar="NAME|NOTATION",
        help='a reference system, or a line such as "c8 M c16 G c10k1-"',
        **options,
    )


def _add_describe(commands) -> None:
    parser = _command(commands, "describe", _describe, "print layers, receptive fields and costs of a network")
    _add_architecture(parser, nargs="?")
    parser.add_argument("--trial", type=_at_least(0), metavar="N", help="the network of this trial of the study")
    parser.add_argument(
        "--max-params",
        type=_at_least(1),
        default=MAX_PARAMS,
        metavar="N",
        help="the budget: a network has fewer (default: %(default)s)",
    )
    _add_json(parser)
    _add_storage(parser)


def _describe(arguments) -> int:
    from rich.console import Console

    from nas_mnist.model import zoo
    from nas_mnist.model.network import count_parameters
    from nas_mnist.views import tables as report

    architecture = _described_architecture(arguments)
    n_parameters = count_parameters(architecture)
    verdict = 0 if n_parameters < arguments.max_params else 1
    if arguments.json:
        values = report.description_values(architecture, n_parameters, arguments.max_params)
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return verdict
    console = Console(highlight=False)
    console.print(report.description(architecture, n_parameters, arguments.max_params), crop=False)
    if arguments.architecture in zoo.ZOO:
        console.print(report.published_lines(zoo.ZOO[arguments.architecture]))
    return verdict


def _described_architecture(arguments):
    from nas_mnist.errors import ArchitectureError
    from nas_mnist.model import zoo

    if (arguments.architecture is None) == (arguments.trial is None):
        raise ArchitectureError("describe takes one network: give a name, a notation line in quotes, or --trial N")
    if arguments.trial is None:
        return zoo.resolve(arguments.architecture)
    from nas_mnist.study import shared as study

    found = study.load(_storage(arguments).open(), arguments.study)
    return zoo.resolve(study.find_trial(found, arguments.trial).user_attrs["architecture"])


# --- find-lr ---------------------------------------------------------------------------------------------------------


def _add_find_lr(commands) -> None:
    parser = _command(commands, "find-lr", _find_lr, "raise the learning rate until the loss explodes, and draw it")
    _add_architecture(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it into this PNG, SVG or PDF file")
    parser.add_argument(
        "--from", dest="lowest", type=float, default=1e-5, metavar="RATE", help="first rate (default: %(default)s)"
    )
    parser.add_argument(
        "--to", dest="highest", type=float, default=10.0, metavar="RATE", help="last rate (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=_at_least(1), default=300, metavar="N", help="batches, one for each rate (default: %(default)s)"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, … (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="of weights and batches (default: %(default)s)"
    )
    _add_json(parser)
    _add_dataset(parser)
    _add_data_dir(parser)


def _find_lr(arguments) -> int:
    from rich.console import Console
    from rich.progress import track

    from nas_mnist.data import images as data
    from nas_mnist.data.folds import search_split
    from nas_mnist.data.unpacking import prepare
    from nas_mnist.model import zoo
    from nas_mnist.study import space
    from nas_mnist.training import lr_finder
    from nas_mnist.views import tables as report
    from nas_mnist.workers.local import plan_workers

    architecture = zoo.resolve(arguments.architecture)
    rates = lr_finder.RateRange(arguments.lowest, arguments.highest, arguments.steps)
    if arguments.out:
        report.check_figure_path(arguments.out)
    plan_workers(1, [arguments.device])
    prepare(_data_dir(arguments), _dataset(arguments))
    images = search_split(data.load_train(_data_dir(arguments), _dataset(arguments))).train
    recipe = space.reference_recipe(arguments.optimizer)
    steps = lr_finder.range_test(architecture, recipe, images, rates, seed=arguments.seed, device=arguments.device)
    progress = Console(stderr=True)
    curve = lr_finder.fit(
        track(
            steps,
            "trying rates",
            total=rates.n_steps,
            console=progress,
            transient=True,
            disable=not progress.is_terminal,
        )
    )
    if arguments.out:
        report.save_figure(report.rate_curve_figure(curve, str(architecture)), arguments.out)
    if arguments.json:
        print(json.dumps(report.rate_curve_values(curve), indent=2))
        return 0
    console = Console(highlight=False)
    console.print(report.rate_curve_plot(curve, min(console.width, 100)))
    console.print(report.rate_curve_lines(curve))
    return 0


# --- baselines -------------------------------------------------------------------------------------------------------


def _add_baselines(commands) -> None:
    parser = _command(
        commands,
        "baselines",
        _baselines,
        "train the reference systems with one recipe on all images, and compare with what was published",
        goes_on=True,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="reference systems (default: all ten)")
    parser.add_argument(
        "--seeds", type=_at_least(1, 1000), default=1, metavar="K", help="runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=_at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images",
        type=_at_least(2),
        metavar="N",
        help="fewer for a quick look, in another --study (default: all)",
    )
    _add_json(parser)
    _add_workers(parser)
    _add_storage(parser)
    _add_dataset(parser)
    _add_data_dir(parser)


def _baselines(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import baselines
    from nas_mnist.views import progress as display
    from nas_mnist.views import tables as report
    from nas_mnist.workers.local import plan_workers

    settings = baselines.BaselineSettings(
        storage=_storage(arguments),
        study_name=arguments.study,
        names=tuple(arguments.names) or tuple(baselines.ZOO),
        n_seeds=arguments.seeds,
        epochs=arguments.epochs,
        train_images=arguments.train_images,
        data_dir=_data_dir(arguments),
        dataset=_dataset(arguments),
    )
    workers = plan_workers(arguments.workers, arguments.devices)
    with display.JobDisplay(Console(stderr=arguments.json)) as show:
        results = baselines.train_baselines(settings, workers, show)
    if arguments.json:
        print(json.dumps([report.baseline_values(result) for result in results], indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    console.print(
        report.baselines_table(results, settings.dataset),
        report.baselines_note(settings.recipe, settings.n_train_images, settings.dataset),
        sep="\n",
        crop=False,
    )
    return 0


# --- confirm ---------------------------------------------------------------------------------------------------------


def _add_confirm(commands) -> None:
    parser = _command(
        commands,
        "confirm",
        _confirm,
        "train the best candidates again on fresh folds and seeds, and rank them",
        goes_on=True,
    )
    parser.add_argument(
        "--top", type=_at_least(1), default=8, metavar="N", help="candidates of the search (default: %(default)s)"
    )
    parser.add_argument(
        "--folds", type=_at_least(2, 100), default=6, metavar="N", help="of the training images (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=_at_least(1, 100), default=1, metavar="K", help="runs on each fold (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images", type=_at_least(2), metavar="N", help="of each fold, for a quick look (default: all)"
    )
    _add_json(parser)
    _add_workers(parser)
    _add_storage(parser)
    _add_dataset(parser, "that of the study")
    _add_data_dir(parser)


def _confirm(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import confirm
    from nas_mnist.views import progress as display
    from nas_mnist.views import tables as report
    from nas_mnist.workers.local import plan_workers

    storage = _storage(arguments)
    settings = confirm.ConfirmSettings(
        storage=storage,
        study_name=arguments.study,
        top=arguments.top,
        n_folds=arguments.folds,
        n_seeds=arguments.seeds,
        train_images=arguments.train_images,
        data_dir=_data_dir(arguments),
        dataset=_dataset_of(storage, arguments.study, arguments),
    )
    workers = plan_workers(arguments.workers, arguments.devices)
    with display.JobDisplay(Console(stderr=arguments.json)) as show:
        ranking = confirm.confirm(settings, workers, show)
    if arguments.json:
        print(json.dumps([confirmed.to_dict() for confirmed in ranking], indent=2))
        return 0
    p_value = confirm.lead(*ranking[:2]) if len(ranking) > 1 else None
    Console(highlight=False).print(
        report.confirmation_table(ranking),
        report.lead_line(ranking, p_value, confirm.SIGNIFICANT_P),
        sep="\n",
        crop=False,
    )
    print(f"next: nas-mnist retrain{_place(arguments)}")
    return 0


# --- frontier --------------------------------------------------------------------------------------------------------


def _add_frontier(commands) -> None:
    parser = _command(
        commands,
        "frontier",
        _frontier,
        "search and confirm under several budgets, and draw accuracy against size",
        goes_on=True,
    )
    parser.add_argument(
        "--budgets",
        type=_budgets,
        default=(500, 1000, 2000, 4000, 8000),
        metavar="N[,N…]",
        help="a network has fewer parameters (default: 500,1000,2000,4000,8000)",
    )
    parser.add_argument(
        "--trials", type=_at_least(1), default=100, metavar="N", help="trained trials for each (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=_at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a trial (default: %(default)s)"
    )
    parser.add_argument("--train-images", type=_at_least(2), metavar="N", help="for a quick look (default: all)")
    parser.add_argument(
        "--top", type=_at_least(1), default=4, metavar="N", help="candidates to confirm of each (default: %(default)s)"
    )
    parser.add_argument(
        "--folds", type=_at_least(2, 100), default=6, metavar="N", help="to confirm on (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it into this PNG, SVG or PDF file")
    _add_json(parser)
    _add_workers(parser)
    _add_storage(parser)
    _add_dataset(parser)
    _add_data_dir(parser)


def _budgets(text: str) -> tuple[int, ...]:
    return tuple(map(_at_least(1), _names(text)))


def _frontier(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import confirm, frontier, search
    from nas_mnist.views import progress as display
    from nas_mnist.views import tables as report
    from nas_mnist.workers.local import plan_workers

    if arguments.out:
        report.check_figure_path(arguments.out)
    common = {
        "storage": _storage(arguments),
        "study_name": arguments.study,
        "train_images": arguments.train_images,
        "data_dir": _data_dir(arguments),
        "dataset": _dataset(arguments),
    }
    settings = frontier.FrontierSettings(
        search.SearchSettings(**common, n_trials=arguments.trials, epochs=arguments.epochs),
        confirm.ConfirmSettings(**common, top=arguments.top, n_folds=arguments.folds),
        arguments.budgets,
    )
    workers = plan_workers(arguments.workers, arguments.devices)
    console = Console(stderr=arguments.json, highlight=False)
    points = frontier.frontier(settings, workers, lambda stage: display.follow(console, stage, workers))
    if arguments.out:
        report.save_figure(report.frontier_figure(points, settings.search.dataset), arguments.out)
    if arguments.json:
        print(json.dumps(report.frontier_values(points), indent=2, ensure_ascii=False))
        return 0
    console.print(report.frontier_table(points, settings.search.dataset), crop=False)
    return 0


# --- retrain ---------------------------------------------------------------------------------------------------------


def _add_retrain(commands) -> None:
    parser = _command(
        commands,
        "retrain",
        _retrain,
        "train the confirmed winner on all training images, and meet the test set",
        goes_on=True,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--trial", type=_at_least(0), metavar="N", help="this trial of the search instead")
    which.add_argument(
        "--architecture", metavar="NAME|NOTATION", help="this network instead, with a warm start's recipe"
    )
    parser.add_argument("--seeds", type=_at_least(1, 1000), default=5, metavar="K", help="runs (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=_at_least(1, 1000), metavar="N", help="of a run with --architecture (default: 15)"
    )
    parser.add_argument("--train-images", type=_at_least(2), metavar="N", help="for a quick look (default: all)")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if the task is not fulfilled")
    _add_json(parser)
    _add_workers(parser)
    _add_storage(parser)
    _add_dataset(parser, "that of the study")
    _add_data_dir(parser)


def _retrain(arguments) -> int:
    from rich.console import Console

    from nas_mnist.errors import StudyError
    from nas_mnist.stages import retrain
    from nas_mnist.views import progress as display
    from nas_mnist.views import tables as report
    from nas_mnist.workers.local import plan_workers

    storage = _storage(arguments)
    settings = retrain.RetrainSettings(
        storage=storage,
        chosen=_chosen(arguments, storage),
        study_name=arguments.study,
        n_seeds=arguments.seeds,
        train_images=arguments.train_images,
        data_dir=_data_dir(arguments),
        dataset=_dataset_of(storage, arguments.study, arguments),
    )
    if arguments.check and settings.dataset != MNIST:
        raise StudyError(
            f"--check judges the task, which is one of MNIST, not of {settings.dataset.name}: leave it out"
        )
    workers = plan_workers(arguments.workers, arguments.devices)
    with display.JobDisplay(Console(stderr=arguments.json)) as show:
        retrained = retrain.retrain(settings, workers, show)
    if arguments.json:
        print(json.dumps(report.retrained_values(retrained), indent=2, ensure_ascii=False))
    else:
        Console(highlight=False).print(report.retrained_table(retrained), report.verdict_lines(retrained), sep="\n")
        print(f"next: nas-mnist export{_place(arguments)}")
    return 1 if arguments.check and not retrained.verdict else 0


def _chosen(arguments, storage):
    from nas_mnist.errors import StudyError
    from nas_mnist.model import zoo
    from nas_mnist.stages import retrain
    from nas_mnist.study.space import Candidate, reference_recipe

    if arguments.architecture is None:
        if arguments.epochs:
            raise StudyError("a trial is retrained with its own recipe: leave out --epochs, or give --architecture")
        return retrain.choose(storage, arguments.study, arguments.trial)
    recipe = reference_recipe(epochs=arguments.epochs or MAX_EPOCHS)
    return retrain.Chosen(Candidate(zoo.resolve(arguments.architecture), recipe))


# --- export, predict, evaluate, demo ---------------------------------------------------------------------------------


def _add_export(commands) -> None:
    parser = _command(commands, "export", _export, "write the retrained winner as a folder that anyone can use")
    parser.add_argument(
        "--out", type=Path, default=Path("solution"), metavar="DIR", help="the folder to make (default: %(default)s)"
    )
    parser.add_argument("--trial", type=_at_least(0), metavar="N", help="this trial, once it has been retrained")
    parser.add_argument("--force", action="store_true", help="replace an earlier solution in that folder")
    _add_storage(parser)
    _add_dataset(parser, "that of the study")
    _add_data_dir(parser)


def _export(arguments) -> int:
    from nas_mnist.solution import export
    from nas_mnist.stages import retrain

    storage = _storage(arguments)
    chosen = None if arguments.trial is None else retrain.choose(storage, arguments.study, arguments.trial)
    retrained = retrain.load(storage, arguments.study, chosen)
    _dataset_of(storage, f"{arguments.study}-retrain", arguments)
    source = export.Source.find(storage, arguments.study)
    record = export.export(retrained, source, _data_dir(arguments), arguments.out, force=arguments.force)
    print(f"{arguments.out}: {record['n_parameters']:,} parameters, {record['test_accuracy']:.2%} of the test set")
    folder = shlex.quote(str(arguments.out))
    print(f"next: nas-mnist predict {folder} IMAGE\n      nas-mnist demo {folder}")
    return 0


def _add_predict(commands) -> None:
    parser = _command(commands, "predict", _predict, "say what pictures show")
    parser.add_argument("solution", type=Path, metavar="FOLDER", help="that `nas-mnist export` wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG or JPEG, dark on light or light on dark")
    _add_json(parser)


def _predict(arguments) -> int:
    from dataclasses import asdict

    from nas_mnist.solution import predict

    predictions = list(predict.predict(predict.load(arguments.solution), arguments.images))
    for prediction in predictions:
        if prediction.error:
            print(shown(f"{prediction.path}: {prediction.error}"), file=sys.stderr)
        elif not arguments.json:
            print(shown(f"{prediction.path}: {prediction.label} ({prediction.confidence:.1%})"))
    if arguments.json:
        print(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
    return 2 if any(prediction.error for prediction in predictions) else 0


def _add_evaluate(commands) -> None:
    parser = _command(commands, "evaluate", _evaluate, "print the test accuracy of an exported folder")
    parser.add_argument("solution", type=Path, metavar="FOLDER", help="that `nas-mnist export` wrote")
    _add_json(parser)
    _add_data_dir(parser)


def _evaluate(arguments) -> int:
    from nas_mnist.solution import predict

    accuracy = predict.accuracy_on_test_set(arguments.solution, _data_dir(arguments))
    print(json.dumps({"test_accuracy": accuracy}) if arguments.json else f"{accuracy:.2%} of the test set")
    return 0


def _add_demo(commands) -> None:
    parser = _command(commands, "demo", _demo, "draw digits in a browser, with an exported folder")
    parser.add_argument(
        "solution",
        type=Path,
        nargs="?",
        default=Path("solution"),
        metavar="FOLDER",
        help="that `nas-mnist export` wrote (default: %(default)s)",
    )


def _demo(arguments) -> int:
    from nas_mnist.solution import demo

    path, opened = demo.open_page(arguments.solution)
    print(path if opened else f"{path}\nno browser was found here: open this file in one")
    return 0


COMMANDS = (
    _add_search,
    _add_show,
    _add_dashboard,
    _add_report,
    _add_confirm,
    _add_frontier,
    _add_retrain,
    _add_baselines,
    _add_describe,
    _add_find_lr,
    _add_export,
    _add_predict,
    _add_evaluate,
    _add_demo,
)
