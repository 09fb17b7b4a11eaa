"""A projection that is viewed as (B, T, 3, H, D), permuted and taken apart is taken apart first.

coremltools 9.0 converts it as written: a reshape, a transpose and a split of rank 5 and three squeezes, which Core ML
allows, but which keep the layer off the Neural Engine's fast paths (tensors there have four dimensions). Slicing the
projection before the view gives the same tensors with four. Can go when coremltools does so in a pass of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import Writer, calls, value

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)


@dataclass(frozen=True)
class Packed:
    """A projection that is viewed, permuted and taken apart.

    Attributes:
        readers: nodes that each take one part, with its number. unbinds: those between them and the permutation.
    """

    source: fx.Node
    view: fx.Node
    permuted: fx.Node
    readers: list[tuple[fx.Node, int]]
    unbinds: list[fx.Node]

    @property
    def nodes(self) -> list[fx.Node]:
        """All that the mend does without."""
        return [self.view, self.permuted, *self.unbinds, *(reader for reader, _ in self.readers)]


def _parts(permuted: fx.Node) -> tuple[list[tuple[fx.Node, int]], list[fx.Node]] | None:
    """Readers that each take one part along the first dimension, and the unbinds; None if there are others."""
    parts: list[tuple[fx.Node, int]] = []
    unbinds = []
    for user in permuted.users:
        if user.target is _ATEN.select.int and user.args[1] == 0:
            parts.append((user, int(user.args[2])))  # type: ignore[arg-type]
        elif user.target is _ATEN.unbind.int and (*user.args, 0)[1] == 0:
            if any(reader.target is not operator.getitem for reader in user.users):
                return None
            unbinds.append(user)
            parts += [(reader, int(reader.args[1])) for reader in user.users]  # type: ignore[arg-type]
        else:
            return None
    return parts, unbinds


def packed(module: fx.GraphModule) -> Iterator[Packed]:
    """Every place that the mend can change."""
    for permuted in calls(module, _ATEN.permute.default):
        view: Any = permuted.args[0]
        if view.op != "call_function" or view.target not in _VIEWS or len(view.users) != 1:
            continue
        source, shape = view.args[0], tuple(value(view).shape)
        order: Any = permuted.args[1]
        axis = order[0] % len(shape)
        whole = tuple(value(source).shape)
        inside = whole[:-1] == shape[:axis] and whole[-1] == math.prod(shape[axis:])
        found = _parts(permuted) if len(shape) > 4 and inside else None
        if found and found[0]:
            yield Packed(source, view, permuted, *found)


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    count = 0
    for place in packed(module):
        shape, last = tuple(value(place.view).shape), value(place.source).dim() - 1
        order: Any = [axis % len(shape) for axis in place.permuted.args[1]]  # type: ignore[union-attr, operator]
        axis = order[0]
        size = math.prod(shape[axis + 1 :])
        rest = [a - (a > axis) for a in order[1:]]
        for reader, number in place.readers:
            write = Writer(reader)
            start = number % shape[axis] * size
            piece = write(_ATEN.slice.Tensor, place.source, last, start, start + size)
            viewed = write(_ATEN.view.default, piece, [*shape[:axis], *shape[axis + 1 :]])
            write.replace(write(_ATEN.permute.default, viewed, rest))
        count += 1
    return count
