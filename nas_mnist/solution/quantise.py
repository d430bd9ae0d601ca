"""int8: the folded network, quantised by onnxruntime after the training, and what a writer needs to know of it.

Activations are unsigned 8-bit numbers, weights signed ones with a scale for each output channel, biases 32-bit.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from nas_mnist.errors import SolutionError
from nas_mnist.model.architecture import INPUT_SIDE, N_CLASSES
from nas_mnist.solution.folding import FoldedConvolution, FoldedStep
from nas_mnist.solution.walk import Pool

INPUT, OUTPUT = "images", "logits"
IR_VERSION, OPSET = 10, 18


def float_graph(steps: list[FoldedStep]) -> onnx.ModelProto:
    """The folded network as ONNX: images (B, 1, 28, 28) → logits (B, 10)."""
    nodes, weights, x = [], [], INPUT
    for i, step in enumerate(steps):
        y = f"map{i + 1}"
        if isinstance(step, FoldedConvolution):
            names = [f"{step.name}.weight", f"{step.name}.bias"]
            values = (step.weight.astype(np.float32), step.bias.astype(np.float32))
            weights += [numpy_helper.from_array(v, name) for v, name in zip(values, names, strict=True)]
            out = f"{y}.sum" if step.rectified else y
            sizes = {"kernel_shape": [step.kernel] * 2, "strides": [step.stride] * 2, "pads": [step.padding] * 4}
            nodes.append(helper.make_node("Conv", [x, *names], [out], step.name, group=step.groups, **sizes))
            if step.rectified:
                nodes.append(helper.make_node("Relu", [out], [y], f"{step.name}.relu"))
        elif step.is_max:
            nodes.append(helper.make_node("MaxPool", [x], [y], f"pool{i}", kernel_shape=[2, 2], strides=[2, 2]))
        else:
            nodes.append(helper.make_node("GlobalAveragePool", [x], [y], f"mean{i}"))
        x = y
    nodes.append(helper.make_node("Flatten", [x], [OUTPUT], "flatten"))
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 1, INPUT_SIDE, INPUT_SIDE])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", N_CLASSES])
    graph = helper.make_graph(nodes, "network", [images], [logits], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Batches(CalibrationDataReader):
    def __init__(self, images: np.ndarray):
        self._batches = iter(np.array_split(images, max(1, len(images) // 100)))

    def get_next(self):
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def quantise(steps: list[FoldedStep], images: np.ndarray) -> onnx.ModelProto:
    """The folded network with 8-bit numbers in it, calibrated on these images (N, 1, 28, 28), normalised.

    The weights are stored unsigned around 128: x86 processors without VNNI add the products of unsigned and signed
    bytes with saturation, and only unsigned ones exactly.
    """
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            float_graph(steps),
            path,
            _Batches(images),
            quant_format=QuantFormat.QOperator,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8,
            extra_options={"WeightSymmetric": True},
        )
        return onnx.load(path)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """onnxruntime recommends to fold the norms before, by the root logger, and cannot see that they are."""
    root = logging.getLogger()
    before = root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class QuantisedConvolution:
    """y = round((Σ (x - zero_in)·weight + bias)·multiplier) + zero, half to even, and kept within 0 to 255.

    The sum is an int32, the product a float32: as onnxruntime's QLinearConv computes it.
    """

    step: FoldedConvolution
    weight: np.ndarray  # int8 (C', C / groups, K, K)
    bias: np.ndarray  # int32 (C')
    multiplier: np.ndarray  # float32 (C')
    zero_in: int
    zero: int


@dataclass(frozen=True)
class QuantisedMean:
    """The same for the mean of a map: y = round(Σ (x - zero_in)·multiplier) + zero."""

    step: Pool
    multiplier: np.float32
    zero_in: int
    zero: int


QuantisedStep = QuantisedConvolution | QuantisedMean | Pool


@dataclass(frozen=True)
class Quantised:
    """The steps of an int8 network on raw pixels; a logit is (y - zero)·scale of the last map."""

    steps: tuple[QuantisedStep, ...]
    scale: np.float32
    zero: int


def read(model: onnx.ModelProto, steps: list[FoldedStep]) -> Quantised:
    """The numbers of a quantised model, which was made from these steps.

    Raises `SolutionError` if its input is quantised to other numbers than the pixels themselves.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    first, *nodes = (node for node in model.graph.node if node.op_type != "Flatten")
    *nodes, last = nodes
    if [first.op_type, last.op_type] != ["QuantizeLinear", "DequantizeLinear"] or len(nodes) != len(steps):
        raise SolutionError("the quantised network has other layers than the network: use another onnxruntime")
    read_steps = tuple(
        _read_step(step, node.op_type, [values.get(name) for name in node.input])
        for step, node in zip(steps, nodes, strict=True)
    )
    return Quantised(read_steps, values[last.input[1]][()], int(values[last.input[2]]))


def _read_step(step: FoldedStep, kind: str, inputs: list[np.ndarray | None]) -> QuantisedStep:
    if isinstance(step, FoldedConvolution) and kind == "QLinearConv":
        _, scale_in, zero_in, weight, weight_scale, weight_zero, scale, zero, bias = inputs
        centred = weight.astype(np.int16) - weight_zero.astype(np.int16).reshape(-1, 1, 1, 1)
        multiplier = scale_in * weight_scale / scale  # in float32, in this order
        return QuantisedConvolution(step, centred.astype(np.int8), bias, multiplier, int(zero_in), int(zero))
    if isinstance(step, Pool) and step.is_max and kind == "MaxPool":
        return step
    if isinstance(step, Pool) and kind == "QLinearGlobalAveragePool":
        _, scale_in, zero_in, scale, zero = inputs
        multiplier = scale_in / (scale * np.float32(step.in_side**2))
        return QuantisedMean(step, multiplier[()], int(zero_in), int(zero))
    raise SolutionError(f"onnxruntime made a {kind} of a layer where int8 knows none: use another onnxruntime")
