"""A number below float16's lowest, with which a mask is filled, becomes -3e4.

Under a softmax both are nothing beside any score, unless a row is masked whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten
#: Where the number stands among the arguments.
_PLACES: dict[Any, tuple[int, ...]] = {
    _ATEN.masked_fill.Scalar: (2,),
    _ATEN.where.ScalarOther: (2,),
    _ATEN.where.ScalarSelf: (1,),
    _ATEN.where.Scalar: (1, 2),
    _ATEN.full.default: (1,),
    _ATEN.full_like.default: (1,),
    _ATEN.scalar_tensor.default: (0,),
}
_LOWEST, _LOW = -65504.0, -3e4


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in module.graph.nodes:
        for place in _PLACES.get(node.target, ()):
            number = node.args[place]
            if isinstance(number, int | float) and math.isfinite(number) and number < _LOWEST:
                node.update_arg(place, _LOW)
                count += 1
    return count
