"""What a network is given of an image: upright or as it is, moved at random, normalised; whole batches on a device."""

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from nas_mnist.data.datasets import Normalisation
from nas_mnist.data.images import Images
from nas_mnist.model.network import Network


@dataclass(frozen=True)
class Augmentation:
    """Half-widths of the ranges that each image's transform is drawn from, uniformly."""

    rotation_degrees: float = 10.0
    translation: float = 0.06  # of the image's side, each axis
    scale: float = 0.1  # 0.1: between 0.9 and 1.1 times
    shear_degrees: float = 8.0  # along the x axis

    def __bool__(self) -> bool:
        return any((self.rotation_degrees, self.translation, self.scale, self.shear_degrees))

    def times(self, strength: float) -> "Augmentation":
        """The same with all ranges so many times as wide."""
        return replace(self, **{name: strength * value for name, value in asdict(self).items()})


def seen_by(network: Network, images: Images) -> Images:
    """The images as the network's first layer is given them: upright, if its line says `deskew`.

    It is done once, before any augmentation: a network has no weights before it.
    """
    return images.deskewed() if network.architecture.deskewed else images


def normalise(pixels: Tensor, normalisation: Normalisation) -> Tensor:
    """Pixels (B, 28, 28) uint8 → images (B, 1, 28, 28) float32 with mean 0 and standard deviation 1."""
    return pixels.unsqueeze(1).to(torch.float32).div_(255).sub_(normalisation.mean).div_(normalisation.std)


def augment(
    pixels: Tensor, augmentation: Augmentation, normalisation: Normalisation, generator: torch.Generator
) -> Tensor:
    """Pixels (B, 28, 28) uint8 → images (B, 1, 28, 28) float32, each transformed on its own, normalised."""
    if not augmentation:
        return normalise(pixels, normalisation)
    matrices = draw_matrices(len(pixels), pixels.shape[-1], augmentation, generator)
    return affine(pixels, matrices, normalisation)


def draw_matrices(n: int, side: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """`n` inverse matrices (n, 2, 3) drawn from the ranges of the augmentation."""
    u = torch.rand((5, n), generator=generator, device=generator.device) * 2 - 1
    return inverse_matrices(
        angle=u[0] * math.radians(augmentation.rotation_degrees),
        translate_x=u[1] * augmentation.translation * side,
        translate_y=u[2] * augmentation.translation * side,
        scale=1 + u[3] * augmentation.scale,
        shear=u[4] * math.radians(augmentation.shear_degrees),
    )


def inverse_matrices(
    *, angle: Tensor, translate_x: Tensor, translate_y: Tensor, scale: Tensor, shear: Tensor
) -> Tensor:
    """Matrices (B, 2, 3) from an output pixel to the input pixel it shows, both counted from the image's centre.

    Angles in radians, shifts in pixels; all (B,). The conventions are those of torchvision's `affine` with its shear
    along x: rotate and shear, scale, then translate.
    """
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    a, b = cos / scale, (cos * tan + sin) / scale
    c, d = -sin / scale, (cos - sin * tan) / scale
    # The inverse of [cos, -cos·tan − sin; sin, cos − sin·tan] has determinant 1, so its entries only change places.
    top = torch.stack((d, b, -(d * translate_x + b * translate_y)), dim=-1)
    bottom = torch.stack((c, a, -(c * translate_x + a * translate_y)), dim=-1)
    return torch.stack((top, bottom), dim=-2)


def affine(pixels: Tensor, matrices: Tensor, normalisation: Normalisation) -> Tensor:
    """Apply inverse matrices (B, 2, 3) to pixels (B, 28, 28) uint8: (B, 1, 28, 28), normalised.

    Bilinear, black outside.
    """
    side = pixels.shape[-1]
    theta = torch.cat((matrices[..., :2], matrices[..., 2:] * (2 / side)), dim=-1)  # grid_sample counts in half sides
    grid = F.affine_grid(theta, [len(pixels), 1, side, side], align_corners=False)
    images = pixels.unsqueeze(1).to(torch.float32).div_(255)
    return F.grid_sample(images, grid, align_corners=False).sub_(normalisation.mean).div_(normalisation.std)
