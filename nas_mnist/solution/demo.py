"""The solution as one page for a browser: draw a digit, and see what the network makes of it.

The page is `demo.html` with the layers, their weights, and the test images the network gets wrong put in as JSON. It
needs no server and loads nothing; its policy forbids it to.
"""

import base64
import json
import webbrowser
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas_mnist.data.datasets import Dataset
from nas_mnist.data.images import Images
from nas_mnist.model.network import Block, MaxPool2d, Network, NormAct
from nas_mnist.solution.predict import read_exported

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
    return [entry for token, child in zip(tokens, network, strict=True) for entry in _entries(token, child)]


def _entries(token: str, child: nn.Module) -> list[dict[str, Any]]:
    if not isinstance(child, Block):
        what, name = ("2×2 max-pool", "maxPool") if isinstance(child, MaxPool2d) else ("mean of each map", "mean")
        return [{"token": token, "what": what, "n_parameters": 0, "steps": [{"name": name}]}]
    entries: list[dict[str, Any]] = []
    for module in child:
        if isinstance(module, NormAct):
            entries[-1]["steps"] += _norm_act(module)
        else:
            entries.append({"token": token, "what": _what(module), "n_parameters": 0, "steps": [_conv(module)]})
        entries[-1]["n_parameters"] += sum(parameter.numel() for parameter in module.parameters())
    for entry in entries:
        entry["what"] += "".join(f", {step['name']}" for step in entry["steps"][1:])
    return entries


def _what(conv: nn.Conv2d) -> str:
    kind = "depthwise convolution" if conv.groups > 1 else "convolution"
    stride = f", stride {conv.stride[0]}" if conv.stride[0] > 1 else ""
    return f"{conv.kernel_size[0]}×{conv.kernel_size[0]} {kind}{stride}"


def _conv(conv: nn.Conv2d) -> dict[str, Any]:
    step = {"name": "conv", "channels": conv.out_channels, "groups": conv.groups, "kernel": conv.kernel_size[0]}
    step |= {"stride": conv.stride[0], "padding": conv.padding[0], "weight": _floats(conv.weight)}
    return step if conv.bias is None else step | {"bias": _floats(conv.bias)}


def _norm_act(module: NormAct) -> list[dict[str, Any]]:
    """Norm and ReLU in their order; at rest a batch norm is one factor and one summand for each channel."""
    relu = {"name": "ReLU"}
    if module.norm is None:
        return [relu]
    scale = module.norm.weight.double() / (module.norm.running_var.double() + module.norm.eps).sqrt()
    shift = module.norm.bias.double() - module.norm.running_mean.double() * scale
    norm = {"name": "norm", "scale": _floats(scale), "shift": _floats(shift)}
    return [norm, relu] if module.norm_first else [relu, norm]


def _wrong(images: Images, predictions: Tensor) -> dict[str, Any]:
    """The misclassified images: all, or `MAX_WRONG` of them evenly spread over the test set."""
    wrong = (predictions != images.labels).nonzero().flatten()
    n = min(len(wrong), MAX_WRONG)
    shown = wrong[torch.arange(n) * len(wrong) // max(n, 1)]
    pixels, labels = images.select(shown)
    return {
        "n": len(wrong),
        "positions": shown.tolist(),
        "labels": labels.tolist(),
        "predictions": predictions[shown].tolist(),
        "pixels": _base64(pixels.contiguous().numpy().tobytes()),
    }


def _floats(values: Tensor) -> str:
    """Little-endian float32, as every browser's arrays are, in base64."""
    return _base64(values.detach().cpu().contiguous().numpy().astype("<f4").tobytes())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
