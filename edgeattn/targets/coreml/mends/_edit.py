"""How a mend writes nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten


def calls(module: fx.GraphModule, *targets: Any) -> Iterator[fx.Node]:
    """Nodes that call one of these operations; the graph may be changed on the way."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def value(item: Any) -> Any:
    """The fake tensor of a node, or the argument itself."""
    return item.meta["val"] if isinstance(item, fx.Node) else item


class Writer:
    """Writes nodes before ``place``, which they stand for: they carry its module."""

    def __init__(self, place: fx.Node) -> None:
        self._place = place

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of ``target``; its shape and dtype follow from the arguments'."""
        with self._place.graph.inserting_before(self._place):
            node = self._place.graph.call_function(target, args, kwargs)
        node.meta = {key: held for key, held in self._place.meta.items() if key != "val"}
        node.meta["val"] = target(*[value(arg) for arg in args], **kwargs)
        return node

    def replace(self, new: fx.Node) -> None:
        """Let every reader of ``place`` read ``new``; ``place`` goes."""
        self._place.replace_all_uses_with(new)
        self._place.graph.erase_node(self._place)


def square_of(node: Any) -> fx.Node | None:
    """What a node is the square of, however that is written; None if it is no square."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    first, second = (*node.args, None, None)[:2]
    if isinstance(second, fx.Node):
        written = node.target is _ATEN.mul.Tensor and first is second
    else:
        by_power = node.target is _ATEN.pow.Tensor_Scalar and isinstance(second, int | float) and second == 2
        written = node.target is _ATEN.square.default or by_power
    return first if written and isinstance(first, fx.Node) else None


def largest_of(write: Writer, x: fx.Node, axes: list[int]) -> fx.Node:
    """The largest of |x| along ``axes``, but 1 at least: what is divided by it has squares that float16 holds."""
    return write(_ATEN.clamp.default, write(_ATEN.amax.default, write(_ATEN.abs.default, x), axes, True), 1.0)
