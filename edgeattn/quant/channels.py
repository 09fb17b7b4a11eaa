"""Where the output channels of a layer go in a captured program, as long as a positive factor of theirs goes with them.

Each number of a tensor on the way has a label: the channel that it comes from. What only moves numbers is run on the
labels themselves; what mixes them, such as a pool, must mix none of different channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.quant.flow import packet
from edgeattn.quant.weighted import Layer, arguments

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """A layer that multiplies these channels with its weight.

    Attributes:
        channels: of which channel each input is, (groups, inputs of a group).
        power: a factor f of a channel arrives as f ** power.
    """

    layer: Layer
    channels: Tensor
    power: int


@dataclass(frozen=True)
class Reach:
    """All that reads what a layer gives.

    Attributes:
        readers: the layers. fixed: (channels,), True where something reads the channel that allows it no factor.
    """

    readers: tuple[Reader, ...]
    fixed: Tensor


@dataclass(frozen=True)
class _Labels:
    """Of what a node gives.

    Attributes:
        of: a tensor, or several of an operation that gives several. power: as ``Reader.power``.
        source: the input that they come from. What any other one holds of the channels must stay as it is.
    """

    of: Any
    power: int
    source: fx.Node


_Known = Mapping[fx.Node, _Labels]
_Rule = Callable[[fx.Node, _Known], "_Labels | None"]


def _int(size: Any) -> int:
    """A number of a shape: that of the example where it may vary."""
    return size if isinstance(size, int) else int(size.node.hint)


def _shape(node: fx.Node) -> list[int]:
    return [_int(size) for size in node.meta["val"].shape]


def _alike(labels: Tensor, axes: list[int]) -> Tensor | None:
    """The labels with these axes of length 1; None where they differ along one."""
    for axis in axes:
        first = labels.narrow(axis, 0, 1)
        if not bool((labels == first).all()):
            return None
        labels = first
    return labels


def _first(node: fx.Node, known: _Known) -> fx.Node:
    """The first input that has labels."""
    return next(n for n in node.all_input_nodes if n in known)


def _same(node: fx.Node, known: _Known) -> _Labels | None:
    """One number for each, f(s x) = s f(x) for s > 0."""
    source = _first(node, known)
    return _Labels(known[source].of, known[source].power, source)


def _dropout(node: fx.Node, known: _Known) -> _Labels | None:
    return None if arguments(node)["train"] else _same(node, known)


def _moved(node: fx.Node, known: _Known) -> _Labels | None:
    """Nothing but places change: the operation itself, on the labels."""

    def value(argument: fx.Node) -> Any:
        return known[argument].of if argument in known else _int(argument.meta["val"])

    source = _first(node, known)
    function: Any = node.target
    made = function(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    return _Labels(made, known[source].power, source)


def _product(node: fx.Node, known: _Known) -> _Labels | None:
    """x y, linear in either; or x x."""
    source = _first(node, known)
    power = known[source].power * (2 if node.args[0] is node.args[1] else 1)
    return _Labels(known[source].of.expand(_shape(node)), power, source)


def _quotient(node: fx.Node, known: _Known) -> _Labels | None:
    rounds = arguments(node).get("rounding_mode") is not None
    return None if rounds or node.args[1] in known else _product(node, known)


def _square(node: fx.Node, known: _Known) -> _Labels | None:
    source = _first(node, known)
    squares = arguments(node).get("exponent", 2) == 2
    return _Labels(known[source].of, 2 * known[source].power, source) if squares else None


def _mixed(node: fx.Node, known: _Known, source: fx.Node, axes: list[int]) -> _Labels | None:
    """Sums, averages or largest numbers along axes, which the result has too, whatever their length there."""
    alike = _alike(known[source].of, axes)
    return None if alike is None else _Labels(alike.expand(_shape(node)), known[source].power, source)


def _pool(spatial: int) -> _Rule:
    return lambda node, known: _mixed(node, known, _first(node, known), list(range(-spatial, 0)))


def _reduced(node: fx.Node, known: _Known) -> _Labels | None:
    given, source = arguments(node), _first(node, known)
    axes = list(given["dim"] or range(known[source].of.ndim))
    alike = _alike(known[source].of, axes)
    return None if alike is None else _Labels(alike.amax(axes, given["keepdim"]), known[source].power, source)


def _matmul(node: fx.Node, known: _Known) -> _Labels | None:
    """A product of two tensors of data: the numbers that it sums must be of one channel."""
    source = _first(node, known)
    if node.args[0] is node.args[1] or known[source].of.ndim < 2:
        return None
    return _mixed(node, known, source, [-1 if source is node.args[0] else -2])


def _attention(node: fx.Node, known: _Known) -> _Labels | None:
    """Weights @ values, where the values are of these channels."""
    given = arguments(node)
    values, others = given["value"], (given["query"], given["key"], given["attn_mask"])
    if given["enable_gqa"] or values not in known or values in others:
        return None
    return _mixed(node, known, values, [-2])


_SAME = ["relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "neg", "clone", "contiguous", "detach", "alias"]
_MOVED = ["view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "squeeze"]
_MOVED += ["unsqueeze", "expand", "select", "slice", "unbind", "split", "split_with_sizes", "chunk", "flip"]
_BY_NAME: dict[str, _Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_MOVED, _moved),
    **{f"{name}{k}d": _pool(k) for name in ("max_pool", "avg_pool", "adaptive_avg_pool") for k in (1, 2, 3)},
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), _pool(2)),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduced),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    "dropout": _dropout,
    "mul": _product,
    "div": _quotient,
    "pow": _square,
    "square": _square,
    "scaled_dot_product_attention": _attention,
}
_RULES = {operator.getitem: _moved} | {getattr(_ATEN, name): rule for name, rule in _BY_NAME.items()}


def _label(node: fx.Node, known: _Known) -> _Labels | None:
    """The labels of what a node gives; None where it allows no factor."""
    rule = _RULES.get(packet(node)) if node.op == "call_function" else None
    try:
        return None if rule is None else rule(node, known)
    except (RuntimeError, TypeError, KeyError, AttributeError):
        return None  # a form of the operation that the rule does not know


def _read(layer: Layer, labels: _Labels) -> Reader | None:
    """A layer as reader; None where the numbers of an input are not of one channel throughout."""
    axis = labels.of.ndim - 1 - layer.spatial
    alike = _alike(labels.of, [i for i in range(labels.of.ndim) if i != axis])
    return None if alike is None else Reader(layer, alike.reshape(layer.groups, -1), labels.power)


def reach(source: Layer, layers: Mapping[fx.Node, Layer]) -> Reach:
    """Follow the output channels of a layer to all that reads them.

    Args:
        layers: of the same graph, by node.
    """
    shape = _shape(source.node)
    axis = len(shape) - 1 - source.spatial
    first = torch.arange(shape[axis], dtype=torch.int32).view(-1, *[1] * source.spatial).expand(shape)
    known = {source.node: _Labels(first, 1, source.node)}
    readers: list[Reader] = []
    fixed = torch.zeros(shape[axis], dtype=torch.bool)
    for node in source.node.graph.nodes:
        reached = [n for n in node.all_input_nodes if n in known]
        if not reached:
            continue
        layer = layers.get(node)
        reader = _read(layer, known[layer.data]) if layer is not None and reached == [layer.data] else None
        if reader is not None:
            readers.append(reader)
            continue
        labels = _label(node, known) if layer is None else None
        if labels is not None:
            known[node] = labels
        for n in reached:
            if labels is None or n is not labels.source:
                of = known[n].of
                for part in of if isinstance(of, list | tuple) else (of,):
                    fixed[part.unique().long()] = True
    return Reach(tuple(readers), fixed)
