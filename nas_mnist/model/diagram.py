"""An architecture as a picture: a row of feature maps, the operations between them, as SVG that needs nothing else.

Each map is a box, as tall as its side and as thick as it has channels. The picture brings its own background, light or
dark as the reader prefers, so it can be read on any page.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from nas_mnist.model.architecture import INPUT_CHANNELS, INPUT_SIDE, Architecture, Conv, LayerShape, MaxPool

MAPS_PER_ROW = 12
# Lengths in units of the picture, which are CSS pixels at its natural size.
PIXEL = 3.0  # of a map
THINNEST, THICKEST = 3.0, 36.0  # boxes of 1 channel and of the most channels; 32 and fewer take the same scale
SLANT_X, SLANT_Y = 0.30, 0.20  # how far the back of a box is shifted right and up, as a share of its height
CHARACTER = 7.1  # of the labels, guessed wide: the font is the reader's
GAP, MARGIN, OPERATION_HEIGHT, LABEL_HEIGHT = 12.0, 12.0, 28.0, 34.0

STYLE = """
.nn-card{fill:#f7f8fa;stroke:#d5d9e0}
.nn-size{fill:#1b1f27}
.nn-token{fill:#566073;font-family:ui-monospace,monospace}
.nn-flow{stroke:#7d8695;fill:none}
@media(prefers-color-scheme:dark){
.nn-card{fill:#1b1f27;stroke:#3a4150}
.nn-size{fill:#f2f4f8}
.nn-token{fill:#aeb7c6}
}
""".replace("\n", "")


class Operation(NamedTuple):
    """What is written between two maps; `ink` is the colour that is legible on the `fill`."""

    name: str
    fill: str
    ink: str


@dataclass(frozen=True)
class Map:
    """One feature map, the operation that made it, and its place in the notation."""

    channels: int
    side: int
    token: str
    operation: Operation
    hint: str

    @property
    def size(self) -> str:
        return f"{self.channels}×{self.side}×{self.side}"

    @property
    def height(self) -> float:
        return self.side * PIXEL

    @property
    def reach(self) -> float:
        """Height with the slant."""
        return self.height * (1 + SLANT_Y)

    def thickness(self, most_channels: int) -> float:
        return THINNEST + (THICKEST - THINNEST) * (self.channels - 1) / max(most_channels - 1, 31)

    @property
    def longest_label(self) -> float:
        return CHARACTER * max(len(self.size), len(self.token), len(self.operation.name) + 2)


def svg(architecture: Architecture) -> str:
    """The network as an SVG element: its maps from the image to the logits, each labelled channels×side×side."""
    maps = [_image(), *(_map(number, shape) for number, shape in enumerate(architecture.shapes, 1))]
    most = max(m.channels for m in maps)
    widest = max(m.thickness(most) + m.height * SLANT_X for m in maps)
    pitch = max(widest, *(m.longest_label for m in maps)) + GAP
    per_row = ceil(len(maps) / ceil(len(maps) / MAPS_PER_ROW))
    width, top, parts = 2 * MARGIN + pitch * per_row, MARGIN, []
    for start in range(0, len(maps), per_row):
        row = maps[start : start + per_row]
        room = max(m.reach for m in row)
        centres = [MARGIN + pitch * (i + 0.5) for i in range(len(row))]
        parts.append(_flow(0 if start else centres[0], centres[-1] if row[-1] is maps[-1] else width, top))
        parts += [_draw(m, centre, top, room, most) for m, centre in zip(row, centres, strict=True)]
        top += OPERATION_HEIGHT + room + LABEL_HEIGHT + MARGIN
    return _document(str(architecture), width, top, parts)


def _flow(start: float, end: float, top: float) -> str:
    """The line that the operations of a row are strung on; it runs out of the picture where another row follows."""
    return f'<path class="nn-flow" d="M{start:.1f} {top + 9:.1f}H{end:.1f}"/>'


def _document(name: str, width: float, height: float, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{name}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui,sans-serif" '
        f'font-size="11" text-anchor="middle"><style>{STYLE}</style>'
        f'<rect class="nn-card" x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8"/>'
        f"{''.join(parts)}</svg>"
    )


# Fills that are told apart in every kind of colour vision (Okabe and Ito), each with the ink of the greater contrast.
INPUT = Operation("image", "#999999", "#000")
POOL = Operation("max-pool", "#cc79a7", "#000")
GLOBAL_POOL = Operation("mean", "#d55e00", "#000")
CONVOLUTION, POINTWISE, SEPARABLE = ("#0072b2", "#fff"), ("#e69f00", "#000"), ("#009e73", "#000")


def _operation(layer) -> Operation:
    if isinstance(layer, MaxPool):
        return POOL
    if not isinstance(layer, Conv):
        return GLOBAL_POOL
    colours = SEPARABLE if layer.separable else POINTWISE if layer.kernel == 1 else CONVOLUTION
    name = "sep " * layer.separable + f"{layer.kernel}×{layer.kernel}" + f" /{layer.stride}" * (layer.stride > 1)
    return Operation(name, *colours)


def _image() -> Map:
    return Map(INPUT_CHANNELS, INPUT_SIDE, "", INPUT, "the image")


def _map(number: int, shape: LayerShape) -> Map:
    hint = f"layer {number}, {shape.layer}: {shape.n_parameters:,} parameters, receptive field {shape.receptive_field}"
    return Map(shape.channels, shape.side, str(shape.layer), _operation(shape.layer), hint)


def _draw(m: Map, centre: float, top: float, room: float, most_channels: int) -> str:
    """One column: the operation, the map that it makes, and the labels below."""
    bottom = top + OPERATION_HEIGHT + room
    thickness, dx, dy = m.thickness(most_channels), m.height * SLANT_X, m.height * SLANT_Y
    label = CHARACTER * (len(m.operation.name) + 2)
    text = f'<text x="{centre:.1f}" y="{{:.1f}}" {{}}>{{}}</text>'
    return (
        f"<g><title>{m.hint}</title>"
        f'<rect x="{centre - label / 2:.1f}" y="{top:.1f}" width="{label:.1f}" height="18" rx="9" '
        f'fill="{m.operation.fill}"/>'
        + text.format(top + 12.8, f'fill="{m.operation.ink}" font-weight="600"', m.operation.name)
        + _box(centre - (thickness + dx) / 2, bottom - (room - m.reach) / 2, thickness, m.height, dx, dy, m.operation)
        + text.format(bottom + 17, 'class="nn-size"', m.size)
        + text.format(bottom + 31, 'class="nn-token"', m.token)
        + "</g>"
    )


def _box(x: float, y: float, thickness: float, height: float, dx: float, dy: float, operation: Operation) -> str:
    """A cuboid whose front's lower left corner is (x, y); its right side is the map, seen at an angle."""
    faces = (
        (1.0, f"M{x:.1f} {y:.1f}v{-height:.1f}h{thickness:.1f}v{height:.1f}z"),
        (0.5, f"M{x:.1f} {y - height:.1f}l{dx:.1f} {-dy:.1f}h{thickness:.1f}l{-dx:.1f} {dy:.1f}z"),
        (0.7, f"M{x + thickness:.1f} {y:.1f}l{dx:.1f} {-dy:.1f}v{-height:.1f}l{-dx:.1f} {dy:.1f}z"),
    )
    paths = "".join(f'<path fill-opacity="{opacity}" d="{d}"/>' for opacity, d in faces)
    return f'<g fill="{operation.fill}" stroke="{operation.fill}" stroke-linejoin="round">{paths}</g>'
