"""`describe`, `find-lr` and `baselines`: look at a network, and at the ten that people made."""

import json
from pathlib import Path

from nas_mnist.cli.options import (
    OPTIMIZERS,
    add_architecture,
    add_command,
    add_data_dir,
    add_dataset,
    add_json,
    add_storage,
    add_workers,
    at_least,
    data_dir_of,
    dataset_asked,
    storage_of,
    study_asked,
    workers_of,
)
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS


def add_describe(commands) -> None:
    parser = add_command(
        commands,
        "describe",
        _describe,
        "print layers, receptive fields and costs of a network",
        example='nas-mnist describe "c16 d16 d32 M c16k1- d16 d24 d32 c10k1- G"',
    )
    add_architecture(parser, nargs="?")
    parser.add_argument("--trial", type=at_least(0), metavar="N", help="the network of this trial of the study")
    parser.add_argument(
        "--max-params",
        type=at_least(1),
        default=MAX_PARAMS,
        metavar="N",
        help="the budget: a network has fewer (default: %(default)s)",
    )
    parser.add_argument(
        "--program",
        action="store_true",
        help="also print the instructions of a training step on a CPU, by SOAP",
    )
    add_json(parser)
    add_storage(parser)


def _describe(arguments) -> int:
    from rich.console import Console

    from nas_mnist.model import zoo
    from nas_mnist.model.network import count_parameters
    from nas_mnist.study.space import reference_recipe
    from nas_mnist.views import tables

    architecture = _described_architecture(arguments)
    n_parameters = count_parameters(architecture)
    verdict = 0 if n_parameters < arguments.max_params else 1
    if arguments.json:
        values = tables.description_values(architecture, n_parameters, arguments.max_params)
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return verdict
    console = Console(highlight=False)
    console.print(tables.description(architecture, n_parameters, arguments.max_params), crop=False)
    if arguments.architecture in zoo.ZOO:
        console.print(tables.published_lines(zoo.ZOO[arguments.architecture]))
    if arguments.program:
        recipe = reference_recipe(size=n_parameters)
        console.print(tables.program_table(architecture, recipe.batch_size, recipe.optimizer), crop=False)
    return verdict


def _described_architecture(arguments):
    from nas_mnist.errors import ArchitectureError
    from nas_mnist.model import zoo

    if (arguments.architecture is None) == (arguments.trial is None):
        raise ArchitectureError("describe takes one network: give a name, a notation line in quotes, or --trial N")
    if arguments.trial is None:
        return zoo.resolve(arguments.architecture)
    from nas_mnist.study import studies
    from nas_mnist.study.records import TrialRecord

    study = studies.load(storage_of(arguments, read_only=True).open(), arguments.study)
    return zoo.resolve(TrialRecord.from_trial(studies.find_trial(study, arguments.trial)).architecture)


def add_find_lr(commands) -> None:
    parser = add_command(
        commands,
        "find-lr",
        _find_lr,
        "raise the learning rate until the loss explodes, and draw it",
        example="nas-mnist find-lr step-by-step --out rates.png",
    )
    add_architecture(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also draw it into this PNG, SVG or PDF file")
    parser.add_argument(
        "--from", dest="lowest", type=float, default=1e-5, metavar="RATE", help="first rate (default: %(default)s)"
    )
    parser.add_argument(
        "--to", dest="highest", type=float, default=10.0, metavar="RATE", help="last rate (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        dest="n_steps",
        type=at_least(1),
        default=300,
        metavar="N",
        help="batches, one for each rate (default: %(default)s)",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, … (default: %(default)s)")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="of weights and batches (default: %(default)s)"
    )
    add_json(parser)
    add_dataset(parser)
    add_data_dir(parser)


def _find_lr(arguments) -> int:
    from rich.console import Console
    from rich.progress import track

    from nas_mnist.data.folds import search_split
    from nas_mnist.data.images import load_train
    from nas_mnist.data.unpacking import prepare
    from nas_mnist.model import zoo
    from nas_mnist.study import space
    from nas_mnist.training import lr_finder
    from nas_mnist.views import tables
    from nas_mnist.workers.local import plan_workers

    architecture = zoo.resolve(arguments.architecture)
    rates = lr_finder.RateRange(arguments.lowest, arguments.highest, arguments.n_steps)
    if arguments.out:
        tables.check_figure_path(arguments.out)
    plan_workers(1, [arguments.device])
    prepare(data_dir_of(arguments), dataset_asked(arguments))
    images = search_split(load_train(data_dir_of(arguments), dataset_asked(arguments))).train
    recipe = space.reference_recipe(arguments.optimizer, size=architecture.n_parameters)
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
        tables.save_figure(tables.rate_curve_figure(curve, str(architecture)), arguments.out)
    if arguments.json:
        print(json.dumps(tables.rate_curve_values(curve), indent=2))
        return 0
    console = Console(highlight=False)
    console.print(tables.rate_curve_plot(curve, min(console.width, 100)))
    console.print(tables.rate_curve_lines(curve))
    return 0


def add_baselines(commands) -> None:
    parser = add_command(
        commands,
        "baselines",
        _baselines,
        "train the reference systems with one recipe on all images, and compare with what was published",
        example="nas-mnist baselines era1a7 lite-m4 --seeds 3",
        goes_on=True,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="reference systems (default: all ten)")
    parser.add_argument(
        "--seeds", type=at_least(1, 1000), default=1, metavar="K", help="runs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=at_least(1, 1000), default=MAX_EPOCHS, metavar="N", help="of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--train-images",
        type=at_least(2),
        metavar="N",
        help="fewer for a quick look, in another --study (default: all)",
    )
    add_json(parser)
    add_workers(parser)
    add_storage(parser)
    add_dataset(parser)
    add_data_dir(parser)


def _baselines(arguments) -> int:
    from rich.console import Console

    from nas_mnist.stages import baselines
    from nas_mnist.stages.planned import n_train_images
    from nas_mnist.views import progress, tables

    settings = baselines.BaselineSettings(
        **study_asked(arguments),
        names=tuple(arguments.names) or tuple(baselines.ZOO),
        n_seeds=arguments.seeds,
        epochs=arguments.epochs,
    )
    workers = workers_of(arguments)
    with progress.RunDisplay(Console(stderr=arguments.json)) as on_event:
        results = baselines.train_baselines(settings, workers, on_event)
    if arguments.json:
        print(json.dumps([tables.baseline_values(result) for result in results], indent=2, ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    console.print(
        tables.baselines_table(results, settings.dataset),
        tables.baselines_note(
            settings.recipe,
            n_train_images(settings),
            settings.dataset,
            [result for result in results if result.training.own],
        ),
        sep="\n",
        crop=False,
    )
    return 0
