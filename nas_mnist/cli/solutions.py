"""`export`, `predict`, `evaluate` and `demo`: the folder that one carries away."""

import json
import shlex
import sys
from pathlib import Path

from nas_mnist.cli.options import (
    add_command,
    add_data_dir,
    add_dataset,
    add_json,
    add_storage,
    at_least,
    data_dir_of,
    dataset_of,
    storage_of,
)
from nas_mnist.errors import shown
from nas_mnist.extras import Extra, require


def add_export(commands) -> None:
    parser = add_command(
        commands,
        "export",
        _export,
        "write the retrained winner as a folder that anyone can use",
        example="nas-mnist export --out solution",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("solution"), metavar="DIR", help="the folder to make (default: %(default)s)"
    )
    parser.add_argument("--trial", type=at_least(0), metavar="N", help="this trial, once it has been retrained")
    parser.add_argument("--c", action="store_true", help="also as C for microcontrollers, measured on two of them")
    parser.add_argument("--force", action="store_true", help="replace an earlier solution in that folder")
    add_storage(parser)
    add_dataset(parser, "that of the study")
    add_data_dir(parser)


def _export(arguments) -> int:
    require(Extra.export)
    from nas_mnist.solution import export
    from nas_mnist.stages import retrain

    storage = storage_of(arguments, read_only=True)
    chosen = None if arguments.trial is None else retrain.choose(storage, arguments.study, arguments.trial)
    retrained = retrain.load(storage, arguments.study, chosen)
    dataset_of(storage, f"{arguments.study}-retrain", arguments)
    source = export.Source.find(storage, arguments.study, retrained.candidate)
    how = {"force": arguments.force, "c": arguments.c}
    record = export.export(retrained, source, data_dir_of(arguments), arguments.out, **how)
    print(f"{arguments.out}: {record['n_parameters']:,} parameters, {record['test_accuracy']:.2%} of the test set")
    folder = shlex.quote(str(arguments.out))
    print(f"next: nas-mnist predict {folder} IMAGE\n      nas-mnist demo {folder}")
    return 0


def add_predict(commands) -> None:
    parser = add_command(
        commands, "predict", _predict, "say what pictures show", example="nas-mnist predict solution digit.png"
    )
    parser.add_argument("solution", type=Path, metavar="FOLDER", help="that `nas-mnist export` wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG or JPEG, dark on light or light on dark")
    add_json(parser)


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


def add_evaluate(commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "print the test accuracy of an exported folder",
        example="nas-mnist evaluate solution",
    )
    parser.add_argument("solution", type=Path, metavar="FOLDER", help="that `nas-mnist export` wrote")
    parser.add_argument("--int8", action="store_true", help="of the quantised network, run by onnxruntime")
    add_json(parser)
    add_data_dir(parser)


def _evaluate(arguments) -> int:
    from nas_mnist.solution import predict

    accuracy = predict.accuracy_on_test_set(arguments.solution, data_dir_of(arguments), int8=arguments.int8)
    print(json.dumps({"test_accuracy": accuracy}) if arguments.json else f"{accuracy:.2%} of the test set")
    return 0


def add_demo(commands) -> None:
    parser = add_command(
        commands, "demo", _demo, "draw digits in a browser, with an exported folder", example="nas-mnist demo solution"
    )
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
