"""``a & b``, ``a | b`` and ``a ^ b`` on truth values become logical operations.

coremltools 9.0 takes ``__and__`` for an operation in place, since its name ends in an underscore, and stops with "all
ops should be functional". Can go when it registers ``__and__``, ``__or__`` and ``__xor__``.
"""

from __future__ import annotations

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import calls, value

_ATEN = torch.ops.aten
_LOGICAL = {
    _ATEN.__and__.Tensor: _ATEN.logical_and.default,
    _ATEN.__or__.Tensor: _ATEN.logical_or.default,
    _ATEN.__xor__.Tensor: _ATEN.logical_xor.default,
}


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in calls(module, *_LOGICAL):
        if all(value(item).dtype == torch.bool for item in node.all_input_nodes):
            node.target = _LOGICAL[node.target]  # type: ignore[index]
            count += 1
    return count
