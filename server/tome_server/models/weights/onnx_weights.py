"""Reads a network's tensors from an ONNX export, under the names that its PyTorch modules had.

Exporters keep the names of most parameters. The weight of a linear layer is stored transposed and under a number, but
is recognised by the bias that is added right after it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor

from tome_server.errors import ModelLoadError


@dataclass(frozen=True)
class OnnxWeights:
    """What an export tells about the model that it was made from."""

    tensors: dict[str, Tensor]
    """By the names of parameters; tensors that lost theirs have the graph's names."""
    input_size: tuple[int, int] | None
    """Height and width of its first input in pixels; None if the export leaves them open."""


def read_onnx(path: Path) -> OnnxWeights:
    """Read the tensors of the ONNX file at `path`, including those in data files beside it.

    Raises ModelLoadError if it can't be read.
    """
    try:
        graph = onnx.load(str(path)).graph
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:  # an export keeps only one of several equal tensors, such as biases of zeros
            if node.op_type == "Identity" and node.input[0] in stored:
                stored[node.output[0]] = stored[node.input[0]]
    except Exception as error:  # errors of protobuf and onnx, and whatever numpy raises for a damaged file
        raise ModelLoadError(f"checkpoint {path} can't be read as ONNX: {str(error) or repr(error)}") from error
    if not stored:
        raise ModelLoadError(f"checkpoint {path} can't be read as ONNX: it holds no tensors")
    tensors = _name_linear_weights(graph, stored)
    return OnnxWeights(
        {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, _input_size(graph.input[:1])
    )


def _name_linear_weights(
    graph: onnx.GraphProto, stored: dict[str, "np.typing.NDArray[np.generic]"]
) -> "dict[str, np.typing.NDArray[np.generic]]":
    """Give each matrix that tokens are multiplied by the name X.weight, if a bias X.bias is added to the product."""
    tensors = dict(stored)
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, reversed(node.input)):
            matrix = products.get(product, "")
            if matrix in stored and stored[matrix].ndim == 2 and bias in stored and bias.endswith(".bias"):
                tensors.pop(matrix, None)
                tensors[bias.removesuffix("bias") + "weight"] = stored[matrix].T
    return tensors


def _input_size(inputs: "list[onnx.ValueInfoProto]") -> tuple[int, int] | None:
    for given in inputs:
        shape = [dimension.dim_value for dimension in given.type.tensor_type.shape.dim]
        if len(shape) == 4 and min(shape[2:]) > 0:
            return shape[2], shape[3]
    return None
