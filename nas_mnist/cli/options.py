"""What several commands take: their options, the types of their values, and what the values mean."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from nas_mnist.data.datasets import DATASETS, MNIST
from nas_mnist.errors import shown

DEFAULT_STORAGE = "studies/nas_mnist.db"
OPTIMIZERS = ("soap", "sgd", "adamw")
MAX_NAME = 200  # characters; other studies add to it, and a database keeps 512


def add_command(commands, name: str, run, help: str, *, example: str, goes_on: bool = False) -> argparse.ArgumentParser:
    """A new command, whose help ends with an example. If it was stopped and `goes_on`, once more does what is left."""
    description = f"{help[0].upper()}{help[1:]}."
    parser = commands.add_parser(name, help=help, description=description, epilog=f"example: {example}")
    parser.set_defaults(run=run, goes_on=goes_on)
    return parser


def add_storage(parser) -> None:
    parser.add_argument(
        "--storage", default=DEFAULT_STORAGE, metavar="URL", help="SQLite file or SQLAlchemy URL (default: %(default)s)"
    )
    parser.add_argument(
        "--study",
        type=study_name,
        metavar="NAME",
        help=f"name of the study (default: {MNIST.study}; another dataset and baselines have their own)",
    )


def add_data_dir(parser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the images are unpacked (default: $NAS_MNIST_DATA, or a cache folder)",
    )


def add_dataset(parser, default: str = MNIST.name) -> None:
    parser.add_argument("--dataset", choices=DATASETS, help=f"{', '.join(DATASETS)} (default: {default})")


def add_workers(parser) -> None:
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="processes (default: one for each CPU core, several to a GPU)"
    )
    parser.add_argument(
        "--devices", type=names, metavar="D[,D…]", help="cpu, cuda:0, … (default: every GPU, or the CPU)"
    )


def add_json(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_architecture(parser, **options) -> None:
    parser.add_argument(
        "architecture",
        metavar="NAME|NOTATION",
        help='a reference system, or a line such as "c8 M c16 G c10k1-"',
        **options,
    )


def at_least(low: int, high: int = 10**9):
    """The type of a whole number within these limits."""

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


def study_name(text: str) -> str:
    """The type of a name that a database keeps and a terminal shows."""
    if not (text.strip() and text.isprintable() and len(text) <= MAX_NAME):
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_NAME} characters that can be printed, not {text[:40]!r}")
    return text


def host_address(text: str) -> str:
    """The type of an address to listen on."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be an address, such as 127.0.0.1; an empty one would mean all")
    return text


def names(text: str) -> list[str]:
    """The type of a list with commas between its names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be one or several, with commas between them, not {text!r}")
    return names


def storage_of(arguments, *, read_only: bool = False):
    from dataclasses import replace

    from nas_mnist.study.storage import Storage

    return replace(Storage.parse(arguments.storage), read_only=read_only)


def workers_of(arguments) -> list:
    """Those of this machine; where memory makes them fewer, or a GPU is not to be trusted, a line on stderr says so."""
    from nas_mnist.training import self_check
    from nas_mnist.workers.local import plan_workers

    def say(line: str) -> None:
        print(f"nas-mnist: {line}", file=sys.stderr)

    workers = plan_workers(arguments.workers, arguments.devices, say)
    self_check.tell([worker.device for worker in workers], say)
    return workers


def data_dir_of(arguments) -> Path:
    from nas_mnist.data.unpacking import default_data_dir

    return arguments.data_dir or default_data_dir()


def dataset_asked(arguments):
    """The dataset that the command line names, or MNIST."""
    return DATASETS[arguments.dataset or MNIST.name]


def dataset_of(storage, study_name: str, arguments):
    """That of the study; the option can only repeat it."""
    from nas_mnist.study import studies

    return studies.dataset_of(storage, study_name, DATASETS.get(arguments.dataset))


def study_asked(arguments) -> dict[str, Any]:
    """Where the study is and what data it is of, as every stage's settings have it, for one that may be begun here."""
    return {
        "storage": storage_of(arguments),
        "study_name": arguments.study,
        "train_images": arguments.train_images,
        "data_dir": data_dir_of(arguments),
        "dataset": dataset_asked(arguments),
    }


def place_of(arguments) -> str:
    """The options that the next command needs to find this study."""
    place = "" if arguments.storage == DEFAULT_STORAGE else f" --storage {shown(shlex.quote(arguments.storage))}"
    return place + ("" if arguments.study == MNIST.study else f" --study {shlex.quote(arguments.study)}")
