"""Weights in blocks of a row, multiplied as they are stored: ONNX Runtime's MatMulNBits and GatherBlockQuantized.

For decoders. A token's step reads every weight once, so its time is that of reading them: 8 bits unpacked to floats
when the session is made, as ``weights`` has them, would be as slow as float32. With ``accuracy_level`` 4 the products
are of 8-bit integers, the data rounded by blocks as they come; with floats the kernels are 3 (4 bits) and 150 times
(8 bits) slower on x86 (ONNX Runtime 1.32, measured), and what it costs is in the numbers that are verified.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.core.numerics import Array
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import round_rows
from edgeattn.targets.onnx_graph.execute import module_of

#: Data are rounded to 8 bits by blocks.
ACCURACY_LEVEL = 4
_DOMAIN = "com.microsoft"
#: (H, T, N) to (T, H, N), and back.
_TURN = (1, 0, 2)


def packed(rows: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Rows (N, K) as MatMulNBits wants them: uint8 (N, blocks, bytes of a block), and scales (N, blocks)."""
    integers, scales = round_rows(rows, bits, group)
    count, blocks = rows.shape[0], scales.shape[1]
    padded = np.zeros((count, blocks * group), np.int8)
    padded[:, : rows.shape[1]] = integers
    raised: Array = padded.view(np.uint8) + np.uint8(1 << (bits - 1))  # modulo 256, as it should be
    if bits == 4:
        raised = raised[:, 0::2] | (raised[:, 1::2] << 4)
    return raised.reshape(count, blocks, group * bits // 8), scales


class Blocks:
    """Replaces the weighted operations of one graph, in place."""

    def __init__(self, model: ir.Model, plan: QuantPlan) -> None:
        """Nothing is changed yet."""
        self._graph, self._plan = model.graph, plan
        self._stored: dict[tuple[str, int, int], tuple[ir.Value, ir.Value]] = {}
        self._model = model
        self.done: list[dict[str, Any]] = []

    def apply(self) -> list[dict[str, Any]]:
        """What was done: node, operation, module and bits of each."""
        self._fold_shapes()
        for node in list(self._graph):
            weight = _weight(node)
            if weight is None:
                continue
            scheme = self._plan.scheme(module_of(node))
            if scheme.floats:
                continue
            bits, group = scheme.weights, scheme.group or self._plan.group
            if node.op_type == "Gather":
                self._gather(node, weight, bits, group)
            elif node.op_type == "MatMul" and len(weight.shape or ()) == 3:
                self._by_head(node, weight, bits, group)
            else:
                self._product(node, weight, bits, group)
            what = {"node": str(node.name), "op": node.op_type, "module": module_of(node)}
            self.done.append({**what, "weights": f"int{bits} in blocks of {group}", "data": "float"})
        for name in [n for n, v in self._graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            del self._graph.initializers[name]
        if self.done:
            self._model.opset_imports[_DOMAIN] = 1
        return self.done

    def _fold_shapes(self) -> None:
        """Weights that are read transposed or in another shape become constants: the exporter leaves large ones."""
        for node in list(self._graph):
            weight = node.inputs[0] if node.op_type in ("Transpose", "Reshape") and node.inputs else None
            if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT:
                continue
            if node.op_type == "Transpose":
                perm = node.attributes.get_ints("perm", ())
                value = _array(weight).transpose(tuple(perm) or None)
            elif node.inputs[1] is not None and node.inputs[1].const_value is not None:
                value = _array(weight).reshape(node.inputs[1].const_value.numpy().tolist())
            else:
                continue
            folded = self._constant(f"{weight.name}_{node.name}", value)
            for use in tuple(node.outputs[0].uses()):
                use.node.replace_input_with(use.idx, folded)
            self._graph.remove(node, safe=True)

    def _constant(self, name: str, value: Array) -> ir.Value:
        tensor = ir.tensor(value, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(value.shape)
        constant = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        self._graph.register_initializer(constant)
        return constant

    def _small(self, name: str, rows: Array, bits: int, group: int) -> tuple[ir.Value, ir.Value]:
        key = (name, bits, group)
        if key not in self._stored:
            integers, scales = packed(rows, bits, group)
            made = self._constant(f"{name}_int{bits}", integers), self._constant(f"{name}_scale", scales)
            self._stored[key] = made
        return self._stored[key]

    def _n_bits(self, data: ir.Value, small: tuple[ir.Value, ir.Value], sizes: tuple[int, int, int, int]) -> ir.Node:
        width, count, bits, group = sizes
        attributes = {
            "K": width,
            "N": count,
            "bits": bits,
            "block_size": group,
            "accuracy_level": ACCURACY_LEVEL,
        }
        return ir.node("MatMulNBits", [data, *small], attributes, domain=_DOMAIN)

    def _product(self, node: ir.Node, weight: ir.Value, bits: int, group: int) -> None:
        rows = _array(weight) if node.op_type == "Gemm" else _array(weight).T
        small = self._small(str(weight.name), np.ascontiguousarray(rows), bits, group)
        data = node.inputs[0]
        assert data is not None
        self._replace(node, [self._n_bits(data, small, (rows.shape[1], rows.shape[0], bits, group))])

    def _by_head(self, node: ir.Node, weight: ir.Value, bits: int, group: int) -> None:
        """A batched product (H, T, K) @ (H, K, N): a product for each head, as MatMulNBits has no batches.

        Data that were transposed for it are taken as (T, H, K), and the result is transposed as a whole: ONNX Runtime
        would push a transpose through every part, where it is most of the cost of a single token.
        """
        heads, data = _array(weight), node.inputs[0]
        count, width, wide = heads.shape
        before = data.producer() if data is not None else None
        turned = (
            before is not None and before.op_type == "Transpose" and before.attributes.get_ints("perm", ()) == _TURN
        )
        source = before.inputs[0] if before is not None and turned else data
        axis = {"axis": int(turned)}
        split = ir.node("Split", [source], axis | {"num_outputs": count}, num_outputs=count)
        made = [split]
        for i, (rows, part) in enumerate(zip(heads, split.outputs, strict=True)):
            small = self._small(f"{weight.name}_{i}", np.ascontiguousarray(rows.T), bits, group)
            made.append(self._n_bits(part, small, (width, wide, bits, group)))
        made.append(ir.node("Concat", [m.outputs[0] for m in made[1:]], axis))
        if turned:
            made.append(ir.node("Transpose", [made[-1].outputs[0]], {"perm": _TURN}))
        self._replace(node, made)

    def _gather(self, node: ir.Node, weight: ir.Value, bits: int, group: int) -> None:
        """Rows of an embedding that is stored once, for the product with it as well."""
        rows = _array(weight)
        integers, scales = self._small(str(weight.name), rows, bits, group)
        shape = self._constant(f"{weight.name}_flat", np.array([rows.shape[0], -1], np.int64))
        flat = ir.node("Reshape", [integers, shape])
        attributes = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
        gather = ir.node("GatherBlockQuantized", [flat.outputs[0], node.inputs[1], scales], attributes, domain=_DOMAIN)
        self._replace(node, [flat, gather])

    def _replace(self, node: ir.Node, made: list[ir.Node]) -> None:
        """Put nodes in the place of one, the last of which gives what it gave."""
        notes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        for i, new in enumerate(made):
            new.name = node.name if new is made[-1] else f"{node.name}_part{i}"
            for k, value in enumerate(new.outputs):
                value.name = f"{node.name}_part{i}_{k}"
            if notes:
                new.metadata_props["pkg.torch.onnx.name_scopes"] = notes
        last, out = made[-1].outputs[0], node.outputs[0]
        last.type, last.shape = out.type, out.shape
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], made, [out], [last])


def _array(weight: ir.Value) -> Array:
    assert weight.const_value is not None
    return weight.const_value.numpy()


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant matrix, or one for each head, that a node multiplies with or looks rows up in."""
    if node.domain or node.op_type not in ("Gemm", "MatMul", "Gather"):
        return None
    place = 0 if node.op_type == "Gather" else 1
    weight, other = node.inputs[place], node.inputs[1 - place]
    if weight is None or weight.const_value is None or weight.dtype != ir.DataType.FLOAT or other is None:
        return None
    rank = len(weight.const_value.shape)
    if other.const_value is not None or rank not in (2, 3) or (rank == 3 and node.op_type != "MatMul"):
        return None
    if node.op_type == "Gather":
        # Tables of other things than weights are small, and are not what is learned.
        return weight if any(use.node.op_type == "Gemm" for use in weight.uses()) else None
    if node.op_type == "Gemm":
        wants = {"alpha": 1.0, "beta": 1.0}
        plain = all(node.attributes.get_float(k, v) == v for k, v in wants.items()) and len(node.inputs) == 2
        plain = plain and bool(node.attributes.get_int("transB", 0)) and not node.attributes.get_int("transA", 0)
        return weight if plain else None
    return weight


def blocks(model: ir.Model, plan: QuantPlan) -> list[dict[str, Any]]:
    """Store the weights of ``model``, in place, in blocks; what was done of each."""
    return Blocks(model, plan).apply()


def divide_norms(model: ir.Model) -> None:
    """x * (1 / sqrt(v)) as x / sqrt(v), in place: the form in which ONNX Runtime makes one operation of a norm."""
    for node in list(model.graph):
        root = node.inputs[0] if node.op_type == "Reciprocal" else None
        producer = root.producer() if root is not None else None
        if producer is None or producer.op_type != "Sqrt":
            continue
        uses = tuple(node.outputs[0].uses())
        if any(use.node.op_type != "Mul" or use.node.inputs[1 - use.idx] is node.outputs[0] for use in uses):
            continue
        for use in uses:
            product, other = use.node, use.node.inputs[1 - use.idx]
            quotient = ir.node("Div", [other, root], name=product.name)
            quotient.metadata_props.update(product.metadata_props)
            last, out = quotient.outputs[0], product.outputs[0]
            last.name, last.type, last.shape = out.name, out.type, out.shape
            ir.convenience.replace_nodes_and_values(model.graph, product, [product], [quotient], [out], [last])
        model.graph.remove(node, safe=True)
