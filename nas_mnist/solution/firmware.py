"""The C of a solution on a microcontroller: cross-compiled for a Cortex-M4 and an M7, and run by QEMU.

Flash and RAM are read from the linker's map, instructions from the emulated SysTick: QEMU counts instructions, not
cycles. Needs `arm-none-eabi-gcc` with newlib, and `qemu-system-arm`.
"""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from nas_mnist.errors import SolutionError

SOURCES = Path(__file__).with_name("firmware")
COMPILER, EMULATOR = "arm-none-eabi-gcc", "qemu-system-arm"
FLAGS = ("-O3", "-std=c99", "-ffp-contract=off", "-ffunction-sections", "-fdata-sections", "-ffreestanding", "-Wall")
FUNCTIONS = ("model_int8", "model_float")
OWN = "main.o"  # of the firmware around the model
TIMEOUT = 600  # seconds for a run, on a machine that does other work too


@dataclass(frozen=True)
class Board:
    """A processor, and the machine of QEMU that has it."""

    name: str
    cpu: str
    fpu: str
    machine: str


BOARDS = (
    Board("Cortex-M4", "cortex-m4", "fpv4-sp-d16", "mps2-an386"),
    Board("Cortex-M7", "cortex-m7", "fpv5-sp-d16", "mps2-an500"),
)


@dataclass(frozen=True)
class Measured:
    """What a network takes on a board: bytes of flash and of RAM without the stack, mean instructions an image."""

    flash: int
    ram: int
    instructions: int
    predictions: tuple[int, ...]


def missing() -> list[str]:
    """The programs that are needed and not installed."""
    return [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]


def versions() -> list[str]:
    """The first line of what each program says of itself."""
    return [_call([program, "--version"], Path()).split("\n")[0] for program in (COMPILER, EMULATOR)]


def measure(folder: Path, function: str, pixels: np.ndarray, board: Board) -> Measured:
    """Build the C in `folder` for the board and let it classify pixels (N, 28, 28) with `model_int8` or `model_float`.

    Raises `SolutionError` if it cannot be built or does not come to its end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        build = Path(temporary)
        (build / "images.bin").write_bytes(np.ascontiguousarray(pixels, np.uint8).tobytes())
        _build(folder.resolve(), function, board, build)
        flash, ram = sizes((build / "map").read_text())
        lines = _call([*_emulator(board), "-kernel", "firmware.elf"], build).split("\n")
    results = [tuple(map(int, line.split())) for line in lines if re.fullmatch(r"\d+ \d+", line)]
    if len(results) != len(pixels):
        raise SolutionError(f"the C stopped on a {board.name} after {len(results)} of {len(pixels)} images")
    predictions, instructions = zip(*results, strict=True)
    return Measured(flash, ram, round(mean(instructions)), predictions)


def _build(folder: Path, function: str, board: Board, build: Path) -> None:
    compiler = [COMPILER, f"-mcpu={board.cpu}", "-mthumb", "-mfloat-abi=hard", f"-mfpu={board.fpu}", *FLAGS]
    _call([*compiler, "-c", folder / "model.c", "-o", "model.o"], build)
    own = ["-std=gnu99", f"-I{folder}", f"-DMODEL={function}"]
    _call([*compiler, *own, "-c", SOURCES / "main.c", "-o", "main.o"], build)
    link = ["-nostartfiles", "--specs=nano.specs", f"-T{SOURCES / 'board.ld'}", "-Wl,--gc-sections,-Map=map"]
    _call([*compiler, *link, "main.o", "model.o", "-o", "firmware.elf"], build)


def _emulator(board: Board) -> list[str]:
    counting = ["-icount", "shift=0"]  # one instruction takes one nanosecond
    console = ["-chardev", "stdio,id=console", "-semihosting-config", "enable=on,target=native,chardev=console"]
    return [
        EMULATOR,
        "-M",
        board.machine,
        "-display",
        "none",
        "-monitor",
        "none",
        "-serial",
        "none",
        *counting,
        *console,
    ]


def sizes(linker_map: str) -> tuple[int, int]:
    """Bytes of flash and RAM of all that is linked in but the firmware around the model: code, constants, libraries."""
    flash = ram = 0
    kept = linker_map.partition("Linker script and memory map")[2]
    for section, size, source in re.findall(r"^ (\.\w+)\S*\s+0x[0-9a-f]+\s+0x([0-9a-f]+) (\S+)$", kept, re.MULTILINE):
        if Path(source).name == OWN:
            continue
        n_bytes = int(size, 16)
        flash += n_bytes * (section in (".text", ".rodata", ".data"))
        ram += n_bytes * (section in (".data", ".bss"))
    return flash, ram


def _call(command: list, folder: Path) -> str:
    """Standard output. Raises `SolutionError` with the first line that a program had to say if it failed."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise SolutionError(f"{command[0]} took longer than {TIMEOUT} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().split("\n")[0]
        raise SolutionError(f"{command[0]} failed ({said})")
    return done.stdout
