"""What rules ask of a captured graph: operations, shapes, what comes before and after, what is constant."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from edgeattn.capture import Entry

#: Of one value, or of several, element by element: what stands between the products of an attention.
POINTWISE = frozenset(
    (
        *("mul", "div", "add", "sub", "where", "masked_fill", "clamp", "maximum", "tanh", "abs", "reciprocal"),
        *("dropout", "clone", "type_as", "_to_copy"),
    )
)


def path_of(node: fx.Node) -> str:
    """Path of the torch module that a node came from; "" outside of any child."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def op_of(node: fx.Node) -> str:
    """The operation that a node calls, as aten calls it, without the mark of one that works in place.

    Of torch.cond and its like the name; "" of what is no operation.
    """
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return str(node.target.__name__)
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target._schema.name).removeprefix("aten::").removesuffix("_")


def is_view(node: fx.Node) -> bool:
    """Whether a node gives the numbers of its input, arranged anew."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def tensors_of(node: fx.Node) -> list[Tensor]:
    """The tensors that a node gives, as fake ones."""
    return [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def rank_of(node: fx.Node) -> int:
    """Dimensions of the largest tensor that a node gives."""
    return max((value.dim() for value in tensors_of(node)), default=0)


def shape_text(node: fx.Node) -> str:
    """Shape of the first tensor; a dimension that is not fixed is a ``?``."""
    value = tensors_of(node)[0]
    return f"({', '.join(str(size) if isinstance(size, int) else '?' for size in value.shape)})"


def text_of(node: fx.Node) -> str:
    """Operation and shape, for a finding's detail."""
    name = op_of(node) or f"input {node.name}"
    return f"{name} {shape_text(node)}" if tensors_of(node) else name


def is_integral(node: fx.Node) -> bool:
    """Whether a node gives whole numbers; truth values are none."""
    dtypes = [value.dtype for value in tensors_of(node)]
    return any(not (d.is_floating_point or d.is_complex or d == torch.bool) for d in dtypes)


def before(node: fx.Node) -> Iterable[fx.Node]:
    """What a node reads."""
    return node.all_input_nodes


def after(node: fx.Node) -> Iterable[fx.Node]:
    """What reads a node."""
    return node.users


def find(
    start: Iterable[fx.Node],
    step: Callable[[fx.Node], Iterable[fx.Node]],
    wanted: Callable[[fx.Node], bool],
    pointwise: Collection[str] = POINTWISE,
) -> fx.Node | None:
    """The first wanted node from ``start`` on, by way of views and of operations that work element by element.

    Args:
        step: ``before`` or ``after``. pointwise: the names of those operations.
    """
    waiting, seen = list(start), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if wanted(node):
            return node
        if is_view(node) or op_of(node) in pointwise or node.target is operator.getitem:
            waiting += step(node)
    return None


def origin_of(item: Any) -> Any:
    """What an argument is a view of."""
    while isinstance(item, fx.Node) and is_view(item):
        item = item.args[0]
    return item


def states_of(entry: Entry) -> dict[fx.Node, str]:
    """Placeholders of the buffers that an entry writes into, and the buffers' paths."""
    buffers, written = entry.graph.graph_signature.inputs_to_buffers, {}
    for node in entry.graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for given, declared in zip(node.args, node.target._schema.arguments, strict=False):
            place = origin_of(given) if declared.alias_info and declared.alias_info.is_write else None
            if isinstance(place, fx.Node) and place.name in buffers:
                written[place] = buffers[place.name]
    return written


@dataclass(frozen=True)
class Part:
    """A graph that rules look at: an entry's own, or a branch inside of it.

    Attributes:
        place: path of the module that a branch belongs to; "" of the entry itself.
        live: nodes that depend on an input or a state; the others are computed once, by the converter.
    """

    module: fx.GraphModule
    place: str
    live: frozenset[fx.Node]

    def nodes(self) -> Iterator[fx.Node]:
        """Calls of operations, and live placeholders."""
        for node in self.module.graph.nodes:
            called = node.op == "call_function" and node.target is not operator.getitem
            if called or (node.op == "placeholder" and node in self.live):
                yield node


def live_nodes(module: fx.GraphModule, fixed: Collection[str] = ()) -> frozenset[fx.Node]:
    """See ``Part.live``.

    Args:
        fixed: names of the placeholders that are no inputs.
    """
    live: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            depends = node.name not in fixed
        else:
            depends = any(source in live for source in node.all_input_nodes)
        if depends:
            live.add(node)
    return frozenset(live)


def _branches(graph: fx.GraphModule, place: str = "") -> Iterator[tuple[fx.GraphModule, str]]:
    """The graphs inside a graph, with the module that each belongs to."""
    for node in graph.graph.nodes:
        inner = getattr(graph, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            module = next((path_of(user) for user in node.users), place)
            yield inner, module
            yield from _branches(inner, module)


def nodes_of(graph: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """Every node of a graph and of the branches inside of it, with the module that it came from."""
    for inner, place in [(graph, ""), *_branches(graph)]:
        for node in inner.graph.nodes:
            yield path_of(node) or place, node


def parts_of(entry: Entry) -> list[Part]:
    """An entry's graph, and the branches inside of it, all of whose placeholders are live."""
    graph = entry.graph.graph_module
    varying = {*map(str, entry.graph.graph_signature.user_inputs), *(node.name for node in states_of(entry))}
    fixed = {n.name for n in graph.graph.nodes if n.op == "placeholder"} - varying
    found = [Part(graph, "", live_nodes(graph, fixed))]
    return found + [Part(branch, place, live_nodes(branch)) for branch, place in _branches(graph)]
