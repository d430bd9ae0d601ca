import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from nas_mnist.data.datasets import MNIST
from nas_mnist.training.augmentation import Augmentation, affine, augment, draw_matrices, inverse_matrices, normalise

LIKE = MNIST.normalisation

CASES = [  # degrees, pixels, pixels, factor, degrees
    (0, 0, 0, 1, 0),
    (10, 0, 0, 1, 0),
    (-90, 0, 0, 1, 0),
    (0, 2, -3, 1, 0),
    (0, 0, 0, 1.2, 0),
    (0, 0, 0, 1, 12),
    (-7, 3, 1, 0.85, 5),
]


@pytest.mark.parametrize("case", CASES)
def test_affine_is_that_of_torchvision(images, case):
    pixels = images.pixels[:7]
    angle, x, y, scale, shear = (torch.full((7,), float(value)) for value in case)
    matrices = inverse_matrices(angle=angle.deg2rad(), translate_x=x, translate_y=y, scale=scale, shear=shear.deg2rad())
    expected = reference.affine(
        pixels.unsqueeze(1) / 255,
        angle=case[0],
        translate=[case[1], case[2]],
        scale=case[3],
        shear=[case[4], 0.0],
        interpolation=InterpolationMode.BILINEAR,
    )
    torch.testing.assert_close(affine(pixels, matrices, LIKE), (expected - LIKE.mean) / LIKE.std, atol=5e-5, rtol=0)


def test_each_image_is_transformed_on_its_own_within_the_ranges():
    augmentation = Augmentation(rotation_degrees=0, translation=0.1, scale=0.2, shear_degrees=0)
    matrices = draw_matrices(2000, 28, augmentation, torch.Generator().manual_seed(0))
    scale = 1 / matrices[:, 0, 0]
    shift = -matrices[:, :, 2] * scale[:, None]
    assert matrices[:, 0, 1].abs().max() == 0
    assert 0.8 <= scale.min() < 0.81 and 1.19 < scale.max() <= 1.2
    assert 2.79 < shift.abs().max() <= 2.8 + 1e-5
    assert len(scale.unique()) > 1900


def test_no_augmentation_is_normalisation_alone(images):
    pixels = images.pixels[:3]
    nothing = Augmentation(0, 0, 0, 0)
    out = augment(pixels, nothing, LIKE, torch.Generator())
    assert out.shape == (3, 1, 28, 28) and out.dtype == torch.float32
    torch.testing.assert_close(out, (pixels.unsqueeze(1) / 255 - LIKE.mean) / LIKE.std)
    assert torch.equal(out, normalise(pixels, LIKE))


def test_same_generator_same_images(images):
    first, same = (augment(images.pixels[:9], Augmentation(), LIKE, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, same)
