"""int8: the folded network, quantised by onnxruntime after the training, and what a writer needs to know of it.

Activations are unsigned 8-bit numbers, weights signed ones with a scale for each output channel, biases 32-bit.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from nas_mnist.data.datasets import Normalisation
from nas_mnist.data.deskew import upright
from nas_mnist.errors import SolutionError
from nas_mnist.model.architecture import INPUT_SIDE, N_CLASSES
from nas_mnist.solution.folding import FoldedConvolution, FoldedStep
from nas_mnist.solution.tracing import to_onnx
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
            out = f"{y}.sum" if step.activation else y
            sizes = {"kernel_shape": [step.kernel] * 2, "strides": [step.stride] * 2, "pads": [step.padding] * 4}
            nodes.append(helper.make_node("Conv", [x, *names], [out], step.name, group=step.groups, **sizes))
            if step.activation:
                nodes += _activation(step, out, y)
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


def _activation(step: FoldedConvolution, x: str, y: str) -> list[onnx.NodeProto]:
    """Behind a hard-swish, which onnxruntime computes in float32, a concatenation of one map: it makes bytes of its
    input, as a pool does not that would come next. `_without_concatenations` takes it away."""
    name = f"{step.name}.{step.activation}"
    if step.activation == "relu":
        return [helper.make_node("Relu", [x], [y], name)]
    alone = helper.make_node("Concat", [f"{y}.float"], [y], f"{name}.alone", axis=1)
    return [helper.make_node("HardSwish", [x], [f"{y}.float"], name), alone]


def behind_deskewing(model: onnx.ModelProto, like: Normalisation) -> onnx.ModelProto:
    """The network given images (B, 1, 28, 28) as they are, normalised, and making them upright itself."""
    deskewing = to_onnx(_Upright(like), (INPUT, "upright"), OPSET)
    deskewing.ir_version = model.ir_version
    deskewing = onnx.compose.add_prefix(deskewing, "deskew.", rename_inputs=False)
    return onnx.compose.merge_models(deskewing, model, io_map=[("deskew.upright", INPUT)])


class _Upright(nn.Module):
    def __init__(self, like: Normalisation):
        super().__init__()
        self._like = like

    def forward(self, x: Tensor) -> Tensor:
        return upright(x, self._like.mean, self._like.std)


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
        return _without_concatenations(onnx.load(path))


def _without_concatenations(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without those of one map, whose output is the bytes of their input: who reads the one now reads the other."""
    there = [node for node in model.graph.node if node.op_type == "QLinearConcat"]
    instead = {node.output[0]: node.input[2] for node in there}  # behind the scale and the zero of the output
    for node in there:
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [instead.get(name, name) for name in node.input]
    return model


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

    The sum is an int32, the product a float32: as onnxruntime's QLinearConv computes it. A ReLU is in these limits;
    what another activation makes of each y is in the table.
    """

    step: FoldedConvolution
    weight: np.ndarray  # int8 (C', C / groups, K, K)
    bias: np.ndarray  # int32 (C')
    multiplier: np.ndarray  # float32 (C')
    zero_in: int
    zero: int
    table: np.ndarray | None = None  # uint8 (256,)


@dataclass(frozen=True)
class QuantisedMean:
    """The same for the mean of a map: y = round(Σ (x - zero_in)·multiplier) + zero."""

    step: Pool
    multiplier: np.float32
    zero_in: int
    zero: int


TABULATED = ("DequantizeLinear", "HardSwish", "QuantizeLinear")  # what becomes a table behind a convolution
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
    there = [node.op_type for node in nodes if node.op_type not in TABULATED]
    if [first.op_type, last.op_type] != ["QuantizeLinear", "DequantizeLinear"] or len(there) != len(steps):
        raise SolutionError("the quantised network has other layers than the network: use another onnxruntime")
    rest = iter([(node.op_type, [values.get(name) for name in node.input]) for node in nodes])
    read_steps = []
    for step in steps:
        quantised = _read_step(step, *next(rest))
        if isinstance(step, FoldedConvolution) and step.activation == "hardswish":
            quantised = replace(quantised, table=_read_table([next(rest) for _ in TABULATED]))
        read_steps.append(quantised)
    return Quantised(tuple(read_steps), values[last.input[1]][()], int(values[last.input[2]]))


def _read_table(nodes: list[tuple[str, list[np.ndarray | None]]]) -> np.ndarray:
    """What hard-swish makes of each byte: onnxruntime computes it in float32 between two maps of bytes."""
    kinds, (inputs, _, outputs) = zip(*nodes, strict=True)
    if kinds != TABULATED:
        raise SolutionError(f"onnxruntime made {', '.join(kinds)} of a hard-swish: use another onnxruntime")
    _, scale, zero = inputs
    x = (np.arange(256, dtype=np.float32) - np.float32(zero)) * scale
    y = x * np.clip(x * np.float32(1 / 6) + np.float32(0.5), np.float32(0), np.float32(1))
    _, scale, zero = outputs
    return np.clip(np.rint(y / scale) + int(zero), 0, 255).astype(np.uint8)


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
