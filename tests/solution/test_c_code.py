"""What takes longer, all images and 50 random networks under both compilers, is `make proof`."""

import re
import subprocess
from itertools import pairwise

import compiled
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_folding import ODD

from nas_mnist.data.images import load_test
from nas_mnist.errors import SolutionError
from nas_mnist.model.architecture import parse
from nas_mnist.model.zoo import ZOO
from nas_mnist.solution import c_code
from nas_mnist.solution.folding import fold
from nas_mnist.solution.quantise import quantise, read
from nas_mnist.training.augmentation import normalise


@pytest.fixture(scope="module")
def test_images(data_dir):
    return load_test(data_dir)


@pytest.mark.parametrize("compiler", compiled.COMPILERS)
@pytest.mark.parametrize("line", [*(system.notation for system in ZOO.values()), *ODD])
def test_c_gives_the_logits_of_pytorch_and_onnxruntime(line, compiler, images, test_images, tmp_path):
    compiled.require(compiler)
    network = compiled.settled(parse(line), images.first(200))
    compiled.check(network, images.first(200), test_images.first(20), tmp_path / "c", [compiler])


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(architecture=compiled.architectures(), seed=st.integers(0, 1000))
def test_c_of_any_network_of_the_space(architecture, seed, images, test_images, tmp_path_factory):
    compiled.require("gcc")
    network = compiled.settled(architecture, images.first(200), seed)
    folder = tmp_path_factory.mktemp("random") / "c"
    compiled.check(network, images.first(200), test_images.first(20), folder, ["gcc"])


def write(line, images, folder):
    network = compiled.settled(parse(line), images.first(100))
    steps = fold(network)
    model = quantise(steps, normalise(images.pixels[:100], images.normalisation).numpy())
    c_code.write(folder, steps, read(model, steps), "A network.", images.normalisation)
    return network


def test_example_reads_a_pgm_file_or_bytes_and_prints_the_class(images, tmp_path):
    compiled.require("gcc", "make")
    folder = tmp_path / "c"
    network = write("c8 M c8 G c10k1-", images, folder)
    built = subprocess.run(["make", "CC=gcc"], cwd=folder, capture_output=True, text=True, check=True)
    assert not built.stderr
    Image.fromarray(images.pixels[5].numpy()).save(tmp_path / "digit.pgm")
    (tmp_path / "digit.raw").write_bytes(images.pixels[5].numpy().tobytes())
    (tmp_path / "short.raw").write_bytes(bytes(783))
    expected = network(normalise(images.pixels[5:6], images.normalisation)).argmax().item()

    def example(*arguments):
        return subprocess.run([folder / "example", *arguments], capture_output=True, text=True, check=False)

    for name in ("digit.pgm", "digit.raw"):
        assert example("--float", tmp_path / name).stdout == f"{expected}\n"
        assert re.fullmatch(r"\d\n", example(tmp_path / name).stdout)
    for arguments in ([tmp_path / "short.raw"], [tmp_path / "none.pgm"], []):
        refused = example(*arguments)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout


def test_buffer_is_the_largest_sum_of_a_map_read_and_a_map_written(images, tmp_path):
    write("c4 M c6 c8 G c10k1-", images, tmp_path / "c")
    source = (tmp_path / "c" / "model.c").read_text()
    maps = [28**2, 4 * 26**2, 4 * 13**2, 6 * 11**2, 8 * 9**2, 8, 10]
    sums = [a + b for a, b in pairwise(maps)]
    assert f"static uint8_t maps[{max(maps[1], *sums[1:])}];" in source  # the image is the caller's
    assert f"static float maps[{max(sums)}];" in source
    assert max(sums) == parse("c4 M c6 c8 G c10k1-").ram
    assert "malloc" not in source and re.findall(r"#include (\S+)", source) == ['"model.h"']
    assert max(map(len, source.splitlines())) <= 120 and not re.search(r"[ \t]$|@", source, re.MULTILINE)


@pytest.mark.parametrize("line", [system.notation for system in ZOO.values()])
def test_buffer_is_what_describe_tells(line, images, tmp_path):
    architecture = parse(line)
    write(line, images, tmp_path / "c")
    source = (tmp_path / "c" / "model.c").read_text()
    assert f"static float maps[{architecture.ram}];" in source
    assert int(re.search(r"static uint8_t maps\[(\d+)\]", source)[1]) <= architecture.ram


def test_layer_that_the_writer_does_not_know_leaves_nothing_behind(images, tmp_path):
    network = compiled.settled(parse("c8 G c10k1-"), images.first(100))
    steps = fold(network)
    model = quantise(steps, normalise(images.pixels[:100], images.normalisation).numpy())
    with pytest.raises(SolutionError, match=r"convolutions and pools, and no Flip: export without C"):
        c_code.write(tmp_path / "c", [*steps, Flip()], read(model, steps), "A network.", images.normalisation)
    assert not list(tmp_path.iterdir())


class Flip:
    channels = side = in_side = 1


def test_floats_are_read_back_as_they_were():
    for value in torch.randn(300, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-30, 30, 300):
        assert torch.tensor(float(c_code._float(value.item()).removesuffix("f"))) == value
    assert c_code._float(1.0) == "1.0f" and "e" in c_code._float(1e-9)
