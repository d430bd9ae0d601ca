"""`confirm` and `retrain`: train the chosen again, on fresh folds and on all images."""

import json

from nas_mnist.cli.options import (
    add_command,
    add_data_dir,
    add_dataset,
    add_json,
    add_storage,
    add_workers,
    at_least,
    data_dir_of,
    dataset_of,
    place_of,
    storage_of,
    workers_of,
)
from nas_mnist.data.datasets import MNIST
from nas_mnist.task import MAX_EPOCHS


def add_confirm(commands) -> None:
    parser = add_command(
        commands,
        "confirm",
        _confirm,
        "train the best candidates again on fresh folds and seeds, and rank them",
        example="nas-mnist confirm --top 8",
        goes_on=True,
    )
    parser.add_argument(
        "--top", type=at_least(1), default=8, metavar="N", help="candidates of the search (default: %(default)s)"
    )
    parser.add_argument(
        "--folds", type=at_least(2, 100), default=6, metavar="N", help="of the training images (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=at_least(1, 100), default=1, metavar="K", help="runs on each fold (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images", type=at_least(2), metavar="N", help="of each fold, for a quick look (default: all)"
    )
    add_json(parser)
    add_workers(parser)
    add_storage(parser)
    add_dataset(parser, "that of the study")
    add_data_dir(parser)


def _confirm(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import confirm
    from nas_mnist.views import progress, tables

    storage = storage_of(arguments)
    settings = confirm.ConfirmSettings(
        storage=storage,
        study_name=arguments.study,
        top=arguments.top,
        n_folds=arguments.folds,
        n_seeds=arguments.seeds,
        train_images=arguments.train_images,
        data_dir=data_dir_of(arguments),
        dataset=dataset_of(storage, arguments.study, arguments),
    )
    workers = workers_of(arguments)
    with progress.RunDisplay(Console(stderr=arguments.json)) as on_event:
        ranking = confirm.confirm(settings, workers, on_event)
    if arguments.json:
        print(json.dumps([confirmed.to_dict() for confirmed in ranking], indent=2))
        return 0
    p_value = confirm.lead(*ranking[:2]) if len(ranking) > 1 else None
    Console(highlight=False).print(
        tables.confirmation_table(ranking),
        tables.lead_line(ranking, p_value, confirm.SIGNIFICANT_P),
        sep="\n",
        crop=False,
    )
    print(f"next: nas-mnist retrain{place_of(arguments)}")
    return 0


def add_retrain(commands) -> None:
    parser = add_command(
        commands,
        "retrain",
        _retrain,
        "train the confirmed winner on all training images, and meet the test set",
        example="nas-mnist retrain --seeds 5 --check",
        goes_on=True,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--trial", type=at_least(0), metavar="N", help="this trial of the search instead")
    which.add_argument(
        "--architecture", metavar="NAME|NOTATION", help="this network instead, with a warm start's recipe"
    )
    parser.add_argument("--seeds", type=at_least(1, 1000), default=5, metavar="K", help="runs (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=at_least(1, 1000), metavar="N", help="of a run with --architecture (default: 15)"
    )
    parser.add_argument("--train-images", type=at_least(2), metavar="N", help="for a quick look (default: all)")
    parser.add_argument("--check", action="store_true", help="exit with code 1 if the task is not fulfilled")
    add_json(parser)
    add_workers(parser)
    add_storage(parser)
    add_dataset(parser, "that of the study")
    add_data_dir(parser)


def _retrain(arguments) -> int:
    from rich.console import Console

    from nas_mnist.errors import StudyError
    from nas_mnist.stages import retrain
    from nas_mnist.views import progress, tables

    storage = storage_of(arguments)
    settings = retrain.RetrainSettings(
        storage=storage,
        chosen=_chosen(arguments, storage),
        study_name=arguments.study,
        n_seeds=arguments.seeds,
        train_images=arguments.train_images,
        data_dir=data_dir_of(arguments),
        dataset=dataset_of(storage, arguments.study, arguments),
    )
    if arguments.check and settings.dataset != MNIST:
        raise StudyError(
            f"--check judges the task, which is one of MNIST, not of {settings.dataset.name}: leave it out"
        )
    workers = workers_of(arguments)
    with progress.RunDisplay(Console(stderr=arguments.json)) as on_event:
        retrained = retrain.retrain(settings, workers, on_event)
    if arguments.json:
        print(json.dumps(tables.retrained_values(retrained), indent=2, ensure_ascii=False))
    else:
        Console(highlight=False).print(tables.retrained_table(retrained), tables.verdict_lines(retrained), sep="\n")
        print(f"next: nas-mnist export{place_of(arguments)}")
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
    architecture = zoo.resolve(arguments.architecture)
    recipe = reference_recipe(epochs=arguments.epochs or MAX_EPOCHS, size=architecture.n_parameters)
    return retrain.Chosen(Candidate(architecture, recipe))
