"""ONNX operations that optics can compute: convolutions and linear layers whose weights are constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from edgeattn.core.numerics import Array
from edgeattn.targets.onnx_graph.execute import module_of
from edgeattn.targets.optical.forms import Form, conv_form, linear_form
from edgeattn.targets.optical.schedule import Pair

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Operator:
    """An operation that optics compute.

    Attributes:
        node: of the graph. form: for one run of the graph. input: the tensor that it reads.
        kernels: (groups, kernels, channels, N1, N2) as they convolve.
        bias: to be added to the result, of a shape that broadcasts; None if there is none.
    """

    node: ir.Node
    form: Form
    input: str
    kernels: torch.Tensor
    bias: Array | None

    @property
    def module(self) -> str:
        """Path of the torch module that it came from."""
        return self.form.work.name

    @property
    def output(self) -> str:
        """Name of the tensor that it gives."""
        return str(self.node.outputs[0].name)


def operator(node: ir.Node, plane: Pair) -> Operator | None:
    """The node as an optical operation; None where it is not one."""
    if node.domain or node.op_type not in _KINDS:
        return None
    return _KINDS[node.op_type](node, plane)


def _constant(node: ir.Node, place: int) -> Array | None:
    value = node.inputs[place] if len(node.inputs) > place else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a tensor of float32, if it is fixed."""
    if value is None or value.shape is None or value.dtype != _FLOAT:
        return None
    return tuple(int(str(n)) for n in value.shape) if value.shape.is_static() else None


def _computed(node: ir.Node, place: int) -> bool:
    """Whether there is an input at that place which is no constant."""
    return len(node.inputs) > place and node.inputs[place] is not None and _constant(node, place) is None


def _made(node: ir.Node, form: Form, weight: Array, bias: Array | None, place: int = 0) -> Operator:
    kernels = form.kernels(torch.from_numpy(np.array(weight, np.float32))).contiguous()
    value = node.inputs[place]
    assert value is not None
    return Operator(node, form, str(value.name), kernels, None if bias is None else bias.astype(np.float32))


def _conv(node: ir.Node, plane: Pair) -> Operator | None:
    weight, bias = _constant(node, 1), _constant(node, 2)
    shape, out = _shape(node.inputs[0]), _shape(node.outputs[0])
    padding = node.attributes.get_string("auto_pad", "NOTSET")
    if weight is None or shape is None or out is None or len(shape) not in (3, 4) or _computed(node, 2):
        return None
    if padding not in ("NOTSET", "VALID") or min(shape, default=1) < 1:
        return None
    spatial = len(shape) - 2
    stride, dilation = (list(node.attributes.get_ints(n, ()) or [1] * spatial) for n in ("strides", "dilations"))
    pads = list(node.attributes.get_ints("pads", ()) or [0] * (2 * spatial))[:spatial]
    groups = int(node.attributes.get_int("group", 1) or 1)
    transposed = node.op_type == "ConvTranspose"
    form = conv_form(module_of(node), shape, weight.shape, out, stride, pads, dilation, groups, transposed, plane)
    return _made(node, form, weight, None if bias is None else bias.reshape(-1, *[1] * spatial))


def _matmul(node: ir.Node, plane: Pair) -> Operator | None:
    left, right = _constant(node, 0), _constant(node, 1)
    if (left is None) == (right is None):
        return None
    # (inputs, outputs) on the right of the data, (outputs, inputs) on the left.
    matrix, place, axis = (left, 1, -2) if right is None else (right.T if right.ndim == 2 else right, 0, -1)
    shape = _shape(node.inputs[place])
    if matrix is None or matrix.ndim != 2 or shape is None or len(shape) < -axis or min(shape) < 1:
        return None
    return _made(node, linear_form(module_of(node), shape, len(matrix), axis, plane), matrix, None, place)


def _gemm(node: ir.Node, plane: Pair) -> Operator | None:
    matrix, bias, shape = _constant(node, 1), _constant(node, 2), _shape(node.inputs[0])
    flags = node.attributes
    if (
        matrix is None
        or shape is None
        or flags.get_int("transA", False)
        or not _computed(node, 0)
        or _computed(node, 2)
    ):
        return None
    alpha, beta = (float(flags.get_float(name, 1.0) or 0.0) for name in ("alpha", "beta"))
    matrix = alpha * (matrix if flags.get_int("transB", False) else matrix.T)
    form = linear_form(module_of(node), shape, len(matrix), -1, plane)
    return _made(node, form, matrix, None if bias is None else beta * bias)


_KINDS = {"Conv": _conv, "ConvTranspose": _conv, "MatMul": _matmul, "Gemm": _gemm}
