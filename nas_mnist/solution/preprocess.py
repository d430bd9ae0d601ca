"""A picture of a digit, prepared as MNIST was. Torch alone: `export` copies this source into `model.py`."""

import struct
import zlib

import torch
from torch import Tensor
from torch.nn import functional as F

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")  # Pillow would start other programs to read some others


def prepare(grey: Tensor, *, mean: float = 0.1307, std: float = 0.3081, side: int = 20, by_mass: bool = True) -> Tensor:
    """A grey picture (H, W), 0 to 1, dark on light or light on dark → an image (1, 1, 28, 28), normalised.

    The ink is bright, fits a box of `side` pixels, and has its centre of mass, or else the box's, in the middle of
    28×28; by default as in MNIST. Raises ValueError if there is no ink.
    """
    if not grey.isfinite().all():
        raise ValueError("not a picture: some of its pixels are no numbers")
    ink = (grey - paper(grey)).abs()
    if ink.max() < 0.1:
        raise ValueError("no digit to see: all pixels are alike")
    ink = ink / ink.max()
    rows, columns = (torch.nonzero((ink > 0.2).any(axis)).flatten() for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(n * side / max(ink.shape))) for n in ink.shape]
    box = F.interpolate(ink[None, None], size=size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    mass = box if by_mass else torch.ones_like(box)
    top, left = centred(mass.sum(1)), centred(mass.sum(0))
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, top : top + size[0], left : left + size[1]] = box
    return (image - mean) / std


def paper(grey: Tensor) -> Tensor:
    """How bright the paper is, without the ink: (H, W) → (H, W), or one number if the light is even.

    The paper shows at the border. A plane is fitted to it by least absolute deviations (least squares, reweighted),
    which a stroke that touches the border hardly moves; it is kept if it fits much better than the median does.
    """

    def border(x: Tensor) -> Tensor:
        return torch.cat((x[0], x[-1], x[:, 0], x[:, -1]))

    height, width = grey.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack((torch.ones_like(x), x, y), -1)
    seen = border(grey)
    weights = torch.ones_like(seen)
    for _ in range(5):
        plane = torch.linalg.lstsq(border(terms) * weights[:, None], (seen * weights)[:, None]).solution
        off_plane = ((border(terms) @ plane)[:, 0] - seen).abs()
        weights = (off_plane + 0.02).rsqrt()
    off_median = (seen - seen.median()).abs()
    return (terms @ plane)[..., 0] if off_plane.mean() < off_median.mean() / 2 else seen.median()


def centred(mass: Tensor) -> int:
    """Where to begin in 28 pixels so that the centre of mass comes to the middle."""
    centre = (mass * torch.arange(len(mass))).sum() / mass.sum()
    return max(0, min(28 - len(mass), round(13.5 - centre.item())))


def on_paper(grey: Tensor, opacity: Tensor) -> Tensor:
    """A transparent picture, both (H, W), 0 to 1, laid on white paper, or on black if nothing in it is dark."""
    is_dark = (opacity * (1 - grey)).max() >= 0.5
    return grey * opacity + is_dark * (1 - opacity)


def read_png(content: bytes) -> Tensor:
    """A PNG file of 8 bits a channel, not interlaced → grey (H, W), 0 to 1.

    Raises ValueError for any other file. The format: https://www.w3.org/TR/png/
    """
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a PNG file; install Pillow to read others")
    try:
        return decode_png(content)
    except (KeyError, IndexError, RuntimeError, struct.error, zlib.error):
        raise ValueError("this PNG file is damaged") from None


def decode_png(content: bytes) -> Tensor:
    chunks, position = {b"IDAT": b""}, 8
    while position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        chunks[kind] = chunks.get(kind, b"") + content[position + 8 : position + 8 + length]
        position += length + 12
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    if depth != 8 or interlace or colour not in (0, 2, 4, 6):
        raise ValueError("this kind of PNG needs Pillow: install it, or save with 8 bits a channel")
    if not width * height:
        raise IndexError("no pixels")
    if width * height > 4_000_000:
        raise ValueError(f"{width}×{height} pixels are too many for a digit: make it smaller")
    n_channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    n_bytes = height * (width * n_channels + 1)
    data = zlib.decompressobj().decompress(chunks[b"IDAT"], n_bytes)  # no more, whatever it holds
    data = unfilter(data, height, width * n_channels, n_channels)
    pixels = torch.frombuffer(data, dtype=torch.uint8).reshape(height, width, n_channels) / 255
    weights = torch.tensor([0.299, 0.587, 0.114]) if colour in (2, 6) else torch.ones(1)
    grey = (pixels[..., : len(weights)] * weights).sum(-1)
    return on_paper(grey, pixels[..., -1]) if colour in (4, 6) else grey


def unfilter(data: bytes, height: int, stride: int, step: int) -> bytearray:
    """Undo the filter of each row of a PNG: a byte is a difference to the ones left of it and above."""
    rows, above = bytearray(), bytearray(stride)
    for y in range(height):
        kind, row = data[y * (stride + 1)], bytearray(data[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for i in range(stride):
            left, up, corner = (row[i - step], above[i], above[i - step]) if i >= step else (0, above[i], 0)
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda value: abs(guess - value))
            row[i] = (row[i] + (0, left, up, (left + up) // 2, paeth)[kind]) & 255
        rows += row
        above = row
    return rows
