"""The errors a user can cause, each one clear line: rule, value, next step.

    NasMnistError
    ├── ArchitectureError      a notation line that does not parse, or a network that cannot exist
    ├── BudgetError            a parameter limit that no candidate can meet
    ├── DataError              a data file that is missing or damaged
    ├── DeviceError            a device or a number of workers that is not there
    ├── SolutionError          an exported folder that is damaged, incomplete, or in the way
    ├── StudyError             a database or study that cannot be opened or must not be mixed
    └── TrainingDiverged       a loss that is not finite

The command line prints the message of any of them and exits with code 2.
"""


class NasMnistError(Exception):
    """Base of every error that a user can understand and act on."""


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
