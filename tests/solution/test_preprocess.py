import struct
import zlib

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from nas_mnist.cli import main as cli
from nas_mnist.solution import predict
from nas_mnist.solution.preprocess import on_paper, paper, prepare, read_png


@pytest.fixture
def digit(images):
    """A five, ink bright, 112×112."""
    five = images.pixels[0][None, None] / 255
    return F.interpolate(five, size=(112, 112), mode="bilinear")[0, 0]


def placed(digit, height=160, width=240):
    page = torch.zeros(height, width)
    page[30:142, 120:232] = digit
    return page


def save(grey, path, **options):
    Image.fromarray((grey * 255).round().to(torch.uint8).numpy()).save(path, **options)
    return str(path)


def test_paper_in_uneven_light_is_no_ink(digit):
    page = placed(digit)
    even = prepare(1 - 0.75 * page)
    light = torch.linspace(0.6, 1, page.shape[1]) * torch.linspace(0.9, 1, page.shape[0])[:, None]
    uneven = prepare((1 - 0.75 * page) * light)
    assert (uneven - even).abs().mean() < 0.1  # of a range of 3.2
    assert (prepare(0.1 + 0.6 * page * light) - even).abs().mean() < 0.15


def test_ink_at_the_border_does_not_pass_for_a_slope_of_the_light(digit):
    rows, columns = (torch.nonzero(digit.sum(axis)).flatten() for axis in (1, 0))
    tight = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert paper(1 - tight).shape == () and paper(1 - tight) == 1
    assert (prepare(1 - tight) - prepare(placed(digit))).abs().mean() < 0.05


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2)])
def test_smallest_pictures_have_no_digit_or_an_image(shape):
    with pytest.raises(ValueError, match="all pixels are alike"):
        prepare(torch.full(shape, 0.7))
    if shape != (1, 1):
        spot = torch.zeros(shape)
        spot[-1, -1] = 1
        assert prepare(spot).isfinite().all()


def test_light_ink_on_nothing_lies_on_black_paper_and_dark_ink_on_white(digit):
    white, black = torch.ones_like(digit), torch.zeros_like(digit)
    torch.testing.assert_close(on_paper(white, digit), digit)
    torch.testing.assert_close(on_paper(black, digit), 1 - digit)
    torch.testing.assert_close(on_paper(digit, white), digit)  # opaque: left as it is


def test_picture_is_turned_as_its_camera_says(digit, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter to the right to see it upright
    turned = save(1 - digit.rot90(1), tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = save(1 - digit, tmp_path / "upright.png")
    assert (predict._grey(turned) - predict._grey(upright)).abs().mean() < 0.02


def test_picture_far_too_large_is_one_line_and_no_warning(solution, tmp_path, capsys, recwarn):
    Image.new("1", (12_000, 9_000)).save(tmp_path / "huge.png")
    assert cli.main(["predict", str(solution), str(tmp_path / "huge.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not recwarn.list


def png(width, height, rows, *, n_bytes=None):
    """A grey PNG whose filtered rows are given as they are."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return (b"\x89PNG\r\n\x1a\n" + content)[:n_bytes]


def test_every_png_filter_is_undone_as_pillow_does(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (10, 8), generator=generator, dtype=torch.uint8)
    rows[:, 0] = torch.arange(10) % 5  # the filter of each row
    content = png(7, 10, rows.numpy().tobytes())
    (tmp_path / "x.png").write_bytes(content)
    torch.testing.assert_close(read_png(content), predict._grey(str(tmp_path / "x.png")))


@pytest.mark.parametrize(
    "content",
    [
        png(4, 4, b"\0" * 7),  # too few rows
        png(4, 4, b"\x09" * 20),  # no such filter
        png(4, 4, b"\0" * 20, n_bytes=12),
        png(4, 4, b"\0" * 20, n_bytes=30),
        png(4, 4, b"\0" * 20, n_bytes=33),
        png(4, 4, b"\0" * 20, n_bytes=44),
        png(0, 0, b""),
    ],
    ids=["too few rows", "no such filter", "no header", "half a header", "no pixels", "cut pixels", "0×0"],
)
def test_damaged_png_is_called_damaged(content):
    with pytest.raises(ValueError, match="this PNG file is damaged"):
        read_png(content)


@pytest.mark.parametrize("side", [20, 24, 28])
def test_box_and_place_are_those_of_the_dataset(side):
    grey = torch.ones(60, 90)
    grey[10:50, 20:40] = 0.0
    grey[10:20, 40:60] = 0.0  # heavier on the left
    ink = prepare(grey, mean=0.0, std=1.0, side=side, by_mass=False)[0, 0] > 0.5
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    for found in (rows, columns):
        assert len(found) == side and found[0] + found[-1] == 27
    assert torch.equal(prepare(grey), (prepare(grey, mean=0.0, std=1.0) - 0.1307) / 0.3081)
