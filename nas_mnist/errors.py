"""The errors a user can cause, each one clear line: rule, value, next step.

    NasMnistError
    ├── ArchitectureError      a notation line that does not parse, or a network that cannot exist
    ├── BudgetError            a parameter limit that no candidate can meet
    ├── DataError              a data file that is missing or damaged
    ├── DeviceError            a device or a number of workers that is not there
    ├── SolutionError          an exported folder that is damaged, incomplete, or in the way
    ├── StudyError             a database or study that cannot be opened or must not be mixed
    └── TrainingDiverged       a loss that is not finite

The command line prints the message of any of them and exits with code 2; and that of `explain`, for what the machine
itself cannot do.
"""

import errno
import re
from collections.abc import Iterator


class NasMnistError(Exception):
    """Base of every error that a user can understand and act on.

    `settings` are the keywords, such as `storage`, of which another value mends it; the command line adds its options.
    """

    def __init__(self, message: str = "", *settings: str):
        super().__init__(message)
        self.settings = settings


class ArchitectureError(NasMnistError):
    """The line is not an architecture: the message names the token and its position."""


class BudgetError(NasMnistError):
    """No candidate can have as few parameters as asked for."""


class DataError(NasMnistError):
    """The data set is missing, damaged, or smaller than asked for."""


class DeviceError(NasMnistError):
    """The device does not exist on this machine."""


class SolutionError(NasMnistError):
    """The exported folder is damaged or incomplete, does not do what it should, or must not be overwritten."""


class StudyError(NasMnistError):
    """The study cannot be opened, or belongs to another search."""


class TrainingDiverged(NasMnistError):
    """The loss stopped being finite; the candidate is worthless, the search goes on."""


FULL = "the disk is full: make room, and the same command goes on; what was finished is kept"
LOCKED = "another program has kept the database locked for too long: close it, and the same command goes on"
NO_MEMORY = "there was not enough memory: the same command goes on, with fewer workers if it happens again"
NO_GPU_MEMORY = "a GPU had not enough memory for who uses it: the same command goes on, with fewer workers on that GPU"
BROKEN = "the database cannot be read or written any more ({}): see to its disk, and the same command goes on"

# What SQLite, PyTorch and safetensors say of it; they have no errors of their own for these.
_TEXTS = {
    "database or disk is full": FULL,
    "No space left on device": FULL,
    "database is locked": LOCKED,
    "can't allocate memory": NO_MEMORY,
    "CUDA out of memory": NO_GPU_MEMORY,
    "CUDA error: out of memory": NO_GPU_MEMORY,  # where not even a context can be made
    "CUBLAS_STATUS_ALLOC_FAILED": NO_GPU_MEMORY,
    "disk I/O error": BROKEN.format("SQLite says: disk I/O error; a full disk does that too"),
    "unable to open database file": BROKEN.format("SQLite cannot open it; a full disk does that too"),
    "database disk image is malformed": BROKEN.format("SQLite says: it is malformed"),
}


def explain(error: BaseException) -> str | None:
    """One line about an error of the machine (memory, disk, database) and what to do; None for any other error."""
    for cause in _chain(error):
        if isinstance(cause, MemoryError):
            return NO_MEMORY
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return FULL
        for text, message in _TEXTS.items():
            if text in str(cause):
                return message
    return None


def shown(text: str) -> str:
    """The text as people may see it: on one line, with escapes for what a terminal would obey, without passwords."""
    text = re.sub(r"(?s)(://[^:/@\s]*):.*@", r"\1:***@", text)  # a password may hold anything: rather too much
    text = re.sub(r"(?i)(\w*pass\w*=)[^&\s'\"]+", r"\1***", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_final(explanation: str | None) -> bool:
    """Whether trying again cannot help before somebody has seen to it."""
    return explanation == FULL


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from; libraries raise their own while they handle the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
