"""Adding nodes to a captured graph, for the passes that run before the conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The static shape of a node's value; None for another value or a dynamic shape."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not all(isinstance(n, int) for n in value.shape):
        return None
    return tuple(value.shape)


class Builder:
    """Adds nodes before a given one, with their values and its place in the model, or that of another one."""

    def __init__(self, module: fx.GraphModule, before: fx.Node, place: fx.Node | None = None) -> None:
        self.module, self.before = module, before
        self._place = {k: v for k, v in (place or before).meta.items() if k != "val"}

    def __call__(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """``function(*args)``."""
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.call_function(function, args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        node.meta.update(self._place, val=function(*values))
        return node

    def constant(self, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """A buffer with ``value``; ``like`` is any node of the graph with a value."""
        name = f"constant_{len(self.module.graph.nodes)}"
        self.module.register_buffer(name, value)
        with self.module.graph.inserting_before(self.before):
            node = self.module.graph.get_attr(name)
        mode = getattr(like.meta["val"], "fake_mode", None)
        node.meta.update(self._place)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode else value
        return node
