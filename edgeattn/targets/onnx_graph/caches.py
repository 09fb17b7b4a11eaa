"""A decoder's cache in float16: half the memory, and what a graph in float16 reads without a cast of all its rows."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from edgeattn.core.specs import new_name

_HALF = ir.TensorType(ir.DataType.FLOAT16)


def _is_cast(node: ir.Node | None, to: ir.DataType) -> bool:
    return node is not None and node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(to)


def half_caches(model: ir.Model, rows: Collection[str]) -> None:
    """Let inputs of these names, and the outputs with their new rows, be float16; in place.

    Where the graph computes with them in float32 it casts them first, elsewhere it takes them as they are.
    """
    graph = model.graph
    for value in graph.inputs:
        if value.name not in rows:
            continue
        uses, wide = tuple(value.uses()), None
        value.type = _HALF
        for use in uses:
            if _is_cast(use.node, ir.DataType.FLOAT16):
                narrow = use.node.outputs[0]
                for other in tuple(narrow.uses()):
                    other.node.replace_input_with(other.idx, value)
                graph.remove(use.node, safe=True)
                continue
            if wide is None:
                cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}_wide")
                graph.insert_before(graph[0], cast)
                wide = cast.outputs[0]
                wide.name, wide.type, wide.shape = f"{value.name}_wide", ir.TensorType(ir.DataType.FLOAT), value.shape
            use.node.replace_input_with(use.idx, wide)
    wanted = {new_name(row) for row in rows}
    for i, value in enumerate(list(graph.outputs)):
        if value.name not in wanted:
            continue
        producer, name, shape = value.producer(), value.name, value.shape
        assert producer is not None
        if _is_cast(producer, ir.DataType.FLOAT) and producer.inputs[0] is not None:
            half = producer.inputs[0]
            if half.is_graph_input() or half.is_graph_output():
                continue
            graph.outputs[i] = half
            graph.remove(producer, safe=not value.uses())
        else:
            value.name = f"{name}_wide"
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}, name=f"{name}_half")
            graph.insert_after(producer, cast)
            half = cast.outputs[0]
            graph.outputs[i] = half
        half.name, half.type, half.shape = name, _HALF, shape
