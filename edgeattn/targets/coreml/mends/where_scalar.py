"""``torch.where(condition, x, number)`` becomes one of two tensors.

coremltools 9.0 has no converter for ``where`` with a number ("Unsupported fx node where, kind where.scalarother"),
which is how a mask is often filled. Can go when it registers where.ScalarOther, where.ScalarSelf and where.Scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, value

_ATEN = torch.ops.aten


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    scalars = (_ATEN.where.ScalarOther, _ATEN.where.ScalarSelf, _ATEN.where.Scalar)
    for node in calls(module, *scalars):
        write, dtype = Writer(node), node.meta["val"].dtype
        condition, *choices = node.args
        made: list[Any] = []
        for choice in choices:
            if not isinstance(choice, fx.Node):
                made.append(write(_ATEN.full_like.default, condition, choice, dtype=dtype))
            elif value(choice).dtype != dtype:
                made.append(write(_ATEN._to_copy.default, choice, dtype=dtype))
            else:
                made.append(choice)
        write.replace(write(_ATEN.where.self, condition, *made))
        count += 1
    return count
