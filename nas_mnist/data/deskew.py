"""Images made upright. Torch alone: `export` copies this source into `model.py`."""

import torch
from torch import Tensor
from torch.nn import functional as F


def deskew(pixels: Tensor) -> Tensor:
    """Slanted writing upright: images (B, 28, 28) of whole numbers from 0 to 255, in any type → the same, in float64.

    Each row is moved sideways, in sixteenths of a pixel, so that the ink's columns and rows are no longer correlated;
    the centre of mass stays where it is. All is exact but two divisions, so every writer's code gives the same numbers.
    """
    ink, at = pixels.double(), torch.arange(28.0, dtype=torch.float64, device=pixels.device)
    mass = ink.sum((1, 2)).clamp(min=1)
    rows, columns = ink.sum(2) @ at, ink.sum(1) @ at
    covariance = mass * (ink @ at @ at) - rows * columns
    variance = mass * (ink.sum(2) @ at.square()) - rows.square()
    slope = (covariance / variance.clamp(min=1)).clamp(-2, 2)  # a single row has no slant
    shift = (16 * slope[:, None] * (at - (rows / mass)[:, None]) + 0.5).floor()
    whole = (shift / 16).floor()
    part = (shift - 16 * whole)[:, :, None]
    padded = F.pad(ink, (2, 2))  # what comes from beside the image is empty
    source = (at + whole[:, :, None] + 2).clamp(0, 30).long()
    left, right = padded.gather(2, source), padded.gather(2, source + 1)
    return (((16 - part) * left + part * right + 8) / 16).floor()


def upright(images: Tensor, mean: float, std: float) -> Tensor:
    """Normalised images (B, 1, 28, 28), of whole numbers from 0 to 255 before that → the same made upright."""
    pixels = ((images[:, 0] * std + mean) * 255).round().clamp(0, 255)
    return (deskew(pixels).unsqueeze(1).float() / 255 - mean) / std
