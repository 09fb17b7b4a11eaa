"""A maximum pooling without a stride is given its kernel as the stride, which is what PyTorch means by it.

coremltools 9.0 wants the stride said: "got 2 input(s), expected minimum 3". ``F.max_pool2d(x, 2)`` leaves it away,
``nn.MaxPool2d(2)`` does not. Can go when the converter knows the default.
"""

from __future__ import annotations

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import calls

_ATEN = torch.ops.aten
_POOLS = (_ATEN.max_pool1d.default, _ATEN.max_pool2d.default, _ATEN.max_pool3d.default)


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in calls(module, *_POOLS):
        if len(node.args) == 2 or not node.args[2]:
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
            count += 1
    return count
