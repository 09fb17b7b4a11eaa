"""An average pooling with ``ceil_mode`` is divided by what its windows cover of the input, as PyTorch does.

coremltools 9.0 converts it to Core ML's ceil_mode, which divides the last windows by the overhang too (coremltools
issue 2772): the last row and column are wrong. Here the input is padded with zeros up to the last window, and what was
added is taken out of the mean by a pooling of ones. Without an overhang ``ceil_mode`` says nothing and goes.
Can go when the converter counts as PyTorch does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, value

_ATEN = torch.ops.aten


def _overhang(size: int, kernel: int, stride: int, pad: int, outputs: int) -> int:
    """By how much the last window leaves the padded input."""
    return max(0, (outputs - 1) * stride + kernel - (size + 2 * pad))


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for node in calls(module, _ATEN.avg_pool2d.default):
        given: Any = (*node.args, *(None,) * 7)[:7]
        x, kernel, strides, pads, ceil, include, divisor = given
        if not ceil or divisor is not None:
            continue
        kernel, pads = [list(v or [0, 0]) * (2 // len(v or [0, 0])) for v in (kernel, pads)]
        strides = list(strides or kernel) * (2 // len(strides or kernel))
        include = include is None or include
        sizes, outputs = value(x).shape[-2:], node.meta["val"].shape[-2:]
        over = [_overhang(*numbers) for numbers in zip(sizes, kernel, strides, pads, outputs, strict=True)]
        write = Writer(node)
        if not any(over):
            write.replace(write(_ATEN.avg_pool2d.default, x, kernel, strides, pads, False, include))
            count += 1
            continue
        edges = [pads[1], pads[1] + over[1], pads[0], pads[0] + over[0]]
        padding = [pads[1], pads[1], pads[0], pads[0]] if include else [0, 0, 0, 0]
        ones = write(
            _ATEN.full.default, [1, 1, *(n + sum(padding[2 - 2 * i : 4 - 2 * i]) for i, n in enumerate(sizes))], 1.0
        )
        rest = [edge - own for edge, own in zip(edges, padding, strict=True)]
        pools = [
            write(_ATEN.avg_pool2d.default, write(_ATEN.constant_pad_nd.default, item, around, 0.0), kernel, strides)
            for item, around in ((x, edges), (ones, rest))
        ]
        write.replace(write(_ATEN.div.Tensor, *pools))
        count += 1
    return count
