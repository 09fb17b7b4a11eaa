"""ONNX operations that optics can compute: convolutions and linear layers whose weights are constants.

Each is brought into the form of ``schedule.Workload``: maps, kernels that convolve them, and which values of the full
convolutions are wanted. Electronics lay the maps out before and add the bias after.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.core.numerics import Array
from edgeattn.targets.onnx_graph.execute import module_of
from edgeattn.targets.optical.schedule import Pair, Workload

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Layout:
    """How electronics bring a tensor onto the planes and back, as plain data.

    Attributes:
        kind: ``conv``, of (B, C, *spatial); or ``linear``, over ``axis`` of a tensor.
        groups, channels: that the maps are told apart by. spatial: dimensions of a convolution's input.
        before, after: zeros around a map, (down, right). spread: distance of its values, with zeros between.
        map, out: pixels of a map as it is shown, and of a result, (down, right).
        axis: of a linear layer, from the end; its values fill ``channels`` maps one after the other.
    """

    kind: str
    groups: int
    channels: int
    map: Pair
    out: Pair
    spatial: int = 2
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    spread: Pair = (1, 1)
    axis: int = -1

    def maps(self, x: Array) -> Array:
        """A tensor as maps (rows, groups, channels, M1, M2)."""
        if self.kind == "linear":
            x = np.moveaxis(x, self.axis, -1)
            flat = x.reshape(-1, x.shape[-1])
            full = self.channels * math.prod(self.map)
            flat = np.pad(flat, ((0, 0), (0, full - flat.shape[1])))
            return flat.reshape(len(flat), 1, self.channels, *self.map)
        x = x.reshape(len(x), self.groups, self.channels, *([1] * (2 - self.spatial)), *x.shape[2:])
        if self.spread != (1, 1):
            sizes = [(n - 1) * step + 1 for n, step in zip(x.shape[3:], self.spread, strict=True)]
            wide = np.zeros((*x.shape[:3], *sizes), x.dtype)
            wide[..., :: self.spread[0], :: self.spread[1]] = x
            x = wide
        around = [(0, 0)] * 3 + list(zip(self.before, self.after, strict=True))
        return np.pad(x, around) if any(map(any, around)) else x

    def result(self, y: Array, shape: tuple[int, ...]) -> Array:
        """Outputs (rows, groups, kernels, out1, out2) as the operation gives them, for an input of ``shape``."""
        if self.kind == "linear":
            kept = list(shape)
            del kept[self.axis]
            return np.moveaxis(y.reshape(*kept, y.shape[2]), -1, self.axis)
        return y.reshape(len(y), y.shape[1] * y.shape[2], *self.out[2 - self.spatial :])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layout:
        """The inverse of ``as_dict``."""
        return Layout(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


@dataclass(frozen=True)
class Operator:
    """An operation that optics compute.

    Attributes:
        node: of the graph. module: path of the torch module it came from.
        work: for one run of the graph. kernels: (groups, kernels, channels, N1, N2) as they convolve.
        bias: to be added to the result, of a shape that broadcasts; None if there is none.
    """

    node: ir.Node
    module: str
    work: Workload
    layout: Layout
    kernels: Array
    bias: Array | None

    @property
    def input(self) -> str:
        """Name of the tensor that it reads."""
        (name,) = (str(value.name) for value in self.node.inputs[:2] if value is not None and _constant(value) is None)
        return name

    @property
    def output(self) -> str:
        """Name of the tensor that it gives."""
        return str(self.node.outputs[0].name)


def _constant(value: ir.Value | None) -> Array | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    if value is None or value.shape is None or value.dtype != _FLOAT:
        return None
    sizes = tuple(value.shape)
    return tuple(int(str(n)) for n in sizes) if all(isinstance(n, int) for n in sizes) else None


def operator(node: ir.Node, plane: Pair) -> Operator | None:
    """The node as an optical operation; None where it is not one."""
    if node.domain or node.op_type not in _KINDS:
        return None
    return _KINDS[node.op_type](node, plane)


def _two(values: Any, count: int, default: int) -> list[int]:
    """Numbers for two spatial dimensions, where there may be one of them."""
    given = list(values) if values else [default] * count
    return [default] * (2 - count) + [int(v) for v in given]


def _conv(node: ir.Node, plane: Pair) -> Operator | None:
    weight, shape, out = _constant(node.inputs[1]), _shape(node.inputs[0]), _shape(node.outputs[0])
    bias = _constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    padding = node.attributes.get_string("auto_pad", "NOTSET")
    if weight is None or shape is None or out is None or len(shape) not in (3, 4) or padding not in ("NOTSET", "VALID"):
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and bias is None:
        return None
    spatial = len(shape) - 2
    groups = int(node.attributes.get_int("group", 1) or 1)
    strides = _two(node.attributes.get_ints("strides", None), spatial, 1)
    steps = _two(node.attributes.get_ints("dilations", None), spatial, 1)
    pads = list(node.attributes.get_ints("pads", None) or [0] * (2 * spatial))
    begins, ends = _two(pads[:spatial], spatial, 0), _two(pads[spatial:], spatial, 0)
    sizes = [1] * (2 - spatial) + list(shape[2:])
    outs = [1] * (2 - spatial) + list(out[2:])
    taps = [1] * (2 - spatial) + list(weight.shape[2:])
    weight = weight.reshape(*weight.shape[:2], *taps)
    reach = [(n - 1) * d + 1 for n, d in zip(taps, steps, strict=True)]
    spread = (1, 1)
    if node.op_type == "Conv":
        kernels = weight.reshape(groups, -1, *weight.shape[1:])[..., ::-1, ::-1]
        start = [n - 1 - p for n, p in zip(reach, begins, strict=True)]
        macs = math.prod(out) * weight.shape[1] * math.prod(taps)
    else:  # transposed: a full convolution of the input with zeros between its values, of which the edges are cut
        kernels = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
        spread, strides = (strides[0], strides[1]), [1, 1]
        sizes = [(m - 1) * s + 1 for m, s in zip(sizes, spread, strict=True)]
        start = begins
        macs = math.prod(shape) * weight.shape[1] * math.prod(taps)
    del ends  # what is wanted says how far it reaches
    # Where values are wanted that even the full convolution does not reach, the map has zeros around it.
    before = [max(0, -a) for a in start]
    start = [max(0, a) for a in start]
    full = [m + b + n - 1 for m, b, n in zip(sizes, before, reach, strict=True)]
    last = [a + (o - 1) * s + 1 for a, o, s in zip(start, outs, strides, strict=True)]
    after = [max(0, end - have) for end, have in zip(last, full, strict=True)]
    sizes = [m + b + a for m, b, a in zip(sizes, before, after, strict=True)]
    wide = np.zeros((*kernels.shape[:3], *reach), np.float32)
    wide[..., :: steps[0], :: steps[1]] = kernels
    module = module_of(node)
    work = Workload(
        module,
        shape[0],
        groups,
        kernels.shape[2],
        kernels.shape[1],
        (sizes[0], sizes[1]),
        (reach[0], reach[1]),
        (start[0], start[1]),
        (outs[0], outs[1]),
        (strides[0], strides[1]),
        macs,
    )
    layout = Layout(
        "conv",
        groups,
        kernels.shape[2],
        work.map,
        work.out,
        spatial,
        (before[0], before[1]),
        (after[0], after[1]),
        spread,
    )
    if bias is not None:
        bias = bias.reshape(-1, *[1] * spatial)
    return Operator(node, module, work, layout, wide, bias)


def _linear(node: ir.Node, plane: Pair) -> Operator | None:
    left, right = _constant(node.inputs[0]), _constant(node.inputs[1])
    if (left is None) == (right is None):
        return None
    matrix, axis, shape = (right, -1, _shape(node.inputs[0])) if left is None else (left, -2, _shape(node.inputs[1]))
    if matrix is None or matrix.ndim != 2 or shape is None or len(shape) < -axis:
        return None
    # (inputs, outputs) on the right of the data, (outputs, inputs) on the left.
    return _product(node, matrix.T if axis == -1 else matrix, shape, axis, None, plane)


def _gemm(node: ir.Node, plane: Pair) -> Operator | None:
    matrix, shape = _constant(node.inputs[1]), _shape(node.inputs[0])
    flags = node.attributes
    if matrix is None or shape is None or flags.get_int("transA", 0) or _constant(node.inputs[0]) is not None:
        return None
    third = node.inputs[2] if len(node.inputs) > 2 else None
    bias = _constant(third)
    if third is not None and bias is None:
        return None
    matrix = matrix if flags.get_int("transB", 0) else matrix.T
    alpha, beta = (float(flags.get_float(name, 1.0) or 0.0) for name in ("alpha", "beta"))
    return _product(node, alpha * matrix, shape, -1, None if bias is None else beta * bias, plane)


def _product(
    node: ir.Node, matrix: Array, shape: tuple[int, ...], axis: int, bias: Array | None, plane: Pair
) -> Operator:
    """A matrix (outputs, inputs) times a tensor: each of its rows, as a map, is a kernel of one wanted value."""
    outputs, inputs = matrix.shape
    # As square as can be; a plane's worth at a time, whose products are summed.
    channels = -(-inputs // math.prod(plane))
    each = -(-inputs // channels)
    down = min(math.isqrt(each - 1) + 1 if each > 1 else 1, plane[0])
    right = -(-each // down)
    if right > plane[1]:
        right = plane[1]
        down = -(-each // right)
    full = channels * down * right
    kernels = np.zeros((outputs, full), np.float32)
    kernels[:, :inputs] = matrix
    kernels = kernels.reshape(1, outputs, channels, down, right)[..., ::-1, ::-1]
    rows = math.prod(shape) // shape[axis]
    module = module_of(node)
    work = Workload(
        module,
        rows,
        1,
        channels,
        outputs,
        (down, right),
        (down, right),
        (down - 1, right - 1),
        (1, 1),
        macs=rows * outputs * inputs,
    )
    layout = Layout("linear", 1, channels, (down, right), (1, 1), axis=axis)
    return Operator(node, module, work, layout, np.ascontiguousarray(kernels), bias)


_KINDS = {"Conv": _conv, "ConvTranspose": _conv, "MatMul": _linear, "Gemm": _gemm}
