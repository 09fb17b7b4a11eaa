"""The scale of scaled_dot_product_attention goes; where it is not the default, the query is multiplied before.

coremltools 9.0 makes one operation of the attention without a scale alone, three of any other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in list(module.graph.nodes):
        scale = node.kwargs.get("scale") if node.target is _ATEN.scaled_dot_product_attention.default else None
        if not isinstance(scale, int | float):
            continue
        query: Any = node.args[0]
        factor = scale * math.sqrt(query.meta["val"].shape[-1])
        if not math.isclose(factor, 1.0, rel_tol=1e-6):
            with module.graph.inserting_before(node):
                scaled = module.graph.call_function(_ATEN.mul.Tensor, (query, factor))
            scaled.meta = {**node.meta, "val": query.meta["val"] * factor}
            node.update_arg(0, scaled)
        node.kwargs = {key: held for key, held in node.kwargs.items() if key != "scale"}
        count += 1
    return count
