"""What an exported folder has for microcontrollers: the int8 network, its C, and what that takes on two processors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas_mnist.data.images import Images
from nas_mnist.errors import SolutionError
from nas_mnist.model.network import Network
from nas_mnist.solution import c_code, firmware
from nas_mnist.solution.folding import FoldedStep, fold
from nas_mnist.solution.predict import INT8, onnx_logits
from nas_mnist.solution.quantise import Quantised, behind_deskewing, quantise, read
from nas_mnist.training.augmentation import normalise, seen_by

C_FOLDER = "c"
N_CALIBRATION_IMAGES = 1000  # of the training images, evenly spaced
N_BOARD_IMAGES = 100  # of the test set, the first


@dataclass(frozen=True)
class Int8:
    """A network as it is computed in bytes: the steps it was made of, what they became, and the test set's logits."""

    steps: list[FoldedStep]
    deskewed: bool  # the image, before the first step
    quantised: Quantised
    logits: Tensor  # (N, 10)


def write_int8(network: Network, train_images: Images, test_images: Images, folder: Path) -> Int8:
    """Quantise the network, write the ONNX file, and run it over the test set."""
    steps = fold(network)
    chosen = torch.arange(N_CALIBRATION_IMAGES) * (len(train_images) // N_CALIBRATION_IMAGES)
    pixels, _ = seen_by(network, train_images).select(chosen)
    model = quantise(steps, normalise(pixels, train_images.normalisation).numpy())
    quantised = read(model, steps)
    if network.architecture.deskewed:
        model = behind_deskewing(model, train_images.normalisation)
    content = model.SerializeToString(deterministic=True)
    (folder / INT8).write_bytes(content)
    return Int8(steps, network.architecture.deskewed, quantised, onnx_logits(content, test_images))


def write_c(int8: Int8, headline: str, test_images: Images, folder: Path) -> dict[str, Any]:
    """Write the C, and measure it on both processors where the tools for that are installed.

    Raises `SolutionError` if a layer cannot be written, or if the C predicts otherwise than onnxruntime does.
    """
    like = test_images.normalisation
    c_code.write(folder / C_FOLDER, int8.steps, int8.quantised, headline, like, deskewed=int8.deskewed)
    missing = firmware.missing()
    if missing:
        return {"not_measured": f"without {' and '.join(missing)}", "boards": []}
    pixels = test_images.pixels[:N_BOARD_IMAGES].numpy()
    expected = int8.logits.argmax(1)[:N_BOARD_IMAGES].tolist()
    boards = []
    for board in firmware.BOARDS:
        for function in firmware.FUNCTIONS:
            measured = firmware.measure(folder / C_FOLDER, function, pixels, board)
            if function == "model_int8" and list(measured.predictions) != expected:
                raise SolutionError(f"the C for a {board.name} must predict what {INT8} does, and does not")
            numbers = {"flash": measured.flash, "ram": measured.ram, "instructions": measured.instructions}
            boards.append({"board": board.name, "function": function, **numbers})
    return {"n_images": N_BOARD_IMAGES, "tools": firmware.versions(), "boards": boards}
