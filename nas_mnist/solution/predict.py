"""Use an exported solution: what image files show, and the accuracy on the test set."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor

from nas_mnist.data.datasets import CUSTOMARY, DATASETS, Dataset, Normalisation
from nas_mnist.data.deskew import upright
from nas_mnist.data.images import Images, load_test
from nas_mnist.data.unpacking import prepare
from nas_mnist.errors import NasMnistError, SolutionError
from nas_mnist.extras import Extra, require
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Network, build
from nas_mnist.solution.codegen import weight_names
from nas_mnist.solution.preprocess import FORMATS, on_paper
from nas_mnist.solution.preprocess import prepare as prepare_picture
from nas_mnist.study.space import Candidate
from nas_mnist.training.augmentation import normalise
from nas_mnist.training.evaluation import evaluate

RECORD, WEIGHTS, INT8 = "solution.json", "weights.safetensors", "model_int8.onnx"
SEAL = "sha256_of_the_above"  # key of the record
MAX_PIXELS = 50_000_000  # more is no picture of a digit


@dataclass(frozen=True)
class Solution:
    """An exported network, ready to use, and what its images have to look like."""

    network: Network
    dataset: Dataset
    normalisation: Normalisation

    def predict(self, image: Path | str) -> "Prediction":
        """What the picture in this file shows; `error` says why it can show nothing."""
        return next(predict(self, [str(image)]))


@dataclass(frozen=True)
class Prediction:
    """What a picture shows: the number of the class and its name. `error` says why there is neither."""

    path: str
    class_index: int | None = None
    label: str | None = None
    confidence: float | None = None  # probability, 0 to 1
    error: str | None = None


def load(folder: Path) -> Solution:
    """What is in an exported folder, ready to use.

    Raises `SolutionError` if a file is missing, damaged, or not the one that was exported.
    """
    record, content = _read_record(folder), read_exported(folder, WEIGHTS)
    try:
        architecture = parse(record["architecture"])
        network = build(architecture, seed=0)
        weights = safetensors.torch.load(content)
        network.load_state_dict({ours: weights[theirs] for ours, theirs in weight_names(architecture).items()})
        dataset = DATASETS[record["dataset"]]
        normalisation = Normalisation(**record["normalisation"]) if "normalisation" in record else CUSTOMARY
    except (NasMnistError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SolutionError(f"{folder} is damaged ({reason}): export the solution again") from error
    return Solution(network.eval(), dataset, normalisation)


def candidate(folder: Path) -> Candidate:
    """The network of an exported folder and how it was trained. Raises `SolutionError` if it is damaged."""
    record = _read_record(folder)
    try:
        return Candidate.from_dict(record)
    except (NasMnistError, KeyError, TypeError) as error:
        raise SolutionError(f"{folder} is damaged ({error}): export the solution again") from error


def read_exported(folder: Path, name: str) -> bytes:
    """The content of a file of an exported folder.

    Raises `SolutionError` if it is missing, or not the one that was exported.
    """
    record = _read_record(folder)
    if name not in record["sha256"]:
        raise SolutionError(f"{folder} was exported without {name}: export the solution again")
    content = _read(folder / name)
    if hashlib.sha256(content).hexdigest() != record["sha256"][name]:
        raise SolutionError(f"{folder / name} is not the file that was exported: export the solution again")
    return content


def check(folder: Path) -> None:
    """Raise `SolutionError` if any file of an exported folder is missing, or not the one that was exported."""
    for name in _read_record(folder)["sha256"]:
        read_exported(folder, name)


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a checksum of its own, so that one that was changed is told from one that was exported."""
    plain = {name: value for name, value in record.items() if name != SEAL}
    return plain | {SEAL: hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(_read(folder / RECORD))
        if record == seal(record) and isinstance(record["architecture"], str) and record["sha256"][WEIGHTS]:
            return record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise SolutionError(f"{folder / RECORD} is damaged or was changed: export the solution again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SolutionError(
            f"{path} cannot be read ({error.strerror}): name a folder that `nas-mnist export` wrote"
        ) from error


def predict(solution: Solution, paths: Iterable[str]) -> Iterator[Prediction]:
    """One prediction for each picture, in order; a file that is none gets its error, and the others go on."""
    dataset, as_trained = solution.dataset, asdict(solution.normalisation)
    for path in paths:
        try:
            image = prepare_picture(_grey(path), **as_trained, side=dataset.box, by_mass=dataset.by_mass)
        except (OSError, ValueError) as error:
            yield Prediction(path, error=_reason(error))
            continue
        if solution.network.architecture.deskewed:
            image = upright(image, **as_trained)
        with torch.no_grad():
            probabilities = solution.network(image).softmax(1)[0]
        number = int(probabilities.argmax())
        yield Prediction(path, number, dataset.classes[number], probabilities.max().item())


def _grey(path: str) -> Tensor:
    """A picture, turned as its camera says → grey (H, W), 0 to 1. Raises OSError or ValueError if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that Pillow mends, and of sizes above our own limit
        try:
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I;16"):
                    picture = picture.point(lambda value: value / 256)  # Pillow would cut off, not scale
                picture = picture.convert("RGBA").convert("LA")
        except Image.DecompressionBombError:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels are too many for a digit: make it smaller") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # a damaged file can make Pillow raise anything
            raise ValueError(f"a damaged image ({_reason(error)})") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(picture.height, -1, 2) / 255
    return on_paper(pixels[..., 0], pixels[..., 1])


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image: give a PNG or JPEG file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def accuracy_on_test_set(folder: Path, data_dir: Path, *, int8: bool = False) -> float:
    """The fraction of the test set that the solution in this folder gets right; with `int8` the quantised one.

    Raises `SolutionError` if any file of it is missing, or not the one that was exported; `MissingPackage` without
    what runs the quantised one.
    """
    if int8:
        require(Extra.export)
    solution = load(folder)
    quantised = read_exported(folder, INT8) if int8 else None
    check(folder)
    prepare(data_dir, solution.dataset)
    images = replace(load_test(data_dir, solution.dataset), normalisation=solution.normalisation)
    if quantised is None:
        return evaluate(solution.network, images)[1]
    return (onnx_logits(quantised, images).argmax(1) == images.labels).double().mean().item()


def onnx_logits(model: bytes, images: Images) -> Tensor:
    """What an exported ONNX file makes of images: logits (N, 10)."""
    session = onnx_session(model)
    batches = (normalise(pixels, images.normalisation).numpy() for pixels, _ in images.batches(1000))
    return torch.from_numpy(np.concatenate([session.run(None, {"images": batch})[0] for batch in batches]))


def onnx_session(model: bytes) -> Any:
    """An onnxruntime that runs this file on the CPU, int8 to the last bit as it is meant."""
    require(Extra.export)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Without, sums of two products overflow 16 bits on x86 processors that have AVX2 and no VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
