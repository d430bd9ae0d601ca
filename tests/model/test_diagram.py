"""The picture of an architecture."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from nas_mnist.model import diagram
from nas_mnist.model.architecture import parse
from nas_mnist.model.zoo import ZOO
from nas_mnist.study import space

SVG = "{http://www.w3.org/2000/svg}"
LONGEST = "c7p1 d8p1 d9p1 d11p1 M c8k1 d12p1 d14p1 d16p1 d19p1 M c15k1 d22p1 d25p1 d30p1 d34p1 G c34k1 c10k1-"
EXAMPLES = {name: str(ZOO[name].architecture) for name in ("step-by-step", "era1a7", "eva6s4-ultrasmall")} | {
    "longest of the space": LONGEST,
    "smallest of the space": "c2 M c2 G c10k1-",
    "one layer": "c10k28-",
    "very wide": "c64 c1024k1 G c10k1+b-",
}


def _texts(picture: str, kind: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(picture).iter(f"{SVG}text") if kind in text.attrib]


@pytest.mark.parametrize("name", ZOO)
def test_every_map_is_labelled_with_its_size_and_its_token(name):
    architecture = ZOO[name].architecture
    labels = [
        t.text for t in ElementTree.fromstring(diagram.svg(architecture)).iter(f"{SVG}text") if "class" in t.attrib
    ]
    expected = ["1×28×28", None]
    for shape in architecture.shapes:
        expected += [f"{shape.channels}×{shape.side}×{shape.side}", str(shape.layer)]
    assert labels == expected


def test_operations_are_named_and_told_apart_by_colour():
    picture = diagram.svg(parse("c8 d16s2 M c8k1 G c10k1-"))
    assert _texts(picture, "fill") == ["image", "3×3", "sep 3×3 /2", "max-pool", "1×1", "mean", "1×1"]
    root = ElementTree.fromstring(picture)
    fills = [rect.attrib["fill"] for rect in root.iter(f"{SVG}rect") if "fill" in rect.attrib]
    assert len(set(fills)) == 6 and fills[4] == fills[6]


@pytest.mark.parametrize("token", ["c8", "d8", "c8k1", "M", "G"])
def test_operations_are_legible_on_their_colour(token):
    operation = diagram._operation(parse(f"c8 {token} c10k1- G").layers[1])
    assert _contrast(operation.fill, operation.ink) >= 4.5


def _contrast(*colours: str) -> float:
    """Of two hexadecimal colours, as WCAG 2 defines it."""
    luminances = []
    for colour in colours:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_box_is_as_tall_as_the_map_and_as_thick_as_its_channels():
    fronts = re.findall(r'fill-opacity="1.0" d="M\S+ \S+?v-([\d.]+)h([\d.]+)', diagram.svg(parse(EXAMPLES["era1a7"])))
    shapes = [(28, 1), *((s.side, s.channels) for s in ZOO["era1a7"].architecture.shapes)]
    heights, thicknesses = ([float(front[i]) for front in fronts] for i in (0, 1))
    assert heights == [pytest.approx(3 * side) for side, _ in shapes]
    in_order = sorted(zip((channels for _, channels in shapes), thicknesses, strict=True))
    assert all(a[1] < b[1] if a[0] < b[0] else a[1] == b[1] for a, b in pairwise(in_order))


def test_a_picture_needs_nothing_from_elsewhere():
    picture = diagram.svg(parse(LONGEST))
    assert re.findall(r"https?://[^\"]+", picture) == ["http://www.w3.org/2000/svg"]
    assert "href" not in picture and "url(" not in picture


def test_the_longest_network_of_the_space_is_among_the_examples():
    highest = {name: getattr(d, "high", None) or d.choices[-1] for name, d in space.distributions().items()} | {
        "transition": "M c",
        "head": "G c c10k1-",
    }
    assert str(space.to_candidate(highest, max_params=8000, epochs=15).architecture.line) == LONGEST


@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
def test_labels_overlap_nowhere_and_nothing_sticks_out(page, screenshots, colour_scheme):
    page.emulate_media(color_scheme=colour_scheme)
    background = {"light": "#fff", "dark": "#111"}[colour_scheme]
    pictures = "".join(f"<p>{diagram.svg(parse(line))}</p>" for line in EXAMPLES.values())
    page.set_content(f'<body style="background:{background}">{pictures}')
    page.screenshot(path=screenshots / f"drawings-{colour_scheme}.png", full_page=True)
    svgs = page.evaluate(
        "[...document.querySelectorAll('svg')].map(svg => [svg, ...svg.querySelectorAll('text')].map("
        "e => (r => [r.left, r.top, r.right, r.bottom])(e.getBoundingClientRect())))"
    )
    assert len(svgs) == len(EXAMPLES)
    for outer, *texts in svgs:
        texts = [box for box in texts if box[0] < box[2]]
        assert texts and all(_inside(box, outer) for box in texts)
        assert not [(a, b) for i, a in enumerate(texts) for b in texts[:i] if _overlap(a, b)]


def _inside(box, outer) -> bool:
    return outer[0] <= box[0] and outer[1] <= box[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] + 2 < b[3] and b[1] + 2 < a[3]  # 2: the line boxes' own leading
