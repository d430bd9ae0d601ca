"""The command line: each command parses, calls one library function, and prints.

A domain error becomes one line on stderr and exit code 2. Only the standard library is imported at the top, so that
`--help` answers at once: torch and Optuna take seconds.
"""

import argparse
import io
import os
import shlex
import sys
import warnings

from nas_mnist.cli import ablate, doctor, frontier, judge, look, networks, search, solutions, solve
from nas_mnist.data.datasets import DATASETS, MNIST
from nas_mnist.errors import NasMnistError, explain, shown
from nas_mnist.workers.signals import stopped_once


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
            return _say_error(error, arguments)


def _say_stopped(argv: list[str], goes_on: bool) -> None:
    how = f"; what was finished is kept. To go on:\n  {shown(shlex.join(['nas-mnist', *argv]))}" if goes_on else ""
    print(f"nas-mnist: stopped{how}", file=sys.stderr)


def _say_error(error: Exception, arguments: argparse.Namespace) -> int:
    """One line about what the user or the machine did; anything else is a bug, and raised again."""
    message = f"{error}{_options(error, arguments)}" if isinstance(error, NasMnistError) else explain(error)
    if message is None:
        raise error
    for note in getattr(error, "__notes__", ()):  # a worker's traceback
        print(*map(shown, note.splitlines()), sep="\n", file=sys.stderr)
    print(f"nas-mnist: {shown(message)}", file=sys.stderr)
    return 2


def _options(error: NasMnistError, arguments: argparse.Namespace) -> str:
    """The options of this command that mend the error, in brackets; the library knows them as keywords."""
    names = ["study" if name == "study_name" else name for name in error.settings]
    options = [f"--{name.replace('_', '-')}" for name in names if name in arguments]
    return f" ({', '.join(options)})" if options else ""


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


def _default_study(arguments) -> str:
    """One of its own for each dataset, for results of two cannot be in one study."""
    name = DATASETS[getattr(arguments, "dataset", None) or MNIST.name].study
    return f"{name}-baselines" if arguments.command == "baselines" else name


COMMANDS = (
    solve.add_solve,
    search.add_search,
    look.add_show,
    look.add_dashboard,
    look.add_report,
    judge.add_confirm,
    frontier.add_frontier,
    judge.add_retrain,
    ablate.add_ablate,
    networks.add_baselines,
    networks.add_describe,
    networks.add_find_lr,
    solutions.add_export,
    solutions.add_predict,
    solutions.add_evaluate,
    solutions.add_demo,
    doctor.add_doctor,
)
