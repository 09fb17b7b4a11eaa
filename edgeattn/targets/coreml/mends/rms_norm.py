"""RMSNorm is written out: coremltools 9.0 gets its epsilon wrong.

Its converter computes ``x / (sqrt(mean((x / m)^2) + eps) * m)`` with m = max|x|, so that eps counts m^2 times: with
eps = 1e-6 an input of 1e-3 is off by 0.7, and a row of zeros gives NaN. The division by m is there because the square
of a float16 overflows past 255. Here float32 gets the plain form, and float16 one that is scaled by s = max(m, 1):
``y * rsqrt(mean(y^2) + eps / s^2)`` with y = x / s, which is the same number, and in which nothing overflows.
Can go when nn.RMSNorm of a row of zeros converts to zeros.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, largest_of, value

_ATEN = torch.ops.aten


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in calls(module, _ATEN.rms_norm.default):
        x, shape, weight, eps = cast(Any, (*node.args, None, None)[:4])
        write, axes = Writer(node), list(range(-len(shape), 0))
        eps = torch.finfo(value(x).dtype).eps if eps is None else eps
        y, added = x, eps
        if precision != "fp32":
            inverse = write(_ATEN.reciprocal.default, largest_of(write, x, axes))
            y = write(_ATEN.mul.Tensor, x, inverse)
            added = write(_ATEN.mul.Tensor, write(_ATEN.mul.Tensor, inverse, inverse), eps)
        mean = write(_ATEN.mean.dim, write(_ATEN.mul.Tensor, y, y), axes, True)
        normed = write(_ATEN.mul.Tensor, y, write(_ATEN.rsqrt.default, write(_ATEN.add.Tensor, mean, added)))
        write.replace(normed if weight is None else write(_ATEN.mul.Tensor, normed, weight))
        count += 1
    return count
