import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nas_mnist.cli import main as cli
from nas_mnist.data.images import load_test
from nas_mnist.errors import SolutionError
from nas_mnist.solution import predict
from nas_mnist.solution.preprocess import prepare, read_png
from nas_mnist.training.augmentation import normalise


@pytest.fixture(scope="module")
def network(solution):
    return predict.load(solution).network


def picture(pixels, *, side=28, dark_on_light=False, place=None, mode="L"):
    image = Image.fromarray((255 - pixels if dark_on_light else pixels).numpy()).resize((side, side), Image.BICUBIC)
    if place:
        paper = Image.new("L", (side * 4, side * 3), 255 if dark_on_light else 0)
        paper.paste(image, place)
        image = paper
    return image.convert(mode)


def test_test_images_are_prepared_to_what_they_were(data_dir, network):
    test = load_test(data_dir)
    pixels, _ = test.select(torch.arange(300))
    again = torch.cat([prepare(image / 255) for image in pixels])
    with torch.no_grad():
        same = network(again).argmax(1) == network(normalise(pixels, test.normalisation)).argmax(1)
    assert same.float().mean() > 0.95


@pytest.mark.parametrize(
    "how",
    [
        {"side": 200},
        {"side": 31, "dark_on_light": True},
        {"side": 90, "place": (200, 30)},
        {"side": 90, "place": (3, 150), "dark_on_light": True, "mode": "RGB"},
        {"side": 60, "dark_on_light": True, "mode": "P"},
        {"side": 60, "mode": "RGBA"},
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_any_size_place_and_shade_gives_the_same_digit(images, solution, network, tmp_path, how, suffix):
    if suffix == "jpg" and how.get("mode") in ("P", "RGBA"):
        pytest.skip("JPEG has no such mode")
    path = tmp_path / f"digit.{suffix}"
    picture(images.pixels[0], **how).save(path)
    (found,) = predict.predict(predict.load(solution), [str(path)])
    with torch.no_grad():
        expected = network(normalise(images.pixels[:1], images.normalisation)).argmax().item()
    assert found.class_index == expected and 0 < found.confidence <= 1 and found.error is None


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_scans_of_16_bits_are_read_as_those_of_8(images, tmp_path, suffix):
    eight = picture(images.pixels[3], side=75, dark_on_light=True)
    eight.save(tmp_path / "8.png")
    Image.fromarray(np.asarray(eight).astype(np.uint16) * 257).save(tmp_path / f"16.{suffix}")
    given = [predict._grey(str(tmp_path / name)) for name in (f"16.{suffix}", "8.png")]
    torch.testing.assert_close(*given, atol=0.01, rtol=0)


def test_own_png_reader_agrees_with_pillow(images, tmp_path):
    for mode in ("L", "RGB", "RGBA", "LA"):
        path = tmp_path / f"{mode}.png"
        picture(images.pixels[3], side=75, dark_on_light=True, mode=mode).save(path)
        torch.testing.assert_close(read_png(path.read_bytes()), predict._grey(str(path)), atol=0.01, rtol=0)


def hostile(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    Image.new("L", (50, 50), 128).save(folder / "blank.png")
    Image.new("L", (1, 1), 0).save(folder / "point.png")
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    (folder / "folder.png").mkdir()
    return [str(folder / f"{n}.png") for n in ("empty", "text", "cut", "blank", "point", "huge", "folder", "none")]


def test_files_that_are_no_picture_get_one_line_each_and_the_others_go_on(images, solution, tmp_path, capsys):
    good = tmp_path / "good.png"
    picture(images.pixels[0], side=60).save(good)
    bad = hostile(tmp_path)
    code = cli.main(["predict", str(solution), *bad, str(good)])
    captured = capsys.readouterr()
    assert code == 2 and captured.out.count("\n") == 1 and captured.out.startswith(f"{good}: ")
    assert [line.split(": ")[0] for line in captured.err.splitlines()] == bad
    assert cli.main(["predict", str(solution), str(good), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["path"] == str(good) and 0 <= entry["class_index"] <= 9


@pytest.mark.parametrize("name", ["solution.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["remove", "truncate", "flip"])
def test_damaged_solution_is_one_clear_line(solution, tmp_path, capsys, name, damage):
    copy = tmp_path / "copy"
    shutil.copytree(solution, copy)
    content = (copy / name).read_bytes()
    if damage == "remove":
        (copy / name).unlink()
    else:
        end = content[41:] if damage == "flip" else b""
        (copy / name).write_bytes(content[:40] + (bytes([content[40] ^ 0x80]) if damage == "flip" else b"") + end)
    assert cli.main(["evaluate", str(copy)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error


@pytest.mark.parametrize("change", [{"architecture": "c8 M c12 M c16 G c10k1- | act-norm"}, {"test_accuracy": 1.0}])
def test_record_that_was_changed_is_refused_even_if_the_weights_fit(solution, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(solution, copy)
    record = json.loads((copy / "solution.json").read_text())
    (copy / "solution.json").write_text(json.dumps(record, indent=1))  # the layout does not matter
    predict.load(copy)
    (copy / "solution.json").write_text(json.dumps(record | change))
    with pytest.raises(SolutionError, match=r"solution\.json is damaged or was changed"):
        predict.load(copy)


def test_weights_of_another_network_are_refused(solution, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(solution, copy)
    record = json.loads((copy / "solution.json").read_text())
    (copy / "solution.json").write_text(json.dumps(predict.seal(record | {"architecture": "c10k28-"})))
    with pytest.raises(SolutionError, match=r"is damaged \("):
        predict.load(copy)


def test_folder_that_is_no_solution_is_one_clear_line(tmp_path):
    with pytest.raises(SolutionError, match="nas-mnist export"):
        predict.load(tmp_path / "nothing")
