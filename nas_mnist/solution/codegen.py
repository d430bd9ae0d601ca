"""Architecture → the source of a module that a person could have written, and the names its weights have there."""

import inspect

from nas_mnist.data.datasets import CUSTOMARY, MNIST, Dataset, Normalisation
from nas_mnist.data.deskew import deskew, upright
from nas_mnist.model.architecture import Architecture, Conv
from nas_mnist.solution import preprocess
from nas_mnist.solution.walk import Convolution, Pool, Step, walk

_READING = (
    preprocess.prepare,
    preprocess.paper,
    preprocess.centred,
    preprocess.on_paper,
    preprocess.read_png,
    preprocess.decode_png,
    preprocess.unfilter,
)

_DESKEWING = (deskew, upright)


def _convolutions(architecture: Architecture) -> list[Convolution]:
    return [step for steps in walk(architecture) for step in steps if isinstance(step, Convolution)]


def _definition(conv: Convolution) -> str:
    options = f", stride={conv.stride}" * (conv.stride != 1) + f", padding={conv.padding}" * (conv.padding != 0)
    options += f", groups={conv.groups}" * conv.is_depthwise + ", bias=False" * (not conv.bias)
    return f"nn.Conv2d({conv.in_channels}, {conv.channels}, {conv.kernel}{options})"


def weight_names(architecture: Architecture) -> dict[str, str]:
    """For each name in the built network's state dict its name in `model.py`."""
    names = {}
    for conv in _convolutions(architecture):
        names[f"{conv.source}.weight"] = f"{conv.name}.weight"
        if conv.bias:
            names[f"{conv.source}.bias"] = f"{conv.name}.bias"
        if conv.norm:
            for field in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                names[f"{conv.norm_source}.{field}"] = f"{conv.norm}.{field}"
    return names


def generate(
    architecture: Architecture,
    headline: str,
    dataset: Dataset = MNIST,
    normalisation: Normalisation = CUSTOMARY,
) -> str:
    """The source of `model.py`: imports torch and the standard library; Pillow is used for images if it is there."""
    return _TEMPLATE.format(
        headline=headline,
        mean=normalisation.mean,
        std=normalisation.std,
        side=dataset.box,
        formats=", ".join(f'"{name}"' for name in preprocess.FORMATS),
        by_mass=dataset.by_mass,
        classes=", ".join(f'"{name}"' for name in dataset.classes),
        line=str(architecture),
        definitions="\n".join(_definitions(architecture)),
        forward="\n".join(_forward(architecture)),
        deskewing="".join(f"{inspect.getsource(each)}\n\n" for each in _DESKEWING) * architecture.deskewed,
        reading="\n\n".join(inspect.getsource(function) for function in _READING),
    )


def _commented(code: str, comment: str) -> str:
    return f"        {code}  # {comment}"


def _definitions(architecture: Architecture) -> list[str]:
    lines = []
    for conv in _convolutions(architecture):
        lines.append(_commented(f"self.{conv.name} = {_definition(conv)}", f"{conv.n_parameters:,} parameters"))
        if conv.norm:
            lines.append(_commented(f"self.{conv.norm} = nn.BatchNorm2d({conv.channels})", f"{2 * conv.channels:,}"))
    return lines


def _forward(architecture: Architecture) -> list[str]:
    lines = [_commented("x = upright(x, MEAN, STD)", "(B, 1, 28, 28)")] * architecture.deskewed
    for index, (layer, steps) in enumerate(zip(architecture.layers, walk(architecture), strict=True)):
        for step in steps:
            out = f"(B, {step.channels}, {step.side}, {step.side})"
            lines.append(_commented(f"x = {_call(step, architecture)}", out))
        if isinstance(layer, Conv) and layer.activation and architecture.dropout and index != architecture.last_conv:
            dropout = "dropout" if architecture.elementwise_dropout else "dropout2d"
            lines.append(f"        x = F.{dropout}(x, {architecture.dropout}, self.training)")
    return lines


def _call(step: Step, architecture: Architecture) -> str:
    if isinstance(step, Pool):
        return "F.max_pool2d(x, 2)" if step.is_max else "x.mean((2, 3), keepdim=True)"
    x = f"self.{step.name}(x)"
    if not step.activation:
        return x
    activation = f"F.{architecture.activation}"
    if step.norm is None:
        return f"{activation}({x})"
    if architecture.norm_first:
        return f"{activation}(self.{step.norm}({x}))"
    return f"self.{step.norm}({activation}({x}))"


_TEMPLATE = '''"""{headline}

    {line}

    python model.py                  # counts the parameters
    python model.py picture.png …    # says what the pictures show

Needs torch alone; with Pillow it reads the usual kinds of pictures, without it PNG. Written by nas-mnist.
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
FORMATS = ({formats})  # Pillow would start other programs to read some others


{deskewing}class Model(nn.Module):
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
    with Image.open(path, formats=FORMATS) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = picture.point(lambda value: value / 256)  # Pillow would cut off, not scale
        picture = picture.convert("RGBA").convert("LA")
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
        except Exception as error:  # a damaged file can make Pillow raise anything
            print(f"{{path}}: {{error}}", file=sys.stderr)
            failed = 2
            continue
        probabilities = model(image).softmax(1)[0]
        print(f"{{path}}: {{CLASSES[probabilities.argmax()]}} ({{probabilities.max().item():.1%}})")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''
