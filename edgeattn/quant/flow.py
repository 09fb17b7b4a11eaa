"""Which modules read what a module gives: data flow between the weighted operations of a captured program."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgeattn.capture import Program
from edgeattn.quant.plan import QuantPlan

_ATEN = torch.ops.aten
#: Weighted operations, and which argument is their data and which their weight.
WEIGHTED = {
    **dict.fromkeys((_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.convolution, _ATEN.linear), (0, 1)),
    **dict.fromkeys((_ATEN.conv_transpose1d, _ATEN.conv_transpose2d, _ATEN.conv_transpose3d), (0, 1)),
    **dict.fromkeys((_ATEN.mm, _ATEN.bmm, _ATEN.matmul), (0, 1)),
    _ATEN.addmm: (1, 2),
}
#: What these give has a range of its own, whatever goes in.
_OWN_RANGE = (
    _ATEN.softmax,
    _ATEN._softmax,
    _ATEN.sigmoid,
    _ATEN.tanh,
    _ATEN.layer_norm,
    _ATEN.native_layer_norm,
    _ATEN.group_norm,
    _ATEN.rms_norm,
    _ATEN.instance_norm,
)


def module_of(node: fx.Node) -> str:
    """Path of the torch module that a node came from; "" outside of any child."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def packet(node: fx.Node) -> Any:
    """The operation of a node, whichever overload."""
    return getattr(node.target, "overloadpacket", node.target)


def is_weighted(node: fx.Node) -> bool:
    """Whether a node multiplies data with weights: a parameter or a buffer, as it is or turned."""
    places = WEIGHTED.get(packet(node))
    if node.op != "call_function" or places is None:
        return False
    value = node.args[places[1]]
    while isinstance(value, fx.Node) and value.op == "call_function" and value.args:
        value = value.args[0]
    return (
        isinstance(value, fx.Node) and value.op in ("placeholder", "get_attr") and value.name.startswith(("p_", "b_"))
    )


def read_from_kept(program: Program, plan: QuantPlan) -> frozenset[str]:
    """Modules whose data come out of one that the plan keeps in floats, through anything but weights and norms.

    What a module in floats gives is not rounded for them, either: it may be kept for its range.
    """
    found: set[str] = set()
    for entry in program.entries.values():
        for node in entry.graph.graph.nodes:
            if is_weighted(node) and not plan.scheme(module_of(node)).floats and _from_kept(node, plan):
                found.add(module_of(node))
    return frozenset(found)


def _from_kept(node: fx.Node, plan: QuantPlan) -> bool:
    data = node.args[WEIGHTED[packet(node)][0]]
    waiting, seen = [data], set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, fx.Node) or value in seen or value.op != "call_function":
            continue
        seen.add(value)
        if is_weighted(value):
            if plan.scheme(module_of(value)).floats:
                return True
        elif packet(value) not in _OWN_RANGE:
            waiting += value.all_input_nodes
    return False
