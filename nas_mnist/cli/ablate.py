"""`ablate`: why a network is good, one change at a time; and the steps by which people came to theirs."""

import json
from pathlib import Path

from nas_mnist.cli.options import (
    add_architecture,
    add_command,
    add_data_dir,
    add_dataset,
    add_json,
    add_storage,
    add_workers,
    at_least,
    data_dir_of,
    dataset_of,
    storage_of,
    workers_of,
)
from nas_mnist.task import MAX_EPOCHS


def add_ablate(commands) -> None:
    parser = add_command(
        commands,
        "ablate",
        _ablate,
        "change one thing of a network at a time, train each change in pairs on fresh folds, and compare",
        example="nas-mnist ablate --trial 33 --folds 4 --out ablation.png",
        goes_on=True,
    )
    add_architecture(parser, nargs="?")
    parser.add_argument(
        "--trial", type=at_least(0), metavar="N", help="a trial of the search instead (default: the confirmed winner)"
    )
    parser.add_argument("--solution", type=Path, metavar="DIR", help="the network of an exported folder instead")
    parser.add_argument(
        "--ladder",
        metavar="NAME",
        help="the published steps to eva-drilldown or step-by-step instead, each with the next",
    )
    parser.add_argument(
        "--folds", type=at_least(2, 100), default=6, metavar="N", help="of the training images (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=at_least(1, 100), default=1, metavar="K", help="runs on each fold (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=at_least(1, 1000), metavar="N", help="of a run of a named network or a ladder (default: 15)"
    )
    parser.add_argument(
        "--train-images", type=at_least(2), metavar="N", help="of each fold, for a quick look (default: all)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it into this PNG, SVG or PDF file")
    add_json(parser)
    add_workers(parser)
    add_storage(parser)
    add_dataset(parser, "that of the study")
    add_data_dir(parser)


def _ablate(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import ablate
    from nas_mnist.views import ablation, progress, tables

    storage = storage_of(arguments)
    climbing = arguments.ladder is not None
    settings = ablate.AblateSettings(
        storage=storage,
        rows=_rows(arguments, storage),
        climbing=climbing,
        study_name=arguments.study,
        n_folds=arguments.folds,
        n_seeds=arguments.seeds,
        train_images=arguments.train_images,
        data_dir=data_dir_of(arguments),
        dataset=dataset_of(storage, arguments.study, arguments),
    )
    if arguments.out:
        tables.check_figure_path(arguments.out)
    workers = workers_of(arguments)
    with progress.RunDisplay(Console(stderr=arguments.json)) as on_event:
        rows = ablate.ablate(settings, workers, on_event)
    if arguments.out:
        tables.save_figure(ablation.ablation_figure(rows, climbing=climbing), arguments.out)
    if arguments.json:
        print(json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False))
        return 0
    Console(highlight=False).print(
        ablation.ablation_table(rows, climbing=climbing),
        ablation.ablation_note(rows, climbing=climbing),
        "",
        ablation.networks_table(rows, climbing=climbing),
        sep="\n",
        crop=False,
    )
    return 0


def _rows(arguments, storage):
    """What is to be trained. Raises `ArchitectureError` if networks are named in two ways."""
    from nas_mnist.errors import ArchitectureError, StudyError
    from nas_mnist.model import zoo
    from nas_mnist.solution import predict
    from nas_mnist.stages import ablate, retrain
    from nas_mnist.study.space import Candidate, reference_recipe

    ways = (arguments.architecture, arguments.trial, arguments.solution, arguments.ladder)
    if sum(way is not None for way in ways) > 1:
        raise ArchitectureError(
            "ablate takes one network: give a name, a line in quotes, --trial N, --solution DIR, or --ladder NAME"
        )
    if arguments.epochs and not (arguments.architecture or arguments.ladder):
        raise StudyError("a trial or a solution has a recipe of its own: leave out --epochs")
    epochs = arguments.epochs or MAX_EPOCHS
    if arguments.ladder:
        return ablate.ladder(arguments.ladder, epochs)
    if arguments.solution:
        return ablate.changes(predict.candidate(arguments.solution))
    if arguments.architecture:
        architecture = zoo.resolve(arguments.architecture)
        recipe = reference_recipe(epochs=epochs, size=architecture.n_parameters)
        return ablate.changes(Candidate(architecture, recipe))
    return ablate.changes(retrain.choose(storage, arguments.study, arguments.trial).candidate)
