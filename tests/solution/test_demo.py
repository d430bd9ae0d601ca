import base64
import json
import shutil
from dataclasses import replace

import pytest
import torch
from optuna import create_study
from optuna.samplers import RandomSampler
from torch.nn import functional as F

from nas_mnist.cli import main as cli
from nas_mnist.data.datasets import MNIST
from nas_mnist.data.deskew import deskew
from nas_mnist.data.images import load_test
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.model.zoo import ZOO
from nas_mnist.solution import demo, predict, preprocess
from nas_mnist.study.space import suggest, to_candidate
from nas_mnist.task import MAX_PARAMS
from nas_mnist.training.augmentation import normalise

MAX_BYTES = 500_000
MEAN, STD = MNIST.normalisation.mean, MNIST.normalisation.std
TOLERANCE = 1e-4
CLASSIFY = "pixels => classify(decodeBytes(pixels))"
# What the reference systems and the space leave out: other kernels and strides, biases, no norm, odd sides.
UNUSUAL = [
    "c4k5s2p2+b d6k5s3p1+br M d8p1+b c10p1- G",
    "c3k1+br d5p2 M d7s2r M c10+b- G | act-norm",
    "c6s3p1r M c8p1- d9k1 G c7k1+b c10k1-",
    "c10k28+b-",
    "c4p1 d6r M c8s2+b c10k1- G | hardswish",
    "c4p1 d6 M c10k1- G | hardswish deskew",
]


@pytest.fixture(scope="module")
def test_images(data_dir):
    return load_test(data_dir)


@pytest.fixture
def requests(page):
    """The addresses the page asks for."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    return asked


@pytest.fixture
def opened(page, requests, solution):
    """The page of the exported solution; in the end it has complained of nothing and asked for nothing but itself."""
    address = (solution / "demo.html").as_uri()
    page.goto(address)
    yield page
    assert page.complaints == [] and {url for url in requests if not url.startswith("data:")} == {address}


def encoded(pixels):
    return base64.b64encode(pixels.contiguous().numpy().tobytes()).decode()


def logits_of_page(page, pixels):
    return torch.tensor(page.evaluate(CLASSIFY, encoded(pixels)), dtype=torch.float64)


def logits_of_pytorch(network, pixels):
    seen = deskew(pixels) if network.architecture.deskewed else pixels
    with torch.no_grad():
        return network(normalise(seen, MNIST.normalisation)).double()


def random_network(architecture, seed):
    """Random weights, and norms as after a training: statistics, factors and summands of their own."""
    network = build(architecture, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.05, 0.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network


def page_of(network, test_images, predictions=None, **record):
    plain = dict.fromkeys(demo.FACTS, 0) | {"architecture": str(network.architecture), "int8": {"test_accuracy": 0}}
    predictions = test_images.labels if predictions is None else predictions
    return demo.page(network, plain | {"diverged_seeds": [], "runs": [None]} | record, MNIST, test_images, predictions)


def assert_agrees(page, tmp_path, test_images, architecture, seed):
    network = random_network(architecture, seed)
    (tmp_path / "demo.html").write_text(page_of(network, test_images), encoding="utf-8")
    page.goto((tmp_path / "demo.html").as_uri())
    pixels = test_images.pixels[:40]
    ours, theirs = logits_of_pytorch(network, pixels), logits_of_page(page, pixels)
    assert ours.std() > 1e-3  # a network that says the same of everything proves nothing
    assert (ours - theirs).abs().max() < TOLERANCE and torch.equal(ours.argmax(1), theirs.argmax(1))
    assert page.locator(".layer").count() == len(demo.layers(network)) and page.complaints == []


def test_logits_and_predictions_of_1000_test_images_are_those_of_pytorch(opened, solution, test_images):
    pixels = test_images.pixels[:1000]
    ours, theirs = logits_of_pytorch(predict.load(solution).network, pixels), logits_of_page(opened, pixels)
    difference = (ours - theirs).abs().max().item()
    assert theirs.shape == (1000, 10) and difference < TOLERANCE, difference
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


@pytest.mark.parametrize("name", ZOO)
def test_every_reference_system_gives_the_logits_of_pytorch(page, tmp_path, test_images, name):
    assert_agrees(page, tmp_path, test_images, ZOO[name].architecture, seed=1)


@pytest.mark.parametrize("line", UNUSUAL)
def test_every_kind_of_layer_gives_the_logits_of_pytorch(page, tmp_path, test_images, line):
    assert_agrees(page, tmp_path, test_images, parse(line), seed=2)


@pytest.mark.parametrize("seed", range(1, 17))  # 0 is a network whose channels are all dead before training
def test_networks_drawn_from_the_space_give_the_logits_of_pytorch(page, tmp_path, test_images, seed):
    parameters = suggest(create_study(sampler=RandomSampler(seed)).ask())
    architecture = to_candidate(parameters, max_params=MAX_PARAMS, epochs=1).architecture
    if seed % 2:
        architecture = replace(architecture, norm_first=False, activation="relu")
    assert_agrees(page, tmp_path, test_images, architecture, seed)


# --- drawing ---------------------------------------------------------------------------------------------------------

ONE = [[(0.5, 0.2), (0.5, 0.8)]]
SEVEN = [[(0.28, 0.24), (0.7, 0.24), (0.62, 0.42), (0.52, 0.6), (0.44, 0.82)]]
FOUR = [[(0.42, 0.16), (0.26, 0.56), (0.72, 0.56)], [(0.62, 0.3), (0.6, 0.86)]]


def points(page, stroke):
    box = page.locator("#pad").bounding_box()
    return [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]


def draw(page, strokes):
    for stroke in strokes:
        first, *others = points(page, stroke)
        page.mouse.move(*first)
        page.mouse.down()
        for point in others:
            page.mouse.move(*point, steps=8)
        page.mouse.up()
    settle(page)


def draw_by_touch(page, strokes):
    """Touch events of the browser itself, as from a finger."""
    session = page.context.new_cdp_session(page)
    for stroke in strokes:
        (x, y), *others = points(page, stroke)
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        for end in others:
            for k in range(1, 9):
                point = {"x": x + (end[0] - x) * k / 8, "y": y + (end[1] - y) * k / 8}
                session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
            x, y = end
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    settle(page)


def settle(page):
    """Wait for two frames of the screen: what was drawn is shown, and told to screen readers."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def heights(page):
    return page.evaluate("bars.map(({ fill }) => parseFloat(fill.style.height))")


def ink_on_pad(page):
    ink = page.evaluate("btoa(Array.from(ink(), v => String.fromCharCode(Math.round(255 * v))).join(''))")
    side = page.evaluate("PAD")
    return torch.frombuffer(bytearray(base64.b64decode(ink)), dtype=torch.uint8).reshape(side, side) / 255


@pytest.mark.parametrize("strokes", [ONE, SEVEN, FOUR], ids=["one", "seven", "four"])
def test_strokes_of_the_mouse_are_prepared_and_read_as_predict_does(opened, solution, strokes):
    assert heights(opened) == [0] * 10
    draw(opened, strokes)
    expected = preprocess.prepare(ink_on_pad(opened))
    image = torch.tensor(opened.evaluate("Array.from(shown.image)")).reshape(28, 28)
    assert ((image - MEAN) / STD - expected[0, 0]).abs().max() < 1e-3
    with torch.no_grad():
        probabilities = predict.load(solution).network(expected).softmax(1)[0]
    torch.testing.assert_close(torch.tensor(heights(opened)), 100 * probabilities, atol=0.05, rtol=0)
    assert opened.locator("#digit").inner_text() == str(probabilities.argmax().item())
    assert opened.locator("#status").inner_text().startswith(str(probabilities.argmax().item()))


@pytest.mark.parametrize("side", [28, 64, 448])  # enlarged, made smaller, and much smaller
def test_any_ink_is_prepared_as_predict_does(opened, test_images, side):
    script = "([ink, side]) => Array.from(prepare(Float64Array.from(decodeBytes(ink), v => v / 255), side) ?? [])"
    assert opened.evaluate(script, [encoded(torch.full((side, side), 25, dtype=torch.uint8)), side]) == []  # too faint
    generator = torch.Generator().manual_seed(side)
    for n in range(12):
        ink, rows = torch.zeros(side, side), torch.randint(16, 28, (2,), generator=generator)
        part = test_images.pixels[n][: rows[0], : rows[1]][None, None].float()
        size = [max(1, side * length // 40) for length in part.shape[2:]]
        ink[2 : 2 + size[0], 5 : 5 + size[1]] = F.interpolate(part, size=size, mode="bilinear")[0, 0]
        ink = ink.round().to(torch.uint8)
        found = torch.tensor(opened.evaluate(script, [encoded(ink), side]))
        expected = preprocess.prepare(ink / 255) * STD + MEAN
        assert (found - expected.flatten()).abs().max() < 1e-3


def test_every_stroke_changes_the_bars_and_can_be_taken_back(opened):
    draw(opened, FOUR[:1])
    half = heights(opened)
    draw(opened, FOUR[1:])
    whole = heights(opened)
    assert half != whole and sum(whole) == pytest.approx(100)
    opened.keyboard.press("Control+z")
    settle(opened)
    assert heights(opened) == half
    opened.get_by_role("button", name="Clear").click()
    settle(opened)
    assert heights(opened) == [0] * 10 and opened.get_by_role("button", name="Undo").is_disabled()
    assert opened.locator("#hint").is_visible() and opened.evaluate("ink().every(v => v === 0)")


def test_feature_maps_show_every_layer_of_the_drawing(opened, solution):
    draw(opened, SEVEN)
    network = predict.load(solution).network
    x = preprocess.prepare(ink_on_pad(opened))
    for n, layer in enumerate(network):
        with torch.no_grad():
            x = layer(x)
        largest = x.abs().max()
        for channel in range(x.shape[1]):
            canvas = f"panels[{n}].canvases[{channel}]"
            script = f"Array.from({canvas}.getContext('2d').getImageData(0, 0, {canvas}.width, {canvas}.width).data)"
            opacity = torch.tensor(opened.evaluate(script)).reshape(x.shape[2], x.shape[3], 4)[..., 3]
            assert (opacity / 255 - x[0, channel].abs() / largest).abs().max() < 0.01


def test_feature_maps_follow_the_theme(opened):
    draw(opened, SEVEN)
    colours = []
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        settle(opened)
        pixel = "Array.from(panels.at(-1).canvases[7].getContext('2d').getImageData(0, 0, 1, 1).data)"
        colours.append(opened.evaluate(pixel))
    light, dark = colours
    assert sum(dark[:3]) > sum(light[:3]) and light[3] == dark[3] > 0


def test_digit_can_be_drawn_with_the_keyboard_alone(opened):
    opened.keyboard.press("Tab")  # the link of the head, then the pad
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "pad"
    for key in ["ArrowUp"] * 8 + [" "] + ["ArrowDown"] * 16 + [" "]:
        opened.keyboard.press(key)
    settle(opened)
    ink = ink_on_pad(opened)
    rows, columns = (torch.nonzero(ink.sum(axis)).flatten() for axis in (1, 0))
    assert len(rows) > 4 * len(columns) > 0 and sum(heights(opened)) == pytest.approx(100)
    opened.keyboard.press("Escape")
    settle(opened)
    assert heights(opened) == [0] * 10


def test_finger_draws_at_phone_width_and_the_page_stays_where_it_is(browser, solution):
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with browser.new_context(**options, device_scale_factor=2) as context:
        page = context.new_page()
        page.goto((solution / "demo.html").as_uri())
        draw_by_touch(page, SEVEN)
        assert sum(heights(page)) == pytest.approx(100) and page.evaluate("strokes.length") == 1
        assert page.evaluate("scrollY") == 0
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.wait_for_timeout(500)  # Chromium takes a tap right behind a swipe for a part of it
        page.locator("#next").tap()
        page.locator("#note").filter(has_text="Its label is").wait_for()


# --- test images it gets wrong ---------------------------------------------------------------------------------------


def test_positions_are_all_or_as_far_apart_as_they_can_be():
    assert demo.spread_evenly(torch.arange(3), 4).tolist() == [0, 1, 2]
    assert demo.spread_evenly(torch.arange(100, 110), 3).tolist() == [100, 103, 106]
    assert demo.spread_evenly(torch.arange(0), 4).tolist() == []


def test_every_wrong_image_can_be_clicked_and_shows_what_the_network_says(opened, solution, test_images):
    predictions = logits_of_pytorch(predict.load(solution).network, test_images.pixels).argmax(1)
    all_wrong = (predictions != test_images.labels).nonzero().flatten().tolist()
    wrong = opened.evaluate("wrong.positions")
    assert len(set(wrong)) == min(len(all_wrong), demo.MAX_WRONG) > 0 and set(wrong) <= set(all_wrong)
    labels = opened.locator("#wrong label")
    assert labels.all_inner_texts() == [f"{test_images.labels[i]} → {predictions[i]}" for i in wrong]
    again = "wrongImages.map(image => forward(image).at(-1).values).map(v => v.indexOf(Math.max(...v)))"
    assert opened.evaluate(again) == predictions[wrong].tolist()
    for n in (0, len(wrong) // 2, len(wrong) - 1):
        labels.nth(n).click()
        assert opened.locator("#digit").inner_text() == str(predictions[wrong[n]].item())
        assert f"label is {test_images.labels[wrong[n]]}." in opened.locator("#note").inner_text()
        shown = opened.evaluate("Array.from(shown.image, v => Math.round(255 * v))")
        assert shown == test_images.pixels[wrong[n]].flatten().tolist()


def test_wrong_images_are_gone_through_by_buttons_and_arrow_keys(opened):
    chosen = "choices.findIndex(input => input.checked)"
    n = opened.evaluate("choices.length")
    opened.locator("#next").click()
    assert opened.evaluate(chosen) == 0
    opened.locator("#previous").click()
    assert opened.evaluate(chosen) == n - 1
    opened.locator("#wrong input").nth(0).focus()
    opened.keyboard.press("ArrowRight")
    assert opened.evaluate(chosen) == 1 and opened.evaluate("shown.truth") == opened.evaluate("wrong.labels[1]")
    draw(opened, ONE)  # over a test image: it gives way
    assert opened.evaluate(chosen) == -1 and opened.evaluate("shown.truth") is None
    assert (ink_on_pad(opened)[:, :100] == 0).all()


def test_page_of_a_bad_network_is_small_and_says_how_many_images_it_leaves_out(page, tmp_path, test_images):
    network = random_network(ZOO["lite-m3"].architecture, seed=0)
    text = page_of(network, test_images, predictions=(test_images.labels + 1) % 10)
    (tmp_path / "demo.html").write_text(text, encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    page.goto((tmp_path / "demo.html").as_uri())
    assert page.locator("#wrong label").count() == demo.MAX_WRONG
    assert f"{demo.MAX_WRONG} of 10,000" in page.locator("#wrong-count").inner_text()
    (tmp_path / "demo.html").write_text(page_of(network, test_images), encoding="utf-8")
    page.goto((tmp_path / "demo.html").as_uri())
    assert page.locator("#wrong-count").inner_text() == "None." and page.complaints == []


# --- one file --------------------------------------------------------------------------------------------------------


def test_file_is_small_whole_and_tells_the_truth_about_the_network(opened, solution, retrained):
    record = json.loads((solution / "solution.json").read_text())
    content = (solution / "demo.html").read_bytes()
    assert len(content) < MAX_BYTES and b"{{" not in content and "demo.html" in record["sha256"]
    head = opened.locator("header").inner_text() + opened.locator("#facts").inner_text()
    n_wrong = round(10_000 * (1 - record["test_accuracy"]))
    for part in (
        str(retrained.candidate.architecture),
        f"{record['n_parameters']:,}",
        f"{100 * record['test_accuracy']:.2f} %",
        f"{n_wrong:,} of 10,000 wrong",
        "the spread is not known",
        "all training images",
    ):
        assert part in head


def test_head_gives_mean_and_spread_and_tells_of_what_went_wrong(page, tmp_path, test_images):
    record = {"mean_test_accuracy": 0.99526, "standard_deviation": 0.0009, "n_train_images": 6000, "exported_seed": 1}
    network = random_network(ZOO["lite-m2"].architecture, seed=0)
    text = page_of(network, test_images, **record, diverged_seeds=[0], runs=[None] * 4)
    (tmp_path / "demo.html").write_text(text, encoding="utf-8")
    page.goto((tmp_path / "demo.html").as_uri())
    head = page.locator("#facts").inner_text()
    for part in ("Mean of 4 seeds", "99.53 ± 0.09 %", "this is seed 1; 1 more diverged", "of 60,000 training images"):
        assert part in head


def open_with_c(page, tmp_path, test_images, **record):
    network = random_network(ZOO["lite-m2"].architecture, seed=0)
    text = page_of(network, test_images, test_accuracy=0.9855, int8={"test_accuracy": 0.9859}, **record)
    (tmp_path / "demo.html").write_text(text, encoding="utf-8")
    page.goto((tmp_path / "demo.html").as_uri())
    page.locator("#facts").get_by_role("link", name="on a microcontroller").click()
    assert page.locator("#microcontroller").bounding_box()["y"] < page.viewport_size["height"]
    assert page.complaints == []
    return page.locator("#microcontroller")


def test_page_tells_what_the_c_takes_on_each_processor_in_each_arithmetic(page, tmp_path, test_images):
    sizes = {"board": "Cortex-M4", "flash": 13494, "ram": 32912, "instructions": 11759320}
    boards = [sizes | {"function": "model_int8"}, sizes | {"function": "model_float", "flash": 33424}]
    c = {"n_images": 100, "tools": ["gcc 12", "QEMU 7"], "boards": boards}
    card = open_with_c(page, tmp_path, test_images, c=c)
    assert [row.split("\t") for row in card.locator("tr").all_inner_texts()] == [
        ["Processor", "Flash, bytes", "RAM, bytes", "Instructions", "Accuracy"],
        ["Cortex-M4, int8", "13,494", "32,912", "11,759,320", "98.59 %"],
        ["Cortex-M4, float", "33,424", "32,912", "11,759,320", "98.55 %"],
    ]
    assert "100 test images in QEMU" in card.inner_text() and "gcc 12; QEMU 7." in card.inner_text()


def test_page_without_measurements_tells_the_int8_accuracy_alone(page, tmp_path, test_images):
    card = open_with_c(page, tmp_path, test_images)
    assert "98.59 % of the test images" in card.inner_text() and "nas-mnist export --c" in card.inner_text()
    card = open_with_c(page, tmp_path, test_images, c={"not_measured": "without QEMU", "boards": []})
    assert "C99" in card.inner_text() and "nas-mnist export" not in card.inner_text()
    assert not card.locator("table").is_visible() and "QEMU" not in card.inner_text()


def test_policy_lets_nothing_leave_the_page(page, solution):
    page.goto((solution / "demo.html").as_uri())
    tries = """async () => {
        const broken = [];
        document.addEventListener("securitypolicyviolation", (e) => broken.push(e.effectiveDirective));
        await fetch("http://127.0.0.1:9/").catch(() => {});
        const image = new Image();
        await new Promise((done) => { image.onerror = done; image.src = "http://127.0.0.1:9/x.png"; });
        const script = document.createElement("script");
        await new Promise((done) => { script.onerror = done; script.src = "x.js"; document.body.append(script); });
        for (let i = 0; i < 500 && broken.length < 3; i++) await new Promise((done) => setTimeout(done, 20));
        return broken;
    }"""
    assert page.evaluate(tries) == ["connect-src", "img-src", "script-src-elem"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_screenshots(browser, solution, screenshots, scheme, width):
    viewport = {"width": width, "height": 900 if width == 1280 else 844}
    with browser.new_context(viewport=viewport, color_scheme=scheme, device_scale_factor=2) as context:
        page = context.new_page()
        page.goto((solution / "demo.html").as_uri())
        for state, act in (
            ("empty", lambda: None),
            ("drawn", lambda: draw(page, SEVEN)),
            ("wrong", page.locator("#next").click),
        ):
            act()
            page.wait_for_timeout(200)  # the bars move
            page.screenshot(path=screenshots / f"demo-{state}-{width}-{scheme}.png", full_page=state != "empty")
            assert page.evaluate("document.documentElement.scrollWidth") <= width


# --- nas-mnist demo --------------------------------------------------------------------------------------------------


@pytest.fixture
def shown_addresses(monkeypatch):
    """What would have been opened in the user's browser."""
    addresses = []
    monkeypatch.setattr(demo.webbrowser, "open", lambda address: addresses.append(address) or True)
    return addresses


def test_command_opens_the_page_and_prints_where_it_is(solution, shown_addresses, capsys, monkeypatch):
    monkeypatch.chdir(solution.parent)
    assert cli.main(["demo"]) == 0
    assert shown_addresses == [(solution / "demo.html").as_uri()]
    assert capsys.readouterr().out == f"{solution / 'demo.html'}\n"


def test_without_a_browser_the_command_says_so(solution, capsys, monkeypatch):
    monkeypatch.setattr(demo.webbrowser, "open", lambda _: False)
    assert cli.main(["demo", str(solution)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "no browser was found here: open this file in one"


@pytest.mark.parametrize("kind", ["no folder", "no solution", "no page", "changed page", "an older solution"])
def test_page_that_is_missing_or_not_the_exported_one_is_one_clear_line(
    solution, tmp_path, capsys, shown_addresses, kind
):
    folder = tmp_path / "solution"
    if kind == "no solution":
        folder.mkdir()
        shutil.copy(solution / "demo.html", folder)
    elif kind != "no folder":
        shutil.copytree(solution, folder)
    if kind == "no page":
        (folder / "demo.html").unlink()
    elif kind == "changed page":
        (folder / "demo.html").write_bytes((folder / "demo.html").read_bytes() + b"<script></script>")
    elif kind == "an older solution":
        record = json.loads((folder / "solution.json").read_text())
        del record["sha256"]["demo.html"]
        (folder / "solution.json").write_text(json.dumps(predict.seal(record)))
    assert cli.main(["demo", str(folder)]) == 2
    error = capsys.readouterr().err
    expected = {
        "no page": "demo.html cannot be read",
        "changed page": "demo.html is not the file that was exported",
        "an older solution": "was exported without demo.html: export the solution again",
    }.get(kind, "name a folder that `nas-mnist export` wrote")
    assert expected in error and error.count("\n") == 1 and shown_addresses == []
