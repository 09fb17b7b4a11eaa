"""A projection that is viewed as (B, T, 3, H, D), permuted and taken apart is taken apart first.

coremltools 9.0 converts it as written: a reshape, a transpose and a split of rank 5 and three squeezes, which Core ML
allows, but which keep the layer off the Neural Engine's fast paths (tensors there have four dimensions). Slicing the
projection before the view gives the same tensors with four. Can go when coremltools does so in a pass of its own.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, value

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)


def _parts(permuted: fx.Node) -> list[tuple[fx.Node, int]] | None:
    """Readers that each take one part along the first dimension, with its number; None if there are others."""
    parts: list[tuple[fx.Node, int]] = []
    for user in permuted.users:
        if user.target is _ATEN.select.int and user.args[1] == 0:
            parts.append((user, int(user.args[2])))  # type: ignore[arg-type]
        elif user.target is _ATEN.unbind.int and (*user.args, 0)[1] == 0:
            if any(reader.target is not operator.getitem for reader in user.users):
                return None
            parts += [(reader, int(reader.args[1])) for reader in user.users]  # type: ignore[arg-type]
        else:
            return None
    return parts


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for permuted in calls(module, _ATEN.permute.default):
        view: Any = permuted.args[0]
        order: Any = permuted.args[1]
        if view.op != "call_function" or view.target not in _VIEWS or len(view.users) != 1:
            continue
        source, shape = view.args[0], tuple(value(view).shape)
        order = [axis % len(shape) for axis in order]
        axis = order[0]
        whole = tuple(value(source).shape)
        inside = whole[:-1] == shape[:axis] and whole[-1] == math.prod(shape[axis:])
        parts = _parts(permuted) if len(shape) > 4 and inside else None
        if not parts:
            continue
        size = math.prod(shape[axis + 1 :])
        rest = [a - (a > axis) for a in order[1:]]
        for reader, number in parts:
            write = Writer(reader)
            start = number % shape[axis] * size
            piece = write(_ATEN.slice.Tensor, source, len(whole) - 1, start, start + size)
            viewed = write(_ATEN.view.default, piece, [*shape[:axis], *shape[axis + 1 :]])
            write.replace(write(_ATEN.permute.default, viewed, rest))
        count += 1
    return count
