"""`search`: look for networks under one budget."""

import argparse
import contextlib

from nas_mnist.cli.options import (
    OPTIMIZERS,
    add_command,
    add_data_dir,
    add_dataset,
    add_storage,
    add_workers,
    at_least,
    place_of,
    study_asked,
    workers_of,
)
from nas_mnist.errors import DeviceError
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS


def add_search(commands) -> None:
    parser = add_command(
        commands,
        "search",
        _search,
        "search for the best network; the same command goes on where it stopped",
        example="nas-mnist search --trials 100",
        goes_on=True,
    )
    parser.add_argument(
        "--trials",
        type=at_least(1),
        default=100,
        metavar="N",
        help="trained trials the study shall have (default: 100)",
    )
    parser.add_argument(
        "--max-params",
        type=at_least(1),
        default=MAX_PARAMS,
        metavar="N",
        help="a network has fewer (default: %(default)s)",
    )
    parser.add_argument("--max-macs", type=at_least(1), metavar="N", help="multiply-adds of one image, at most")
    parser.add_argument(
        "--max-ram", type=at_least(1), metavar="BYTES", help="of maps alive at once in int8, at most; see describe"
    )
    parser.add_argument(
        "--epochs", type=at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a trial (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images",
        type=at_least(2),
        metavar="N",
        help="fewer for a quick run (default: all of the split, 50,000 of MNIST)",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap", help="(default: %(default)s)")
    parser.add_argument(
        "--sampler",
        choices=("evolution", "tpe", "random"),
        default="evolution",
        help="what proposes candidates; the others are there to be compared with (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of the sampler and the trials (default: %(default)s)"
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
        type=at_least(0),
        default=5,
        metavar="K",
        help="keep weights and pictures of the best K candidates (default: %(default)s)",
    )
    add_workers(parser)
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="place the workers on this Ray cluster; auto: the one of this machine"
    )
    add_storage(parser)
    add_dataset(parser)
    add_data_dir(parser)
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print the summary alone")
    volume.add_argument("--verbose", action="store_true", help="print every epoch")


def _search(arguments) -> int:
    from rich.console import Console

    from nas_mnist.model.architecture import Limits
    from nas_mnist.stages import search
    from nas_mnist.views import progress
    from nas_mnist.views.publisher import publishing

    settings = search.SearchSettings(
        **study_asked(arguments),
        n_trials=arguments.trials,
        max_params=arguments.max_params,
        limits=Limits(arguments.max_macs, arguments.max_ram),
        epochs=arguments.epochs,
        optimizer=arguments.optimizer,
        sampler=arguments.sampler,
        seed=arguments.seed,
        prune=arguments.prune,
        warm_start=arguments.warm_start,
        keep_weights=arguments.keep_weights,
    )
    console = Console()
    with _placed(arguments, settings.storage) as (workers, run):
        display = progress.SearchDisplay(console, settings, workers, quiet=arguments.quiet, verbose=arguments.verbose)
        with publishing(settings, display) as on_event:
            summary = search.search(settings, workers, on_event, run)
    progress.print_summary(console, settings, summary)
    console.print(f"\n{_next_steps(arguments)}", highlight=False, soft_wrap=True)
    return 0


@contextlib.contextmanager
def _placed(arguments, storage):
    """The workers, on this machine or on a Ray cluster, and what runs them."""
    if arguments.ray is None:
        from nas_mnist.workers.local import run_workers

        yield workers_of(arguments), run_workers
        return
    if arguments.devices:
        raise DeviceError(
            "--devices names those of this machine; with --ray the cluster chooses: leave one of them out"
        )
    try:
        from nas_mnist.workers import ray_cluster
    except ModuleNotFoundError:
        raise DeviceError("Ray is not installed: pip install 'nas-mnist[ray]'") from None
    with ray_cluster.connected(arguments.ray, storage):
        yield ray_cluster.plan_workers(arguments.workers), ray_cluster.run_workers


def _next_steps(arguments) -> str:
    place = place_of(arguments)
    return f"next: nas-mnist show{place}\n      nas-mnist dashboard{place}\n      nas-mnist confirm{place}"
