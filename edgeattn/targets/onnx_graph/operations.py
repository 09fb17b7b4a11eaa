"""What every node of an ONNX graph computes and moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import shape_inference

from edgeattn.core.errors import UsageError
from edgeattn.targets.base import Artifact, OpCost, entry_of
from edgeattn.targets.onnx_graph.execute import module_of

_Shape = tuple[int, ...]
_Macs = tuple[int, int, int, int]

#: They give what they are given, in another shape or under another name.
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size")
#: They read as much of their first input as they give.
_TAKES = ("Gather", "GatherElements", "GatherND", "GatherBlockQuantized", "Slice")
#: A pair of them stands for storage in integers: what is between two operations is as wide as the integers.
_TO, _FROM = "QuantizeLinear", "DequantizeLinear"
#: Runtimes make them a part of the operation before, so that its result is stored once, after them.
_BEFORE_STORAGE = ("Relu", "Clip")
#: Places of the data and of the weights among the inputs, where they are not the first two.
_OPERANDS = {"QLinearConv": (0, 3), "QLinearMatMul": (0, 3)}
_CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
_PRODUCTS = ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "MatMulNBits", "Einsum", "Attention")
_INTEGER = ("ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul")
_FLOATS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_SMALL = (ir.DataType.INT8, ir.DataType.UINT8)


def operations(artifact: Artifact, entry: str) -> list[OpCost]:
    """The nodes of an entry's graph, see ``Target.operations``.

    Raises:
        UsageError: unknown entry, or a file that cannot be read.
    """
    found = entry_of(artifact, entry)
    path = Path(artifact.folder, found.file)
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's own, or the reader's
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError("the ONNX file cannot be read", value=path, why=why, fix="copy or export it again") from error
    return operations_of(model, {t.name: t.shape for t in found.inputs})


def operations_of(model: ir.Model, inputs: Mapping[str, Sequence[int]]) -> list[OpCost]:
    """The nodes of a graph in memory, whose shapes are filled in; what is inside of control flow is not looked at.

    Constants, and nodes that compute with constants alone, cost nothing: a runtime computes them once. The bytes of
    weights are those that the file stores, before any such node. A dimension that nothing tells counts as 1.

    Args:
        inputs: shapes of the graph's inputs by name, where they vary.
    """
    _fill_shapes(model, inputs)
    table = _Table()
    return [table.row(node) for node in model.graph if node.op_type != "Constant"]


def _known(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and all(isinstance(n, int) for n in value.shape)


def _shape(value: ir.Value | None) -> _Shape:
    """With 1 for what is unknown."""
    sizes = () if value is None or value.shape is None else value.shape
    return tuple(n if isinstance(n, int) else 1 for n in sizes)


def _fill_shapes(model: ir.Model, inputs: Mapping[str, Sequence[int]]) -> None:
    """Numbers in place of symbols, which the exporter's expressions are of; then what ONNX infers of the rest."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        given = inputs.get(str(value.name))
        if given is not None and value.shape is not None and len(given) == len(value.shape):
            for symbol, size in zip(value.shape, given, strict=True):
                if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                    sizes[symbol.value] = size
            value.shape = ir.Shape(given)

    def settle(dimension: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(dimension, int) or dimension.value is None:
            return dimension
        try:
            number: int | ir.SymbolicDim | None = dimension.evaluate(sizes)
        except (TypeError, ValueError, SyntaxError):  # of a symbol that no input has
            return dimension
        return number if isinstance(number, int) else dimension

    outputs = [value for node in model.graph for value in node.outputs]
    for value in outputs:
        if value.shape is not None:
            value.shape = ir.Shape([settle(n) for n in value.shape])
    for attempt in range(2):
        for node in model.graph:
            _fill_node(node)
        if attempt or all(map(_known, outputs)):
            break
        shape_inference.infer_shapes(model, check_type=False, strict_mode=False)


def _fill_node(node: ir.Node) -> None:
    """Shapes of what EdgeAttn's own passes put in, which no inference knows or which have none noted."""
    out = node.outputs[0] if node.outputs else None
    first = node.inputs[0] if node.inputs else None
    if out is None or _known(out) or not _known(first):
        return
    given = _shape(first)
    if node.op_type in (_TO, _FROM, *_BEFORE_STORAGE):
        out.shape = ir.Shape(given)
    elif node.op_type == "MatMulNBits":
        out.shape = ir.Shape((*given[:-1], node.attributes.get_int("N", 1)))
    elif node.op_type == "Reshape" and out.shape is not None:
        rest = [n for n in out.shape if isinstance(n, int)]
        known: int = math.prod(rest)
        if len(rest) == len(out.shape) - 1 and known:
            missing = math.prod(given) // known
            out.shape = ir.Shape([n if isinstance(n, int) else missing for n in out.shape])


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node that made a value, if it is of that kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _width(dtype: ir.DataType | None) -> float:
    """Bytes of an element; of texts none."""
    return dtype.bitwidth / 8 if dtype is not None and dtype != ir.DataType.STRING else 0.0


class _Table:
    """Rows for the nodes of one graph; remembers which values are constant."""

    def __init__(self) -> None:
        self._constant: dict[int, bool] = {}

    def constant(self, value: ir.Value) -> bool:
        """Whether a value is known before anything runs."""
        key = id(value)
        if key not in self._constant:
            maker = value.producer()
            if value.const_value is not None or value.is_initializer():
                self._constant[key] = True
            elif maker is None:
                self._constant[key] = False
            else:
                given = [v for v in maker.inputs if v is not None]
                alone = all(map(self.constant, given)) and not value.is_graph_output()
                self._constant[key] = alone and (bool(given) or maker.op_type == "Constant")
        return self._constant[key]

    def stored(self, value: ir.Value) -> dict[int, int]:
        """Bytes of the constants in the file that a constant is made of."""
        maker = value.producer()
        if maker is None or not any(v is not None for v in maker.inputs):
            held = value.const_value
            size = held.nbytes if held is not None else math.ceil(math.prod(_shape(value)) * _width(value.dtype))
            return {id(value): size}
        found: dict[int, int] = {}
        for given in maker.inputs:
            if given is not None:
                found |= self.stored(given)
        return found

    def _stored_as(self, value: ir.Value) -> ir.DataType | None:
        """What a tensor of data is stored as: the integers of a pair around it, or its own type."""
        back = _maker(value, _FROM)
        if back is not None and back.inputs[0] is not None:
            return back.inputs[0].dtype or ir.DataType.INT8
        readers = [use.node for use in value.uses()]
        if value.is_graph_output() or not readers:
            return value.dtype
        if len(readers) == 1 and readers[0].op_type in _BEFORE_STORAGE:
            return self._stored_as(readers[0].outputs[0])
        if all(reader.op_type == _TO for reader in readers):
            return readers[0].outputs[0].dtype or ir.DataType.INT8
        return value.dtype

    def _bytes(self, value: ir.Value) -> int:
        return math.ceil(math.prod(_shape(value)) * _width(self._stored_as(value)))

    def row(self, node: ir.Node) -> OpCost:
        """What a node costs."""
        given = list(dict.fromkeys(value for value in node.inputs if value is not None))
        data = [value for value in given if not self.constant(value)]
        outputs = [value for value in node.outputs if value.name]
        rest = (tuple(str(v.name) for v in data), tuple(str(v.name) for v in outputs))
        name, module, kind = str(node.name or node.outputs[0].name), module_of(node), node.op_type
        dtype = self._dtype(node, data)
        free = kind in (*VIEWS, _TO, _FROM) or (bool(outputs) and all(map(self.constant, outputs)))
        if free:
            return OpCost(name, module, kind, 0, 0, 0, 0, dtype, 0, 0, 1, *rest)
        read, made = sum(map(self._bytes, data)), sum(map(self._bytes, outputs))
        leaves: dict[int, int] = {}
        for value in given:
            if self.constant(value):
                leaves |= self.stored(value)
        weights = sum(leaves.values())
        if kind in _TAKES and node.inputs[0] is not None:
            read, weights = self._taken(node.inputs[0], outputs[0], made)
        macs, channels, fan, taps = _macs(node)
        return OpCost(name, module, kind, macs, read, weights, made, dtype, channels, fan, taps, *rest)

    def _taken(self, source: ir.Value, out: ir.Value, made: int) -> tuple[int, int]:
        """Bytes that a lookup reads of data and of constants."""
        if not self.constant(source):
            return made, 0
        whole, held = math.prod(_shape(source)), sum(self.stored(source).values())
        return 0, math.ceil(held * min(1.0, math.prod(_shape(out)) / max(whole, 1)))

    def _dtype(self, node: ir.Node, data: Sequence[ir.Value]) -> str:
        """See ``OpCost.dtype``."""
        if node.op_type in _INTEGER:
            return "w8a8"
        if node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == 4:
            return "w8a8"  # the data are rounded as they come
        operands = list(data)
        if node.op_type in (*_CONVOLUTIONS, *_PRODUCTS):
            operands = [value for value in node.inputs[:2] if value is not None]
        makers = [_maker(value, _FROM) for value in operands]
        types = {maker.inputs[0].dtype for maker in makers if maker is not None and maker.inputs[0] is not None}
        if makers and all(makers) and node.op_type not in (_TO, _FROM):
            if types <= set(_FP8):
                return "fp8"
            if types <= {*_SMALL, None}:
                return "w8a8"
        types_of = [value.dtype for value in (*node.outputs, *data) if value.dtype is not None]
        return next((_FLOATS[dtype] for dtype in types_of if dtype in _FLOATS), "int" if types_of else "fp32")


def _macs(node: ir.Node) -> _Macs:
    """``macs``, ``channels``, ``fan`` and ``taps`` of a node, see ``OpCost``."""
    rule = _RULES.get(node.op_type)
    return rule(node) if rule is not None and node.outputs else (0, 0, 0, 1)


def _operands(node: ir.Node) -> tuple[_Shape, _Shape, _Shape]:
    """Shapes of data, weights and result."""
    first, second = _OPERANDS.get(node.op_type, (0, 1))
    return _shape(node.inputs[first]), _shape(node.inputs[second]), _shape(node.outputs[0])


def _groups(node: ir.Node) -> int:
    return max(node.attributes.get_int("group", 1), 1)


def _convolution(node: ir.Node) -> _Macs:
    """Weights are (Co, Ci / groups, k...): each makes one element of the result."""
    _, weight, out = _operands(node)
    if len(weight) < 2:
        return 0, 0, 0, 1
    return math.prod(out) * math.prod(weight[1:]), weight[1], weight[0] // _groups(node), math.prod(weight[2:])


def _transposed(node: ir.Node) -> _Macs:
    """Weights are (Ci, Co / groups, k...): each spreads one element of the data."""
    data, weight, _ = _operands(node)
    if len(weight) < 2:
        return 0, 0, 0, 1
    return math.prod(data) * math.prod(weight[1:]), weight[0] // _groups(node), weight[1], math.prod(weight[2:])


def _product(node: ir.Node) -> _Macs:
    """(..., n, k) @ (..., k, m), with broadcasting; a Gemm's data may stand the other way round."""
    data, _, out = _operands(node)
    inner = data[0 if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1 else -1] if data else 1
    return math.prod(out) * inner, inner, out[-1] if out else 1, 1


def _einsum(node: ir.Node) -> _Macs:
    """Of two factors: one multiply-accumulate for each choice of all letters; of other numbers of factors nothing."""
    left, _, right = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "." in left:
        return 0, 0, 0, 1
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        for letter, size in zip(term, _shape(value), strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
    inner = math.prod(size for letter, size in sizes.items() if letter not in right)
    return math.prod(sizes.values()), inner, 0, 1


def _attention(node: ir.Node) -> _Macs:
    """Q (B, H, N, D) or (B, N, H * D), with K and V alike: both products; the past is part of what they read."""
    query, key, value = (_shape(v) for v in node.inputs[:3])
    if len(query) == 3:
        query_heads = node.attributes.get_int("q_num_heads", 1)
        heads = node.attributes.get_int("kv_num_heads", query_heads)
        query = (query[0], query_heads, query[1], query[2] // query_heads)
        key, value = ((v[0], heads, v[1], v[2] // heads) for v in (key, value))
    if min(len(query), len(key), len(value)) < 4:
        return 0, 0, 0, 1
    past = _shape(node.inputs[4])[2] if len(node.inputs) > 4 and node.inputs[4] is not None else 0
    return math.prod(query[:3]) * (key[2] + past) * (query[3] + value[3]), query[3], 0, 1


def _in_blocks(node: ir.Node) -> _Macs:
    inner = node.attributes.get_int("K", 1)
    return math.prod(_shape(node.outputs[0])) * inner, inner, node.attributes.get_int("N", 1), 1


_RULES: dict[str, Callable[[ir.Node], _Macs]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv"), _convolution),
    "ConvTranspose": _transposed,
    **dict.fromkeys(("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm"), _product),
    "MatMulNBits": _in_blocks,
    "Einsum": _einsum,
    "Attention": _attention,
}
