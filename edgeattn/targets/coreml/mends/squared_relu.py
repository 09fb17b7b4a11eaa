"""A squared ReLU before a matrix product is squared after a division by its largest, in float16.

The square of anything beyond 255 is infinite there. ``W relu(x)^2`` is ``m (m (W (relu(x) / m)^2))`` for the largest m
of each row, in which nothing overflows that the result does not. Can go when coremltools keeps in float32 what the
model does, or never: the model's own float16 overflows as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, square_of

_ATEN = torch.ops.aten


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in calls(module, _ATEN.linear.default) if precision != "fp32" else ():
        squared: Any = node.args[0]
        x = square_of(squared)
        if x is None or x.target is not _ATEN.relu.default or len(node.args) != 2:
            continue
        write, inside = Writer(node), Writer(squared)
        largest = inside(_ATEN.clamp.default, inside(_ATEN.amax.default, x, [-1], True), 1.0)
        y = inside(_ATEN.mul.Tensor, x, inside(_ATEN.reciprocal.default, largest))
        product = write(_ATEN.linear.default, inside(_ATEN.mul.Tensor, y, y), node.args[1])
        write.replace(write(_ATEN.mul.Tensor, write(_ATEN.mul.Tensor, product, largest), largest))
        count += 1
    return count
