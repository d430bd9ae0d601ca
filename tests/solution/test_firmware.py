from pathlib import Path

import compiled
import pytest
import torch

from nas_mnist.data.images import load_test
from nas_mnist.errors import SolutionError
from nas_mnist.solution import embedded, firmware
from nas_mnist.solution.predict import load

CANONICAL = Path(__file__).parents[2] / "studies" / "canonical" / "solution"
N_IMAGES = 100


@pytest.fixture(scope="module")
def canonical(data_dir, images, tmp_path_factory):
    """The canonical solution as C, what onnxruntime makes of it in int8, and what PyTorch does, of the first images."""
    folder, test = tmp_path_factory.mktemp("firmware"), load_test(data_dir)
    few = test.first(N_IMAGES)
    network = load(CANONICAL).network
    int8 = embedded.write_int8(network, images, few, folder)
    embedded.c_code.write(folder / "c", int8.steps, int8.quantised, "A network.", few.normalisation)
    pixels = (few.pixels[:, None] / 255 - few.normalisation.mean) / few.normalisation.std
    with torch.no_grad():
        classes = {"model_int8": int8.logits.argmax(1).tolist(), "model_float": network(pixels).argmax(1).tolist()}
    return folder / "c", few, classes


@pytest.mark.parametrize("function", firmware.FUNCTIONS)
@pytest.mark.parametrize("board", firmware.BOARDS, ids=lambda board: board.cpu)
def test_c_predicts_on_the_emulated_processor_as_it_should(board, function, canonical):
    compiled.require(firmware.COMPILER, firmware.EMULATOR)
    folder, few, classes = canonical
    measured = firmware.measure(folder, function, few.pixels.numpy(), board)
    assert list(measured.predictions) == classes[function]
    weights, maps = (7_100, 32_912) if function == "model_int8" else (7_100 * 4, 4 * 32_912)
    assert weights < measured.flash < weights + 8_000 and measured.ram == maps
    assert 1_405_042 < measured.instructions < 20_000_000  # more than one for each multiply-add


def test_c_that_does_not_compile_is_one_line(tmp_path):
    compiled.require(firmware.COMPILER)
    (tmp_path / "model.c").write_text("int nothing")
    with pytest.raises(SolutionError, match=r"^arm-none-eabi-gcc failed \(.*\)$"):
        firmware.measure(tmp_path, "model_int8", torch.zeros(1, 28, 28).numpy(), firmware.BOARDS[0])


def test_sizes_are_those_of_the_model_without_the_firmware_around_it():
    linker_map = """
Discarded input sections
 .text          0x00000000       0x99 model.o
Linker script and memory map
 .text.reset    0x00000000       0x10 main.o
 .text.model    0x00000010       0x20 model.o
 .rodata.weights
                0x00000030       0x08 model.o
 .text.memcpy   0x00000038       0x04 /usr/lib/libc_nano.a(memcpy.o)
 .bss.maps      0x20000000      0x100 model.o
 .data.table    0x20000100       0x02 model.o
"""
    assert firmware.sizes(linker_map) == (0x20 + 0x08 + 0x04 + 0x02, 0x100 + 0x02)
