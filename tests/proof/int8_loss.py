"""What int8 costs an exported solution, and where: image by image, and layer by layer: `int8_loss.py FOLDER`."""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from nas_mnist.data.images import load_test
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.solution.folding import fold
from nas_mnist.solution.predict import INT8, load, onnx_session
from nas_mnist.solution.quantise import float_graph
from nas_mnist.training.augmentation import normalise

N_MAP_IMAGES = 300  # whose maps are compared
SCALES = {"QLinearConv": (6, 7), "QLinearGlobalAveragePool": (3, 4)}  # where a node has scale and zero of its output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    data_dir = default_data_dir()
    prepare(data_dir)
    test = load_test(data_dir)
    images = normalise(test.pixels, test.normalisation).numpy()
    steps = fold(load(folder).network)
    floats, int8 = float_graph(steps), onnx.load(folder / INT8)
    _compare_images(run(floats, images), run(int8, images), test.labels.numpy())
    layers = [getattr(step, "name", "mean") for step in steps if not getattr(step, "is_max", False)]
    _compare_maps(layers, floats, int8, images[:N_MAP_IMAGES])
    return 0


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """The logits (N, 10)."""
    parts = np.split(images, range(1000, len(images), 1000))
    return np.concatenate([outputs(model, ["logits"], part)[0] for part in parts])


def outputs(model: onnx.ModelProto, names: list[str], images: np.ndarray) -> list[np.ndarray]:
    """What the nodes of these names give, whether they are outputs of the model or not."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    known = {output.name for output in model.graph.output}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return onnx_session(opened.SerializeToString()).run(names, {"images": images})


def _compare_images(floats: np.ndarray, int8: np.ndarray, labels: np.ndarray) -> None:
    before, after = floats.argmax(1), int8.argmax(1)
    lost, won = (before == labels) & (after != labels), (before != labels) & (after == labels)
    right = f"{(before == labels).sum():,} right in float, {(after == labels).sum():,} in int8"
    print(f"{right}: {lost.sum()} lost, {won.sum()} won, {(before != after).sum()} of {len(labels):,} otherwise")
    for i in np.flatnonzero(before != after):
        second, first = np.sort(floats[i])[-2:]
        print(
            f"  image {i}: a {labels[i]}, {before[i]} in float by {first - second:.2f} of a logit, {after[i]} in int8"
        )


def _compare_maps(layers: list[str], floats: onnx.ModelProto, int8: onnx.ModelProto, images: np.ndarray) -> None:
    """The error of each map that is rounded, against the same map of the float network: root mean squares."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in int8.graph.initializer}
    nodes = [node for node in int8.graph.node if node.op_type in SCALES]
    maps = outputs(int8, [node.output[0] for node in nodes], images)
    names = [node.output[0].removesuffix("_quantized") for node in nodes]
    exact_maps = outputs(floats, names, images)
    for layer, name, node, rounded, exact in zip(layers, names, nodes, maps, exact_maps, strict=True):
        scale, zero = (values[node.input[i]].astype(np.float32) for i in SCALES[node.op_type])
        exact = np.maximum(exact, 0) if name.endswith(".sum") else exact  # int8 has the ReLU in the convolution
        error = rms((rounded - zero) * scale - exact)
        print(f"{layer:12} {100 * error / rms(exact):5.2f} % of the map, {error / scale:.2f} steps")


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


if __name__ == "__main__":
    sys.exit(main())
