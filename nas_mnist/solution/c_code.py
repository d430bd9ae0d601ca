"""The network as C99 that a person could have written: no allocation, no library, weights in flash, int8 and float32.

The functions that compute a layer stand in `model.c` as they are here; written for a network are its numbers, one
constant for each convolution, and two functions that call the layers in their order.

A map is row by row, its channels innermost. The maps lie in one static buffer: a layer reads at one end of it and
writes at the other, so that it is as large as the largest sum of a map that is read and one that is written. A norm
that stands alone works in place.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas_mnist.data.datasets import Normalisation
from nas_mnist.errors import SolutionError
from nas_mnist.model.architecture import ACTIVATION_NAMES, INPUT_SIDE, N_CLASSES
from nas_mnist.solution.folding import FoldedConvolution, FoldedStep
from nas_mnist.solution.quantise import Quantised, QuantisedConvolution, QuantisedMean, QuantisedStep
from nas_mnist.solution.walk import Pool

SOURCES = Path(__file__).with_name("c")
FILES = ("model.h", "model.c", "example.c", "Makefile")
COLUMNS = 110  # of the tables of numbers


@dataclass(frozen=True)
class _Layer:
    """One line of the function that runs the network."""

    call: str
    in_values: int  # of the map that is read, and of the one that is written
    values: int
    comment: str
    in_place: bool = False


DESKEW = _Layer("deskew({x}, {y});", INPUT_SIDE**2, INPUT_SIDE**2, "the image made upright")
FLOAT_DESKEWING = "\n    static uint8_t upright[MODEL_PIXELS];\n    deskew(pixels, upright);"


@dataclass(frozen=True)
class _Program:
    """The layers of one of the two functions, and where their maps lie in the buffer."""

    layers: tuple[_Layer, ...]
    reads_pixels: bool  # the first layer reads the caller's image; else the image is the first map of the buffer

    @property
    def n_values(self) -> int:
        """Of the buffer."""
        first, *rest = self.layers
        needed = first.values + first.in_values * (not self.reads_pixels)
        return max([needed, *(layer.in_values + layer.values * (not layer.in_place) for layer in rest)])

    @property
    def places(self) -> list[int]:
        """Where each layer writes: in place, or at the end of the buffer that the map it reads is not at."""
        is_at_start = not self.reads_pixels
        places = []
        for layer in self.layers:
            is_at_start = is_at_start == layer.in_place
            places.append(0 if is_at_start else self.n_values - layer.values)
        return places

    def source(self) -> str:
        x = "pixels" if self.reads_pixels else "maps"
        lines = []
        for layer, place in zip(self.layers, self.places, strict=True):
            y = f"maps + {place}" if place else "maps"
            lines.append(f"    {layer.call.format(x=x, y=y)} /* {layer.comment} */")
            x = y
        return "\n".join(lines)

    @property
    def result(self) -> str:
        """What stands before the number of a logit."""
        return f"{self.places[-1]} + " if self.places[-1] else ""


def write(
    folder: Path,
    steps: Sequence[FoldedStep],
    quantised: Quantised,
    headline: str,
    like: Normalisation,
    *,
    deskewed: bool = False,
) -> None:
    """Write the four files into a new folder; `deskewed` makes the image upright before the first step.

    Raises `SolutionError` if a layer is none that this writer knows; nothing is written then.
    """
    first = [DESKEW] * deskewed
    int8 = _Program((*first, *(layer for step in quantised.steps for layer in _int8_layers(step))), reads_pixels=True)
    floats = _Program(tuple(layer for step in steps for layer in _float_layers(step)), reads_pixels=False)
    values = {
        "headline": headline,
        "side": INPUT_SIDE,
        "classes": N_CLASSES,
        "mean": _float(like.mean),
        "std": _float(like.std),
        "int8_ram": f"{int8.n_values:,}",
        "float_ram": f"{4 * floats.n_values + INPUT_SIDE**2 * deskewed:,}",
        "int8_constants": "\n\n".join(
            _int8_constants(s) for s in quantised.steps if isinstance(s, QuantisedConvolution)
        ),
        "int8_size": int8.n_values,
        "int8_layers": int8.source(),
        "int8_last": int8.result,
        "int8_zero": quantised.zero,
        "int8_scale": _float(quantised.scale),
        "float_constants": "\n\n".join(_float_constants(s) for s in steps if isinstance(s, FoldedConvolution)),
        "float_deskewing": FLOAT_DESKEWING * deskewed,
        "float_pixels": "upright" if deskewed else "pixels",
        "float_size": floats.n_values,
        "float_layers": floats.source(),
        "float_last": floats.result,
    }
    texts = {name: _filled((SOURCES / name).read_text(encoding="utf-8"), values) for name in FILES}
    texts["model.c"] = _without_unused(texts["model.c"])
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _filled(template: str, values: dict[str, Any]) -> str:
    return re.sub(r"@(\w+)@", lambda match: str(values[match[1]]), template)


def _without_unused(source: str) -> str:
    """Without the functions that no layer of this network needs; a blank line stands between two, and none in one."""
    parts = source.split("\n\n")
    for i, part in enumerate(parts):
        function = re.search(r"^static \w+(?: \w+)? (\w+)\(", part, re.MULTILINE)
        if function and not re.search(rf"\b{function[1]}\(", "\n\n".join(parts[:i] + parts[i + 1 :])):
            return _without_unused("\n\n".join(parts[:i] + parts[i + 1 :]))  # what only that one called may go, too
    return source


def _float_layers(step: FoldedStep) -> list[_Layer]:
    """One for each step, and one for a hard-swish."""
    layers = [_float_layer(step)]
    if isinstance(step, FoldedConvolution) and step.activation == "hardswish":
        n = step.channels * step.side**2
        layers.append(_Layer(f"hard_swish_float({n}, {{y}});", n, n, "hard-swish", in_place=True))
    return layers


def _int8_layers(step: QuantisedStep) -> list[_Layer]:
    """One for each step, and one for an activation that is a table."""
    layers = [_int8_layer(step)]
    if isinstance(step, QuantisedConvolution) and step.table is not None:
        n, name = step.step.channels * step.step.side**2, f"{step.step.name}_int8_table"
        layers.append(_Layer(f"look_up_int8({n}, {name}, {{y}});", n, n, "hard-swish", in_place=True))
    return layers


def _float_layer(step: FoldedStep) -> _Layer:
    if isinstance(step, FoldedConvolution):
        return _layer(f"{_function(step)}_float(&{step.name}_float, {{x}}, {{y}});", step)
    if isinstance(step, Pool):
        return _layer(
            f"{'max_pool' if step.is_max else 'mean'}_float({step.in_side}, {step.channels}, {{x}}, {{y}});", step
        )
    raise _unknown(step)


def _int8_layer(step: QuantisedStep) -> _Layer:
    if isinstance(step, QuantisedConvolution):
        return _layer(f"{_function(step.step)}_int8(&{step.step.name}_int8, {{x}}, {{y}});", step.step)
    if isinstance(step, QuantisedMean):
        size = f"{step.step.in_side}, {step.step.channels}"
        numbers = f"{step.zero_in}, {step.zero}, {_float(step.multiplier)}"
        return _layer(f"mean_int8({size}, {numbers}, {{x}}, {{y}});", step.step)
    if isinstance(step, Pool) and step.is_max:
        return _layer(f"max_pool_int8({step.in_side}, {step.channels}, {{x}}, {{y}});", step)
    raise _unknown(step)


def _unknown(step: object) -> SolutionError:
    return SolutionError(
        f"the C writer knows convolutions and pools, and no {type(step).__name__}: export without C", "c"
    )


def _function(step: FoldedConvolution) -> str:
    return "depthwise" if step.groups > 1 else "convolution"


def _layer(call: str, step: FoldedStep) -> _Layer:
    in_channels = step.in_channels if isinstance(step, FoldedConvolution) else step.channels
    comment = f"{step.side}x{step.side}x{step.channels}"
    in_place = isinstance(step, FoldedConvolution) and step.is_norm
    return _Layer(call, in_channels * step.in_side**2, step.channels * step.side**2, comment, in_place)


def _int8_constants(step: QuantisedConvolution) -> str:
    name, conv = f"{step.step.name}_int8", step.step
    bias, zero_in = step.bias, step.zero_in
    if not conv.padding:  # every sum has all weights in it, and zero_in as often
        bias, zero_in = bias - zero_in * step.weight.astype(np.int32).sum((1, 2, 3)), 0
    arrays = [
        _array("int8_t", f"{name}_weights", _in_order(step.weight, conv)),
        _array("int32_t", f"{name}_bias", bias),
        _array("float", f"{name}_multiplier", step.multiplier),
    ]
    if step.table is not None:
        arrays.append(_array("uint8_t", f"{name}_table", step.table))
    fields = [_size(conv), f".zero_in = {zero_in}, .zero = {step.zero}"]
    fields += [f".{each} = {name}_{each}" for each in ("weights", "bias", "multiplier")]
    heading = _heading(conv, 1, 8, 0 if step.table is None else len(step.table))
    return "\n".join([heading, *arrays, _struct("int8_layer", name, fields)])


def _float_constants(conv: FoldedConvolution) -> str:
    name = f"{conv.name}_float"
    arrays = [
        _array("float", f"{name}_weights", _in_order(conv.weight.astype(np.float32), conv)),
        _array("float", f"{name}_bias", conv.bias.astype(np.float32)),
    ]
    fields = [_size(conv), f".is_rectified = {int(conv.activation == 'relu')}"]
    fields += [f".{each} = {name}_{each}" for each in ("weights", "bias")]
    return "\n".join([_heading(conv, 4, 4), *arrays, _struct("float_layer", name, fields)])


def _in_order(weight: np.ndarray, conv: FoldedConvolution) -> np.ndarray:
    """(C', C, K, K) → [C'][K][K][C], and of a depthwise convolution (C, 1, K, K) → [K][K][C]."""
    return weight[:, 0].transpose(1, 2, 0) if conv.groups > 1 else weight.transpose(0, 2, 3, 1)


def _heading(conv: FoldedConvolution, weight_bytes: int, channel_bytes: int, table_bytes: int = 0) -> str:
    """What it is, and its bytes of flash."""
    maps = f"{conv.in_side}x{conv.in_side}x{conv.in_channels} -> {conv.side}x{conv.side}x{conv.channels}"
    n_bytes = weight_bytes * conv.weight.size + channel_bytes * conv.channels + table_bytes
    activation = f", {ACTIVATION_NAMES[conv.activation]}" if conv.activation else ""
    kind = "depthwise " * (conv.groups > 1)
    return f"/* {conv.name}: {conv.kernel}x{conv.kernel} {kind}convolution{activation}, {maps}, {n_bytes:,} bytes */"


def _size(conv: FoldedConvolution) -> str:
    names = ("in_side", "in_channels", "side", "channels", "kernel", "stride", "padding")
    return ".size = {" + ", ".join(f".{name} = {getattr(conv, name)}" for name in names) + "}"


def _struct(kind: str, name: str, fields: list[str]) -> str:
    return "\n".join([f"static const struct {kind} {name} = {{", *(f"    {field}," for field in fields), "};"])


def _array(kind: str, name: str, values: np.ndarray) -> str:
    numbers = [_float(value) if kind == "float" else str(value) for value in values.ravel()]
    lines = textwrap.wrap(", ".join(numbers), COLUMNS)
    return "\n".join([f"static const {kind} {name}[{len(numbers)}] = {{", *(f"    {line}" for line in lines), "};"])


def _float(value: float) -> str:
    """The shortest decimal that is this float32 again, as C writes it."""
    text = np.format_float_scientific(np.float32(value), unique=True, trim="0", exp_digits=1)
    _, exponent = text.split("e")
    return f"{np.format_float_positional(np.float32(value), trim='0') if -5 < int(exponent) < 7 else text}f"
