"""Weights of 8 and 4 bits in an ONNX graph whose data stay floats.

DequantizeLinear makes floats of them, of one scale an output channel or of blocks of a row; a matrix product with
4-bit weights becomes ONNX Runtime's MatMulNBits, which unpacks as it multiplies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.core.numerics import Array
from edgeattn.quant.plan import QuantPlan, Scheme
from edgeattn.quant.rounding import round_rows
from edgeattn.targets.onnx_graph.execute import module_of
from edgeattn.targets.onnx_graph.qdq import Weighted, weighted

#: ONNX's first operator set with 4-bit integers and with blocks.
BLOCKS_OPSET = 21


def _constant(graph: ir.Graph, name: str, value: Array, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(value if dtype is None else value.astype(dtype.numpy()), dtype=dtype, name=name)
    constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
    graph.register_initializer(constant)
    return constant


def _scale(graph: ir.Graph, of: Weighted, scales: Array) -> ir.Value:
    """Scales in the type that the weight shall have; one that float16 cannot hold becomes the nearest that it can."""
    if of.weight.dtype == ir.DataType.FLOAT16:
        tiny = np.finfo(np.float16).smallest_normal
        scales = np.where(scales < 0, -1.0, 1.0) * np.clip(np.abs(scales), tiny, 65504)
    return _constant(graph, f"{of.weight.name}_scale", scales, of.weight.dtype)


def _rows(of: Weighted) -> Array:
    """The weight with its output channels as rows."""
    assert of.weight.const_value is not None
    value = of.weight.const_value.numpy().astype(np.float32)
    return np.moveaxis(value, of.axis, 0).reshape(value.shape[of.axis], -1)


def _note(node: ir.Node, like: ir.Node) -> ir.Node:
    if notes := like.metadata_props.get("pkg.torch.onnx.name_scopes"):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = notes
    return node


def _eight(graph: ir.Graph, of: Weighted) -> ir.Value:
    """int8 in the weight's own shape, one scale an output channel."""
    assert of.weight.const_value is not None
    name, shape = str(of.weight.name), of.weight.const_value.shape.numpy()
    integers, scales = round_rows(_rows(of), 8)
    moved = [shape[of.axis], *(n for i, n in enumerate(shape) if i != of.axis)]
    stored = np.ascontiguousarray(np.moveaxis(integers.reshape(moved), 0, of.axis))
    inputs = [_constant(graph, f"{name}_int8", stored), _scale(graph, of, scales[:, 0])]
    back = ir.node("DequantizeLinear", inputs, {"axis": of.axis}, name=f"{name}_dequantize")
    graph.insert_before(graph[0], _note(back, of.node))
    return back.outputs[0]


def _four(graph: ir.Graph, of: Weighted, group: int) -> ir.Value:
    """int4 as (rows, numbers of a row) with a scale for each block, brought into the weight's shape again."""
    assert of.weight.const_value is not None
    name, shape = str(of.weight.name), of.weight.const_value.shape.numpy()
    integers, scales = round_rows(_rows(of), 4, group)
    inputs = [_constant(graph, f"{name}_int4", integers, ir.DataType.INT4), _scale(graph, of, scales)]
    attributes = {"axis": 1, "block_size": min(group, integers.shape[1])}
    back = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}_dequantize")
    moved = [shape[of.axis], *(n for i, n in enumerate(shape) if i != of.axis)]
    whole = _constant(graph, f"{name}_shape", np.array(moved, np.int64))
    made = [back, ir.node("Reshape", [back.outputs[0], whole], name=f"{name}_whole")]
    if of.axis != 0:
        order = [*range(1, of.axis + 1), 0, *range(of.axis + 1, len(shape))]
        made.append(ir.node("Transpose", [made[-1].outputs[0]], {"perm": order}, name=f"{name}_turned"))
    graph.insert_before(graph[0], [_note(node, of.node) for node in made])
    return made[-1].outputs[0]


def _n_bits(graph: ir.Graph, of: Weighted, group: int) -> None:
    """The matrix product as MatMulNBits, its bias, if it has one, added behind."""
    name, node = str(of.weight.name), of.node
    rows = _rows(of)
    integers, scales = round_rows(rows, 4, group)
    count, width = rows.shape
    padded = np.zeros((count, scales.shape[1] * group), np.int8)
    padded[:, :width] = integers
    nibbles = (padded + 8).astype(np.uint8).reshape(count, scales.shape[1], group // 2, 2)
    packed = nibbles[..., 0] | (nibbles[..., 1] << 4)
    inputs = [
        node.inputs[0],  # not ``of.data``, which may have been the result of another that has been replaced
        _constant(graph, f"{name}_int4", packed),
        _scale(graph, of, scales.reshape(-1)),
    ]
    attributes = {"K": width, "N": count, "bits": 4, "block_size": group}
    product = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=node.name)
    made = [_note(product, node)]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        beside = ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_bias")
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        product.outputs[0].name = f"{node.outputs[0].name}_product"
        made.append(_note(beside, node))
    last, out = made[-1].outputs[0], node.outputs[0]
    last.type, last.shape, name = out.type, out.shape, str(out.name)
    graph.insert_after(node, made)
    outputs = list(graph.outputs)
    for i, value in enumerate(outputs):
        if value is out:
            graph.outputs[i] = last
    for use in tuple(out.uses()):
        use.node.replace_input_with(use.idx, last)
    out.name = f"{name}_replaced"
    last.name = name
    graph.remove(node, safe=True)


def _plain(of: Weighted) -> bool:
    """A product of the data with a matrix, and nothing else but a bias: what MatMulNBits can compute."""
    node = of.node
    if node.op_type == "Conv" or of.data.dtype != ir.DataType.FLOAT:
        return False
    if node.op_type == "MatMul":
        return of.weight.const_value is not None and len(of.weight.const_value.shape) == 2
    wants = {"alpha": 1.0, "beta": 1.0}
    same = all(abs(node.attributes.get_float(k, v) - v) == 0 for k, v in wants.items())
    return same and not node.attributes.get_int("transA", 0)


def weights_words(plan: QuantPlan) -> str:
    """What weights become, for the user."""
    return "int8 weights" if plan.precision == "w8" else f"int4 weights in blocks of {plan.group}"


def _whole(width: int, group: int) -> int:
    """The largest block of at most ``group`` that rows of this width consist of; the row where none of 16 or more."""
    sizes = [size for size in (128, 64, 32, 16) if size <= group and width % size == 0]
    return sizes[0] if sizes else width


def small_weights(model: ir.Model, plan: QuantPlan, standard: bool = False) -> list[dict[str, Any]]:
    """Store the weights of ``model``, in place, as the plan says.

    Args:
        standard: with operations of the ONNX standard alone, and blocks that rows consist of, as TensorRT wants them.

    Returns:
        What was done: node, operation, module and bits of each.
    """
    graph, done = model.graph, []
    made: dict[tuple[int, Scheme], ir.Value] = {}
    for of in weighted(model):
        scheme = plan.scheme(module_of(of.node))
        if scheme.floats:
            continue
        assert of.weight.const_value is not None
        if of.node.op_type == "Conv":
            scheme = scheme.for_kernel(of.weight.const_value.shape.numpy())
        done.append(
            {
                "node": str(of.node.name),
                "op": of.node.op_type,
                "module": module_of(of.node),
                "weights": f"int{scheme.weights}",
                "data": "float",
            }
        )
        if scheme.weights == 4 and not standard and _plain(of):
            _n_bits(graph, of, scheme.group)
            continue
        key = (id(of.weight), scheme)
        if key not in made:
            group = _whole(_rows(of).shape[1], scheme.group) if standard else scheme.group
            made[key] = _eight(graph, of) if scheme.weights == 8 else _four(graph, of, group)
            made[key].name = f"{of.weight.name}_{len(made)}_dequantized"
            made[key].type, made[key].shape = of.weight.type, of.weight.shape
        of.node.replace_input_with(1, made[key])
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]
    if any(v.dtype == ir.DataType.INT4 for v in graph.initializers.values()):
        model.opset_imports[""] = max(model.opset_imports[""], BLOCKS_OPSET)
        model.ir_version = max(model.ir_version, 10)
    if any(node.domain == "com.microsoft" for node in graph):
        model.opset_imports["com.microsoft"] = 1
    return done
