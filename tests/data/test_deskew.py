import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas_mnist.data.datasets import MNIST
from nas_mnist.data.deskew import deskew, upright
from nas_mnist.data.images import load_test, load_train
from nas_mnist.training.augmentation import normalise


def by_hand(image):
    """The definition, pixel by pixel in fractions: (28, 28) whole numbers."""
    ink = {(y, x): Fraction(image[y][x]) for y in range(28) for x in range(28) if image[y][x]}
    mass = sum(ink.values()) or 1
    cy, cx = (sum(v * at[axis] for at, v in ink.items()) / mass for axis in (0, 1))
    variance = sum(v * (y - cy) ** 2 for (y, _), v in ink.items())
    slope = sum(v * (y - cy) * (x - cx) for (y, x), v in ink.items()) / variance if variance else Fraction(0)
    slope = min(max(slope, Fraction(-2)), Fraction(2))
    out = [[0] * 28 for _ in range(28)]
    for y in range(28):
        pixels, part = divmod(math.floor(16 * slope * (y - cy) + Fraction(1, 2)), 16)
        for x in range(28):
            left, right = (ink.get((y, x + pixels + i), 0) for i in (0, 1))
            out[y][x] = math.floor(((16 - part) * left + part * right + 8) / 16)
    return out


def slant(image):
    """By how many columns the ink leans for each row."""
    ink, at = image.double(), torch.arange(28.0, dtype=torch.float64)
    mass = ink.sum()
    y, x = (ink.sum(1) @ at) / mass, (ink.sum(0) @ at) / mass
    return (((at - y)[:, None] * (at - x) * ink).sum() / ((at - y).square()[:, None] * ink).sum()).item()


def test_it_is_the_definition_on_images(images):
    pixels = images.pixels[:60]
    assert deskew(pixels).tolist() == [by_hand(image.tolist()) for image in pixels]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.integers(0, 40), rows=st.integers(1, 28), largest=st.sampled_from((1, 17, 255)))
def test_it_is_the_definition_on_anything(seed, n, rows, largest):
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(28, 28, dtype=torch.uint8)
    places = torch.randint(rows, (n,), generator=generator), torch.randint(28, (n,), generator=generator)
    image[places] = torch.randint(1, largest + 1, (n,), generator=generator, dtype=torch.uint8)
    assert deskew(image[None])[0].tolist() == by_hand(image.tolist())


def test_digits_stand_upright_and_lose_no_ink(images):
    pixels = images.pixels[images.indices[:300]]
    made = deskew(pixels)
    before, after = (sum(abs(slant(image)) for image in each) / 300 for each in (pixels, made))
    assert before > 0.15 and after < 0.01
    assert ((made.sum((1, 2)) / pixels.double().sum((1, 2))) - 1).abs().max() < 0.01


BLANK, FULL, LINE = torch.zeros(28, 28), torch.full((28, 28), 255.0), 255 * torch.eye(28)[13].expand(28, 28)


@pytest.mark.parametrize("image", [BLANK, FULL, LINE, LINE.T])
def test_what_does_not_lean_stays_as_it_is(image):
    assert torch.equal(deskew(image[None])[0], image.double())


def test_normalised_images_are_made_upright_as_their_bytes_are(images):
    pixels, like = images.pixels[:50], MNIST.normalisation
    expected = normalise(deskew(pixels).to(torch.uint8), like)
    torch.testing.assert_close(upright(normalise(pixels, like), like.mean, like.std), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("load", [load_train, load_test])
def test_unpacked_data_has_them_ready(load, data_dir):
    images = load(data_dir)
    made, part = images.deskewed(), images.part(torch.tensor([3, 8])).deskewed()
    some = torch.arange(0, len(images), 997)
    assert torch.equal(made.pixels[some], deskew(images.pixels[some]).to(torch.uint8))
    assert torch.equal(made.deskewed().pixels[:9], made.pixels[:9])
    assert torch.equal(part.select(torch.tensor([1]))[0], made.pixels[8:9])
