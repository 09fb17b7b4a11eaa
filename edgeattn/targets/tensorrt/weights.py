"""A decoder's weights in 8 and 4 bits, in the forms that TensorRT multiplies with as they are stored.

A token's step reads every weight once, so its time is that of reading them: weights that a kernel of its own first
makes floats of in memory are slower than float16. The plans of TensorRT for RTX 1.7.1 say which kernel reads what. It
unpacks inside of the product int4 in blocks of the weight's own shape, also where there is a matrix for each head, and
int8 with a single scale, but not int8 with a scale for each output channel where there is one token. So those scales
are multiplied with the product. Rows of an embedding are looked up before they become floats. A transposition right in
front of a product keeps the two apart; that of a single token moves nothing and is a Reshape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.core.numerics import Array
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.onnx_graph.execute import module_of
from edgeattn.targets.onnx_graph.weights import BLOCKS_OPSET
from edgeattn.targets.tensorrt import RTX

#: Weights that are rounded at once.
PIECE = 1 << 22
#: Sizes of a block, the largest first; rows that consist of none of them are a block each.
SIZES = (128, 64, 32, 16)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_NOTES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Product:
    """A product of the data with a constant matrix, or with one for each head.

    Attributes:
        rows_last: the weight is (..., outputs, inputs), else (..., inputs, outputs).
    """

    node: ir.Node
    weight: ir.Value
    rows_last: bool

    @property
    def rows(self) -> Array:
        """The weight as (..., outputs, inputs)."""
        assert self.weight.const_value is not None
        value = self.weight.const_value.numpy()
        return value if self.rows_last else value.swapaxes(-1, -2)

    def own(self, rows: Array) -> Array:
        """What is (..., outputs, inputs) in the weight's own layout."""
        return np.ascontiguousarray(rows if self.rows_last else rows.swapaxes(-1, -2))


def _products(model: ir.Model) -> Iterator[Product]:
    for node in model.graph:
        if node.op_type not in ("Gemm", "MatMul") or node.domain:
            continue
        data, weight = node.inputs[0], node.inputs[1]
        if data is None or data.const_value is not None or weight is None or weight.const_value is None:
            continue
        if weight.dtype in _FLOATS and len(weight.const_value.shape) in (2, 3):
            yield Product(node, weight, node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0)))


def _plain(node: ir.Node) -> bool:
    """Data times weight, and a bias at most."""
    wants = {"alpha": 1.0, "beta": 1.0}
    return not node.attributes.get_int("transA", 0) and all(
        node.attributes.get_float(k, v) == v for k, v in wants.items()
    )


def _stored(scales: Array, dtype: ir.DataType) -> Array:
    """Scales as numbers of a type; what float16 cannot hold with all its digits becomes the nearest that it can."""
    if dtype == ir.DataType.FLOAT:
        return scales.astype(np.float32)
    half: Array = np.clip(scales, np.finfo(np.float16).smallest_normal, np.finfo(np.float16).max).astype(np.float16)
    return half


def _in_pieces(rows: Array) -> Iterator[slice]:
    step = max(1, PIECE // rows.shape[1])
    return (slice(i, i + step) for i in range(0, rows.shape[0], step))


def round_eight(rows: Array, dtype: ir.DataType) -> tuple[Array, Array, Array]:
    """Integers (N, K), the single scale (), and what is left of each row's scale (N, 1), at most 1."""
    peaks = np.abs(rows).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127.0)
    whole = _stored(np.float32(peaks.max()) if peaks.max() > 0 else np.float32(1.0), dtype)
    rest = _stored(np.where(peaks > 0, peaks / whole.astype(np.float32), 1.0), dtype)
    integers = np.empty(rows.shape, np.int8)
    for part in _in_pieces(rows):
        scale = whole.astype(np.float32) * rest[part].astype(np.float32)
        integers[part] = np.clip(np.rint(rows[part].astype(np.float32) / scale), -127, 127)
    return integers, whole, rest


def round_four(rows: Array, group: int, dtype: ir.DataType) -> tuple[Array, Array]:
    """Integers -8 to 7 (N, K), and the scales (N, K / group), positive: TensorRT's own parser takes no others."""
    count, width = rows.shape
    integers = np.empty((count, width), np.int8)
    scales = np.empty((count, width // group), np.float32 if dtype == ir.DataType.FLOAT else np.float16)
    for part in _in_pieces(rows):
        blocks = rows[part].reshape(-1, width // group, group).astype(np.float32)
        peaks = np.abs(blocks).max(axis=-1, keepdims=True)
        least: Array = np.full(peaks.shape, np.inf, np.float32)
        best, found = np.empty(peaks.shape, scales.dtype), np.empty(blocks.shape, np.int8)
        for end in (8.0, 7.0):
            scale = _stored(np.where(peaks > 0, peaks / np.float32(end), 1.0), dtype)
            rounded = np.clip(np.rint(blocks / scale.astype(np.float32)), -8, 7)
            error = np.square(rounded * scale.astype(np.float32) - blocks).sum(axis=-1, keepdims=True)
            better = error < least
            least = np.where(better, error, least)
            best, found = np.where(better, scale, best), np.where(better, rounded, found).astype(np.int8)
        integers[part], scales[part] = found.reshape(-1, width), best[..., 0]
    return integers, scales


@dataclass(frozen=True)
class _Eight:
    """A weight in 8 bits: integers in its own layout, the single scale, and the rest as (..., 1, outputs).

    Attributes:
        rows: the whole scale of each output.
    """

    integers: ir.Value
    whole: ir.Value
    rest: ir.Value
    rows: Array


class SmallWeights:
    """Stores the weights of one graph in few bits, in place."""

    def __init__(self, model: ir.Model, plan: QuantPlan, flavour: str) -> None:
        """Nothing is changed yet."""
        self._model, self._graph, self._plan = model, model.graph, plan
        self._flavour = flavour
        # By the weight's id: several nodes may read one.
        self._eights: dict[int, _Eight] = {}
        self._fours: dict[int, ir.Value] = {}
        self.done: list[dict[str, Any]] = []

    def apply(self) -> list[dict[str, Any]]:
        """What was done: node, operation, module and bits of each."""
        products = [p for p in _products(self._model) if _plain(p.node)]
        sides = {id(p.weight): p.rows_last for p in reversed(products)}  # as the first of them has it
        products = [p for p in products if p.rows_last == sides[id(p.weight)]]
        # An embedding that is multiplied with, too.
        tables = {id(p.weight): p for p in products if p.rows_last and p.rows.ndim == 2}
        lookups = [
            node
            for node in self._graph
            if node.op_type == "Gather" and id(node.inputs[0]) in tables and not node.attributes.get_int("axis", 0)
        ]
        for node, of in [*((n, tables[id(n.inputs[0])]) for n in lookups), *((p.node, p) for p in products)]:
            scheme = self._plan.scheme(module_of(node))
            if scheme.floats:
                continue
            if scheme.weights == 4:
                node.replace_input_with(0 if node in lookups else 1, self._four(of, scheme.group))
            elif node in lookups:
                node.replace_input_with(0, self._rows_of_eight(of))
            else:
                self._eight(of)
            what = {"node": str(node.name), "op": node.op_type, "module": module_of(node)}
            self.done.append({**what, "weights": f"int{scheme.weights}", "data": "float"})
        for name in [n for n, v in self._graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            del self._graph.initializers[name]
        self._reshape_what_does_not_move()
        if self._fours:
            self._model.opset_imports[""] = max(self._model.opset_imports[""], BLOCKS_OPSET)
            self._model.ir_version = max(self._model.ir_version, 10)
        return self.done

    def _reshape_what_does_not_move(self) -> None:
        """Transpositions that move axes of size 1 alone, as Reshape."""
        for node in list(self._graph):
            value = node.inputs[0] if node.op_type == "Transpose" else None
            if value is None or value.shape is None or not value.shape.is_static():
                continue
            sizes, order = value.shape.numpy(), node.attributes.get_ints("perm", ())
            moved = [axis for axis in order if sizes[axis] != 1]
            if not order or moved != sorted(moved):
                continue
            shape = self._constant(f"{node.name}_shape", np.array([sizes[axis] for axis in order], np.int64))
            reshape = ir.node("Reshape", [value, shape], name=node.name)
            if notes := node.metadata_props.get(_NOTES):
                reshape.metadata_props[_NOTES] = notes
            ir.convenience.replace_nodes_and_values(
                self._graph, node, [node], [reshape], [node.outputs[0]], [reshape.outputs[0]]
            )

    def _constant(self, name: str, value: Array, dtype: ir.DataType | None = None) -> ir.Value:
        tensor = ir.tensor(value if dtype is None else value.astype(dtype.numpy()), dtype=dtype, name=name)
        kind = ir.TensorType(tensor.dtype)
        constant = ir.Value(name=name, type=kind, shape=ir.Shape(value.shape), const_value=tensor)
        self._graph.register_initializer(constant)
        return constant

    def _in_front(self, made: ir.Node, name: str, like: ir.Node, of: ir.Value) -> ir.Value:
        """A node's result, which stands for a weight."""
        made.name = name
        if notes := like.metadata_props.get(_NOTES):
            made.metadata_props[_NOTES] = notes
        self._graph.insert_before(self._graph[0], made)
        made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = f"{name}d", of.type, of.shape
        return made.outputs[0]

    def _four(self, of: Product, group: int) -> ir.Value:
        """The weight, from blocks along its inputs."""
        if id(of.weight) in self._fours:
            return self._fours[id(of.weight)]
        name, rows = str(of.weight.name), of.rows
        width = rows.shape[-1]
        group = next((size for size in SIZES if size <= group and width % size == 0), width)
        assert of.weight.dtype is not None
        integers, scales = round_four(rows.reshape(-1, width), group, of.weight.dtype)
        own = [of.own(value.reshape(*rows.shape[:-1], -1)) for value in (integers, scales)]
        axis = rows.ndim - (1 if of.rows_last else 2)
        # The documentation of TensorRT 10.1 has scales of two dimensions at most, that of 10.16 as many as the weight.
        flat = rows.ndim == 3 and self._flavour != RTX
        if flat:
            own, axis = [value.reshape(-1, value.shape[-1]) for value in own], axis - 1
        inputs = [
            self._constant(f"{name}_int4", own[0], ir.DataType.INT4),
            self._constant(f"{name}_int4_scale", own[1]),
        ]
        back = ir.node("DequantizeLinear", inputs, {"axis": axis, "block_size": group})
        made = self._in_front(back, f"{name}_dequantize", of.node, of.weight)
        if flat:
            back.outputs[0].shape = ir.Shape(own[0].shape)
            shape = self._constant(f"{name}_shape", np.array(of.weight.shape, np.int64))
            whole = ir.node("Reshape", [made, shape])
            self._graph.insert_after(back, whole)
            whole.name, whole.outputs[0].name = f"{name}_whole", f"{name}_whole"
            made = whole.outputs[0]
            made.type, made.shape = of.weight.type, of.weight.shape
        self._fours[id(of.weight)] = made
        return made

    def _integers(self, of: Product) -> _Eight:
        """The weight in 8 bits."""
        if id(of.weight) not in self._eights:
            name, rows = str(of.weight.name), of.rows
            assert of.weight.dtype is not None
            integers, whole, rest = round_eight(rows.reshape(-1, rows.shape[-1]), of.weight.dtype)
            by_output = rest.reshape(*rows.shape[:-2], 1, -1) if rows.ndim == 3 else rest.reshape(-1)
            scales = _stored(whole.astype(np.float32) * rest.astype(np.float32).reshape(-1), of.weight.dtype)
            self._eights[id(of.weight)] = _Eight(
                self._constant(f"{name}_int8", of.own(integers.reshape(rows.shape))),
                self._constant(f"{name}_int8_scale", whole),
                self._constant(f"{name}_scales", by_output),
                scales,
            )
        return self._eights[id(of.weight)]

    def _rows_of_eight(self, of: Product) -> ir.Value:
        """An embedding of which rows are looked up: with a scale for each row."""
        eight, name = self._integers(of), str(of.weight.name)
        inputs = [eight.integers, self._constant(f"{name}_row_scales", eight.rows)]
        back = ir.node("DequantizeLinear", inputs, {"axis": 0})
        return self._in_front(back, f"{name}_rows_dequantize", of.node, of.weight)

    def _eight(self, of: Product) -> None:
        """The product with integers of one scale, the rest of the scales multiplied with what comes out."""
        eight, node, name = self._integers(of), of.node, str(of.weight.name)
        back = ir.node("DequantizeLinear", [eight.integers, eight.whole])
        node.replace_input_with(1, self._in_front(back, f"{node.name}_{name}_dequantize", node, of.weight))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            node.resize_inputs(2)  # an input without a name is none to TensorRT
        out = node.outputs[0]
        uses, at = tuple(out.uses()), [i for i, value in enumerate(self._graph.outputs) if value is out]
        called, last = str(out.name), out
        out.name = f"{called}_unscaled"
        for kind, other in (("Mul", eight.rest), ("Add", bias)):
            if other is None:
                continue
            made = ir.node(kind, [last, other], name=f"{node.name}_{kind.lower()}")
            if notes := node.metadata_props.get(_NOTES):
                made.metadata_props[_NOTES] = notes
            producer = last.producer()
            assert producer is not None
            self._graph.insert_after(producer, made)
            last = made.outputs[0]
            last.type, last.shape, last.name = out.type, out.shape, f"{called}_{kind.lower()}"
        last.name = called
        for use in uses:
            use.node.replace_input_with(use.idx, last)
        for i in at:
            self._graph.outputs[i] = last


def small_weights(model: ir.Model, plan: QuantPlan, flavour: str) -> list[dict[str, Any]]:
    """Store the weights of ``model``, in place, in few bits; what was done of each."""
    return SmallWeights(model, plan, flavour).apply()
