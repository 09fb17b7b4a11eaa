"""Grouped-query attention: keys and values are repeated until there are as many heads as the query has.

coremltools 9.0 passes ``enable_gqa`` over and stops at shapes that differ ("query, key, value must have a same batch
dimension" on iOS18). Repeating along the time axis and viewing the result with more heads is repeating each head, and
needs no fifth dimension. Can go when coremltools converts scaled_dot_product_attention(enable_gqa=True).
"""

from __future__ import annotations

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, value

_ATEN = torch.ops.aten


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in calls(module, _ATEN.scaled_dot_product_attention.default):
        if not node.kwargs.get("enable_gqa"):
            continue
        write, (query, *pair) = Writer(node), node.args[:3]
        heads = value(query).shape[-3]
        repeated = []
        for item in pair:
            *batch, own, steps, width = value(item).shape
            times = [1] * len(batch) + [1, heads // own, 1]
            tiled = write(_ATEN.repeat.default, item, times) if heads != own else item
            repeated.append(write(_ATEN.view.default, tiled, [*batch, heads, steps, width]) if heads != own else item)
        node.args = (query, *repeated, *node.args[3:])
        node.kwargs = {key: held for key, held in node.kwargs.items() if key != "enable_gqa"}
        count += 1
    return count
