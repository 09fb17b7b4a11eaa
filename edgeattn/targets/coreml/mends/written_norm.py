"""An RMSNorm that the model writes out is computed from its input divided by the largest, in float16.

coremltools 9.0 computes all of an fp16 program in float16, also what the model computes in float32: the square of
anything beyond 255 is infinite there, and what is divided by its root zero. Here ``x * rsqrt(mean(x^2) + eps)`` becomes
the form that ``rms_norm`` writes: the same number, in which nothing overflows. Can go when coremltools keeps in float32
what the model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, largest_of, square_of

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Written:
    """A norm that is written out.

    Attributes:
        x: what is normed. mean: of its squares. root: 1 / sqrt(mean + eps). readers: x * root.
    """

    x: fx.Node
    mean: fx.Node
    root: fx.Node
    readers: tuple[fx.Node, ...]
    axes: list[int]
    eps: float


def written(module: fx.GraphModule) -> Iterator[Written]:
    """Every place that the mend can change."""
    for root in calls(module, _ATEN.rsqrt.default):
        added: Any = root.args[0]
        if added.target is not _ATEN.add.Tensor or not isinstance(added.args[1], float):
            continue
        mean = added.args[0]
        if mean.target is not _ATEN.mean.dim or (*mean.args, False)[2] is not True:
            continue
        x = square_of(mean.args[0])
        readers = tuple(root.users)
        if x is not None and all(r.target is _ATEN.mul.Tensor and set(r.args) == {x, root} for r in readers):
            yield Written(x, mean, root, readers, list(mean.args[1]), added.args[1])


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    places = list(written(module)) if precision != "fp32" else []
    for place in places:
        write = Writer(place.root)
        inverse = write(_ATEN.reciprocal.default, largest_of(write, place.x, place.axes))
        y = write(_ATEN.mul.Tensor, place.x, inverse)
        added = write(_ATEN.mul.Tensor, write(_ATEN.mul.Tensor, inverse, inverse), place.eps)
        mean = write(_ATEN.mean.dim, write(_ATEN.mul.Tensor, y, y), place.axes, True)
        root = write(_ATEN.rsqrt.default, write(_ATEN.add.Tensor, mean, added))
        for reader in place.readers:
            write = Writer(reader)
            write.replace(write(_ATEN.mul.Tensor, y, root))
    return len(places)
