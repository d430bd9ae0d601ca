"""A torch module of images as an ONNX file's content: any batch size, and no trace of the machine."""

import contextlib
import logging
import warnings

import onnx
import torch
from torch import nn


def to_onnx(module: nn.Module, names: tuple[str, str], opset: int) -> onnx.ModelProto:
    """What the module makes of images (B, 1, 28, 28), normalised; `names` are those of its input and its output."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            module,
            (torch.zeros(2, 1, 28, 28),),
            dynamo=True,
            opset_version=opset,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None  # it is None for the exporter before this one
    return _without_traces(program.model_proto)


def _without_traces(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The exporter notes for every node the files and lines it comes from, on the machine that it ran on."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    onnx.checker.check_model(proto, full_check=True)
    return proto
