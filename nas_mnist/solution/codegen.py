"""Architecture → the source of a module that a person could have written, and the names its weights have there."""

import inspect
from dataclasses import dataclass

from nas_mnist.data.datasets import MNIST, Dataset, Normalisation
from nas_mnist.model.architecture import Architecture, Conv, LayerShape, MaxPool
from nas_mnist.solution import preprocess as digit

_READING = (
    digit.prepare,
    digit.paper,
    digit.centred,
    digit.on_paper,
    digit.read_png,
    digit.decode_png,
    digit.unfilter,
)


@dataclass(frozen=True)
class _Part:
    """One convolution of the built network with what follows it; a separable convolution has two."""

    name: str
    norm: str | None
    source: str  # its name in the state dict of the built network, "3.0"
    norm_source: str
    definition: str
    channels: int
    n_parameters: int
    activation: bool


def _parts(index: int, number: int, shape: LayerShape) -> list[_Part]:
    """The parts of the `number`-th convolution, which is child `index` of the built network."""
    conv: Conv = shape.layer
    size = f"{shape.in_channels}, {{}}, {conv.kernel}"
    options = f", stride={conv.stride}" * (conv.stride != 1) + f", padding={conv.padding}" * (conv.padding != 0)
    bias = "" if conv.bias else ", bias=False"

    def part(name: str, norm: str, position: int, definition: str, channels: int, n_weights: int) -> _Part:
        norm_name = norm if conv.norm else None
        source = f"{index}.{position}"
        return _Part(
            name, norm_name, source, f"{index}.{position + 1}.norm", definition, channels, n_weights, conv.activation
        )

    if not conv.separable:
        n_weights = shape.in_channels * conv.channels * conv.kernel**2 + conv.bias * conv.channels
        definition = f"nn.Conv2d({size.format(conv.channels)}{options}{bias})"
        return [part(f"conv{number}", f"norm{number}", 0, definition, conv.channels, n_weights)]
    c = shape.in_channels
    depthwise = f"nn.Conv2d({size.format(c)}{options}, groups={c}, bias=False)"
    pointwise = f"nn.Conv2d({c}, {conv.channels}, 1{bias})"
    n_weights = c * conv.channels + conv.bias * conv.channels
    return [
        part(f"depthwise{number}", f"depthwise_norm{number}", 0, depthwise, c, c * conv.kernel**2),
        part(f"pointwise{number}", f"norm{number}", 1 + conv.activation, pointwise, conv.channels, n_weights),
    ]


def _all_parts(architecture: Architecture) -> list[list[_Part]]:
    """The parts of each layer; a pool has none."""
    parts, number = [], 0
    for index, shape in enumerate(architecture.shapes):
        is_conv = isinstance(shape.layer, Conv)
        number += is_conv
        parts.append(_parts(index, number, shape) if is_conv else [])
    return parts


def weight_names(architecture: Architecture) -> dict[str, str]:
    """For each name in the built network's state dict its name in `model.py`."""
    names = {}
    for part in (part for parts in _all_parts(architecture) for part in parts):
        names[f"{part.source}.weight"] = f"{part.name}.weight"
        if "bias=False" not in part.definition:
            names[f"{part.source}.bias"] = f"{part.name}.bias"
        if part.norm:
            for field in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                names[f"{part.norm_source}.{field}"] = f"{part.norm}.{field}"
    return names


def generate(
    architecture: Architecture,
    headline: str,
    dataset: Dataset = MNIST,
    normalisation: Normalisation = MNIST.normalisation,
) -> str:
    """The source of `model.py`: imports torch and the standard library; Pillow is used for images if it is there."""
    return _TEMPLATE.format(
        headline=headline,
        mean=normalisation.mean,
        std=normalisation.std,
        side=dataset.box,
        by_mass=dataset.by_mass,
        classes=", ".join(f'"{name}"' for name in dataset.classes),
        line=str(architecture),
        definitions="\n".join(_definitions(architecture)),
        forward="\n".join(_forward(architecture)),
        reading="\n\n".join(inspect.getsource(function) for function in _READING),
    )


def _commented(code: str, comment: str) -> str:
    return f"        {code}  # {comment}"


def _definitions(architecture: Architecture) -> list[str]:
    lines = []
    for part in (part for parts in _all_parts(architecture) for part in parts):
        lines.append(_commented(f"self.{part.name} = {part.definition}", f"{part.n_parameters:,} parameters"))
        if part.norm:
            lines.append(_commented(f"self.{part.norm} = nn.BatchNorm2d({part.channels})", f"{2 * part.channels:,}"))
    return lines


def _forward(architecture: Architecture) -> list[str]:
    lines = []
    last_conv = max(i for i, layer in enumerate(architecture.layers) if isinstance(layer, Conv))
    for index, (shape, parts) in enumerate(zip(architecture.shapes, _all_parts(architecture), strict=True)):
        if not parts:
            pool = "F.max_pool2d(x, 2)" if isinstance(shape.layer, MaxPool) else "x.mean((2, 3), keepdim=True)"
            lines.append(_commented(f"x = {pool}", f"(B, {shape.channels}, {shape.side}, {shape.side})"))
        for part in parts:
            out = f"(B, {part.channels}, {shape.side}, {shape.side})"
            lines.append(_commented(f"x = {_step(part, architecture.norm_first)}", out))
        if parts and shape.layer.activation and architecture.dropout and index != last_conv:
            dropout = "dropout" if architecture.elementwise_dropout else "dropout2d"
            lines.append(f"        x = F.{dropout}(x, {architecture.dropout}, self.training)")
    return lines


def _step(part: _Part, norm_first: bool) -> str:
    x = f"self.{part.name}(x)"
    if not part.activation:
        return x
    if part.norm is None:
        return f"F.relu({x})"
    return f"F.relu(self.{part.norm}({x}))" if norm_first else f"self.{part.norm}(F.relu({x}))"


_TEMPLATE = '''"""{headline}

    {line}

    python model.py                  # counts the parameters
    python model.py picture.png …    # says what the pictures show

Needs torch alone; with Pillow it reads every kind of picture, without it PNG. Written by nas-mnist.
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("weights.safetensors")
CLASSES = ({classes})
MEAN, STD = {mean}, {std}  # of the training images


class Model(nn.Module):
    """Images (B, 1, 28, 28), (x / 255 - {mean}) / {std} with the ink bright → logits (B, 10)."""

    def __init__(self):
        super().__init__()
{definitions}

    def forward(self, x: Tensor) -> Tensor:
{forward}
        return x.flatten(1)


def load(path: Path = WEIGHTS) -> Model:
    """The trained model, ready to use. A safetensors file is a length, a JSON header, and raw numbers."""
    content = path.read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + n]), bytearray(content[8 + n :])
    dtypes = {{"F32": torch.float32, "I64": torch.int64}}
    weights = {{
        name: torch.frombuffer(data[slice(*e["data_offsets"])], dtype=dtypes[e["dtype"]]).reshape(e["shape"])
        for name, e in header.items()
        if name != "__metadata__"
    }}
    model = Model()
    model.load_state_dict(weights)
    return model.eval()


{reading}

def read(path: str) -> Tensor:
    """A picture → grey (H, W), 0 to 1."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return read_png(Path(path).read_bytes())
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGBA").convert("LA")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(picture.height, -1, 2) / 255
    return on_paper(pixels[..., 0], pixels[..., 1])


@torch.no_grad()
def main(paths: list[str]) -> int:
    if not paths:
        print(f"{{sum(p.numel() for p in Model().parameters()):,}} parameters")
        return 0
    try:
        model, failed = load(), 0
    except (OSError, ValueError, KeyError, RuntimeError, struct.error):
        print(f"{{WEIGHTS}} is missing or damaged: put it beside model.py again", file=sys.stderr)
        return 2
    for path in paths:
        try:
            image = prepare(read(path), mean=MEAN, std=STD, side={side}, by_mass={by_mass})
            probabilities = model(image).softmax(1)[0]
        except (OSError, ValueError, SyntaxError) as error:  # Pillow calls some damaged files a SyntaxError
            print(f"{{path}}: {{error}}", file=sys.stderr)
            failed = 2
        else:
            print(f"{{path}}: {{CLASSES[probabilities.argmax()]}} ({{probabilities.max().item():.1%}})")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''
