"""Rows picked out of a table by number, as the lookup that LiteRT has for embeddings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from edgeattn.targets.tflite import flatbuffer
from edgeattn.targets.tflite.edit import Builder, shape_of

aten = torch.ops.aten


def lookups(module: fx.GraphModule) -> int:
    """Rewrite every ``index_select`` of a matrix's rows as an embedding, in place.

    Given: index_select(x (R, W), 0, numbers (T,)), as positions are looked up in tables. The converter makes ten
    operations of it, which count negative numbers from the end and give NaN for those beyond: a rotary angle of a
    padded token, which every token then sees. Result: EMBEDDING_LOOKUP, one operation, which refuses such numbers.

    Returns:
        The number that was rewritten.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.index_select.default:
            continue
        table, axis, numbers = node.args
        shape = shape_of(table)
        if shape is None or len(shape) != 2 or axis not in (0, -2):
            continue
        node.replace_all_uses_with(Builder(module, node)(aten.embedding.default, table, numbers))
        module.graph.erase_node(node)
        count += 1
    if count:
        module.graph.lint()
        module.recompile()
    return count


def computed_tables(buffers: Iterable[torch.Tensor]) -> frozenset[bytes]:
    """Digests of the matrices of floats among a model's buffers: they are no weights, and keep all their digits."""
    found = (b.detach().contiguous() for b in buffers if b.ndim == 2 and b.is_floating_point())
    return frozenset(flatbuffer.digest(b.float().numpy().tobytes()) for b in found)
