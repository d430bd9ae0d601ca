"""The solution as one page for a browser: draw a digit, and see what the network makes of it.

The page is `demo.html` with the layers, their weights, the test images the network gets wrong, and what its C takes on
a microcontroller put in as JSON. It needs no server and loads nothing; its policy forbids it to.
"""

import base64
import json
import webbrowser
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas_mnist.data.datasets import Dataset
from nas_mnist.data.images import Images
from nas_mnist.model.architecture import ACTIVATION_NAMES, Architecture
from nas_mnist.model.network import Network
from nas_mnist.solution.folding import read_norm
from nas_mnist.solution.predict import read_exported
from nas_mnist.solution.walk import Convolution, Pool, Step, walk

PAGE = "demo.html"
MAX_WRONG = 300  # test images in the page, about 1 kB each, so that a bad network's page is small too
FACTS = (  # of `solution.json`, for the head of the page
    "architecture",
    "n_parameters",
    "n_macs",
    "test_accuracy",
    "exported_seed",
    "diverged_seeds",
    "mean_test_accuracy",
    "standard_deviation",
    "n_train_images",
)

_DESKEW = {"token": "deskew", "what": "the image made upright", "n_parameters": 0, "steps": [{"name": "deskew"}]}
_TEMPLATE = Path(__file__).with_name("demo.html")
_PLACE = "{{solution}}"


def page(
    network: Network, record: Mapping[str, Any], dataset: Dataset, test_images: Images, predictions: Tensor
) -> str:
    """The page of this network, from what `solution.json` holds and the predictions (N,) for the test images."""
    counts = {
        "n_seeds": len(record["runs"]),
        "n_all_train_images": dataset.n_train_images,
        "n_test_images": len(test_images),
    }
    values = {
        "facts": {name: record[name] for name in FACTS} | counts,
        "dataset": {name: getattr(dataset, name) for name in ("title", "classes", "box", "by_mass")},
        **asdict(test_images.normalisation),
        "layers": layers(network),
        "wrong": _wrong(test_images, predictions),
        "microcontroller": {"accuracy": record["int8"]["test_accuracy"], "c": record.get("c")},
    }
    content = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return _TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, content.replace("<", "\\u003c"))


def open_page(folder: Path) -> tuple[Path, bool]:
    """Open the page of an exported folder; where it is, and whether there was a browser to open it in.

    Raises `SolutionError` if it is missing or not the one that was exported.
    """
    read_exported(folder, PAGE)
    path = (folder / PAGE).resolve()
    return path, webbrowser.open(path.as_uri())


def layers(network: Network) -> list[dict[str, Any]]:
    """What the network does, step by step: one entry for each token of its line, two for a separable convolution."""
    tokens = map(str, network.architecture.layers)
    steps = zip(tokens, walk(network.architecture), strict=True)
    entries = [_entry(token, step, network) for token, steps_of_token in steps for step in steps_of_token]
    return [_DESKEW, *entries] if network.architecture.deskewed else entries


def _entry(token: str, step: Step, network: Network) -> dict[str, Any]:
    if isinstance(step, Pool):
        what, name = ("2×2 max-pool", "maxPool") if step.is_max else ("mean of each map", "mean")
        return {"token": token, "what": what, "n_parameters": 0, "steps": [{"name": name}]}
    state = network.state_dict()
    steps = [_conv(step, state), *_norm_act(step, state, network.architecture)]
    what = _what(step) + "".join(f", {each['name']}" for each in steps[1:])
    n_parameters = step.n_parameters + 2 * step.channels * (step.norm is not None)
    return {"token": token, "what": what, "n_parameters": n_parameters, "steps": steps}


def _what(conv: Convolution) -> str:
    kind = "depthwise convolution" if conv.groups > 1 else "convolution"
    stride = f", stride {conv.stride}" if conv.stride > 1 else ""
    return f"{conv.kernel}×{conv.kernel} {kind}{stride}"


def _conv(conv: Convolution, state: Mapping[str, Tensor]) -> dict[str, Any]:
    step = {"name": "conv", "channels": conv.channels, "groups": conv.groups, "kernel": conv.kernel}
    step |= {"stride": conv.stride, "padding": conv.padding, "weight": _floats(state[f"{conv.source}.weight"])}
    return step | {"bias": _floats(state[f"{conv.source}.bias"])} if conv.bias else step


def _norm_act(conv: Convolution, state: Mapping[str, Tensor], architecture: Architecture) -> list[dict[str, Any]]:
    """Norm and activation in their order; at rest a batch norm is one factor and one summand for each channel."""
    act = [{"name": ACTIVATION_NAMES[architecture.activation]}] if conv.activation else []
    norm = read_norm(conv, state)
    if norm is None:
        return act
    norms = [{"name": "norm", "scale": _floats(norm.scale), "shift": _floats(norm.shift)}]
    return norms + act if architecture.norm_first else act + norms


def spread_evenly(positions: Tensor, limit: int) -> Tensor:
    """All of the positions (N,), or `limit` of them that are as far apart as they can be."""
    n = min(len(positions), limit)
    return positions[torch.arange(n) * len(positions) // max(n, 1)]


def _wrong(images: Images, predictions: Tensor) -> dict[str, Any]:
    """The misclassified images: all, or `MAX_WRONG` of them."""
    wrong = (predictions != images.labels).nonzero().flatten()
    shown = spread_evenly(wrong, MAX_WRONG)
    pixels, labels = images.select(shown)
    return {
        "n": len(wrong),
        "positions": shown.tolist(),
        "labels": labels.tolist(),
        "predictions": predictions[shown].tolist(),
        "pixels": _base64(pixels.contiguous().numpy().tobytes()),
    }


def _floats(values: Tensor | np.ndarray) -> str:
    """Little-endian float32, as every browser's arrays are, in base64."""
    return _base64(np.asarray(values).astype("<f4").tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
