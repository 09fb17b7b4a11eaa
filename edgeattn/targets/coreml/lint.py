"""Core ML's lint: patterns of ``lint.toml`` in a captured program, told by operations, shapes and dtypes."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from edgeattn.lint import Finding, RuleBook, Severity
from edgeattn.targets.coreml.mends.qkv_rank5 import packed
from edgeattn.targets.coreml.mends.written_norm import written
from edgeattn.targets.coreml.modules import path_of

if TYPE_CHECKING:
    from edgeattn.capture import Entry, Program
    from edgeattn.device import Device

#: Rule, what was found, and the severity where it is not the rule's own.
_Hit = tuple[str, str, Severity | None]

#: Height and width that the Neural Engine takes, and the A and M chips from which on it takes more.
_WIDEST, _WIDER, _WIDER_FROM = 16384, 65536, {"A": 17, "M": 4}
#: The lowest number of float16. The converter keeps in float32 what is below, also what would round to it.
_LOWEST = -65504.0
#: Its square is the largest that float16 holds.
_SQUARES_TO = 255.0
#: What states are a multiple of, in their last two dimensions.
_STATE_STEP = 32
#: Different details shown of a module.
_SHOWN = 6

_MATMULS = {"matmul", "bmm", "baddbmm", "einsum"}
_GATHERS = {"embedding", "gather", "index", "index_select", "take", "take_along_dim", "index_put", "scatter"}
#: Of one value, or of several, element by element: what stands between the products of an attention.
_POINTWISE = {"mul", "div", "add", "sub", "where", "masked_fill", "clamp", "maximum", "tanh", "abs", "reciprocal"}
_POINTWISE |= {"dropout", "clone", "type_as", "_to_copy"}
_LARGEST = {"amax", "max", "linalg_vector_norm"}
#: At most 1, whatever they take.
_BOUNDED = {"sigmoid", "hardsigmoid", "tanh", "erf", "sin", "cos", "softmax"}


@cache
def _book() -> RuleBook:
    return RuleBook(Path(__file__).with_name("lint.toml"))


@dataclass(frozen=True)
class _Scope:
    """What the rules know of a graph.

    Attributes:
        live: values that depend on an input or a state; the others are computed once, by the converter.
        widest: height and width that the chip takes.
        mended: nodes of rank 5, and means of squares, that lowering does without.
    """

    live: frozenset[fx.Node]
    widest: int
    mended: frozenset[fx.Node]

    @staticmethod
    def of(module: fx.GraphModule, constants: Iterable[str], widest: int) -> _Scope:
        """The scope of a graph whose placeholders of the names ``constants`` are no inputs."""
        fixed, live = set(constants), set()
        for node in module.graph.nodes:
            if node.op == "placeholder":
                depends = node.name not in fixed
            else:
                depends = any(source in live for source in node.all_input_nodes)
            if depends:
                live.add(node)
        mended = [node for place in packed(module) for node in place.nodes]
        mended += [place.mean for place in written(module)]
        return _Scope(frozenset(live), widest, frozenset(mended))


def _op(node: fx.Node) -> str:
    """The operation that a node calls, as aten calls it, without the mark of one that works in place."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target._schema.name).removeprefix("aten::").removesuffix("_")


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _rank(node: fx.Node) -> int:
    return max((value.dim() for value in _tensors(node)), default=0)


def _shape(node: fx.Node) -> str:
    """Of the first tensor; a dimension that is not fixed is a ``?``."""
    value = _tensors(node)[0]
    return f"({', '.join(str(size) if isinstance(size, int) else '?' for size in value.shape)})"


def _text(node: fx.Node) -> str:
    return f"{_op(node) or 'input ' + node.name} {_shape(node)}"


def _integral(node: fx.Node) -> bool:
    dtypes = [value.dtype for value in _tensors(node)]
    return any(not (d.is_floating_point or d.is_complex or d == torch.bool) for d in dtypes)


def _find(
    start: Iterable[fx.Node],
    step: Callable[[fx.Node], Iterable[fx.Node]],
    wanted: Callable[[fx.Node], bool],
) -> fx.Node | None:
    """The first wanted node from ``start`` on, by way of operations that work element by element, and of views."""
    waiting, seen = list(start), set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if wanted(node):
            return node
        if _is_view(node) or _op(node) in _POINTWISE or node.target is operator.getitem:
            waiting += step(node)
    return None


def _before(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _after(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _origin(item: Any) -> Any:
    """What an argument is a view of."""
    while isinstance(item, fx.Node) and _is_view(item):
        item = item.args[0]
    return item


def _folds(node: fx.Node) -> bool:
    """Whether ``node``, of more than five dimensions, begins a view, a permute and a view back."""
    kinds = ""
    letters = {"view": "v", "reshape": "v", "_unsafe_view": "v", "unflatten": "v", "flatten": "v"}
    letters |= {"permute": "p", "transpose": "p", "contiguous": "c", "clone": "c"}
    while True:
        kinds += letters.get(_op(node), "?")
        if _rank(node) <= 5:
            return re.fullmatch("v+pc?v+", kinds) is not None
        if len(node.users) != 1:
            return False
        (node,) = node.users


def _ranks(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    rank = _rank(node)
    if rank == 5 and node not in scope.mended:
        yield "rank-5", _text(node), None
    elif rank > 5 and all(_rank(source) <= 5 for source in node.all_input_nodes):
        yield "rank-6", _text(node), "note" if _folds(node) else None


def _complex(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    made = any(value.dtype.is_complex for value in _tensors(node))
    if made and not _is_view(node) and _op(node) not in ("complex", "add"):
        yield "complex", _text(node), None


def _integer(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    if _op(node) in _GATHERS:
        yield "integer", _text(node), None
    elif _tensors(node) and not _is_view(node):
        reads = any(_integral(source) for source in node.all_input_nodes if source in scope.live)
        if reads or _integral(node):
            yield "integer", _text(node), None


def _too_wide(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    sizes = [size for value in _tensors(node) if value.dim() > 2 for size in value.shape[-2:] if isinstance(size, int)]
    if max(sizes, default=0) > scope.widest:
        yield "too-wide", f"{_text(node)}, more than {scope.widest}", None


def _linear(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    if _op(node) == "linear" and _rank(node) > 2:
        yield "linear-layout", f"{_shape(node.all_input_nodes[0])} to {_shape(node)}", None


def _product(node: fx.Node, scope: _Scope) -> bool:
    """Whether a node multiplies two matrices neither of which is constant."""
    factors = node.args[1:3] if _op(node) == "baddbmm" else node.args
    return _op(node) in _MATMULS and all(f in scope.live for f in tree_leaves(factors) if isinstance(f, fx.Node))


def _attention(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    if _op(node) == "softmax":
        scores = _find(node.all_input_nodes, _before, lambda n: _product(n, scope))
        result = _find(node.users, _after, lambda n: _product(n, scope))
        if scores and result:
            yield "attention-not-fused", f"{_op(scores)}, {_text(node)}, {_op(result)}", None
    elif _op(node) == "scaled_dot_product_attention":
        query, scale = node.args[0], node.kwargs.get("scale")
        if scale is not None and isinstance(query, fx.Node):
            usual = isinstance(scale, float) and math.isclose(scale, query.meta["val"].shape[-1] ** -0.5, rel_tol=1e-6)
            yield "attention-not-fused", f"scale={scale}" + (", which is the default" if usual else ""), None
        if node.kwargs.get("enable_gqa"):
            heads = [value.meta["val"].shape[-3] for value in node.args[:2] if isinstance(value, fx.Node)]
            yield "gqa", f"{heads[0]} query heads, {heads[-1]} of keys and values", None


def _rms_norm(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    if _op(node) == "rms_norm":
        yield "rms-norm", _text(node), None


def _small(base: fx.Node) -> bool:
    """Whether a value cannot square to more than float16 holds: bounded, or divided by its largest."""
    base = _origin(base)
    if _op(base) == "clamp":
        bounds = [*base.args[1:], *base.kwargs.values()]
        return len(bounds) == 2 and all(isinstance(b, int | float) and abs(b) <= _SQUARES_TO for b in bounds)
    if _op(base) in ("mul", "div"):
        return _find(base.all_input_nodes, _before, lambda n: _op(n) in _LARGEST) is not None
    return _op(base) in _BOUNDED


def _square(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    square = _origin(node.args[0]) if _op(node) in ("mean", "sum") else None
    if not isinstance(square, fx.Node) or not square.args or node in scope.mended:
        return
    base, *others = square.args
    power = _op(square) == "pow" and isinstance(others[0], int | float) and others[0] >= 2
    squared = power or _op(square) == "square" or (_op(square) == "mul" and others[0] is base)
    if squared and isinstance(base, fx.Node) and not _integral(base) and not _small(base):
        yield "square-overflow", f"{_op(square)} into {_op(node)}", None


def _mask(node: fx.Node, scope: _Scope) -> Iterator[_Hit]:
    numbers = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, int | float) and math.isfinite(x)]
    lowest = min((-x if _op(node) == "sub" else x for x in numbers), default=0.0)
    floats = any(value.is_floating_point() for value in _tensors(node))
    if floats and not _is_view(node) and lowest < _LOWEST:
        yield "mask-overflow", f"{_op(node)} {lowest:g}", None


_RULES: tuple[Callable[[fx.Node, _Scope], Iterator[_Hit]], ...] = (
    *(_ranks, _complex, _integer, _too_wide, _linear, _attention, _rms_norm, _square, _mask),
)
#: What holds of inputs, too.
_OF_INPUTS = (_ranks, _complex, _too_wide)
#: What holds of values that the converter computes itself, too.
_OF_CONSTANTS = (_complex, _mask)


class _Findings:
    """One finding for each rule and module."""

    def __init__(self) -> None:
        self._details: dict[tuple[str, str, Severity | None], Counter[str]] = defaultdict(Counter)

    def add(self, module: str, hit: _Hit) -> None:
        """Note that a rule was met in a module."""
        rule, detail, severity = hit
        self._details[rule, module, severity][detail] += 1

    def list(self) -> list[Finding]:
        """All of them, in the order of the rules."""
        order = list(_book().rules)
        found = []
        for key in sorted(self._details, key=lambda key: order.index(key[0])):
            (rule, module, severity), details = key, self._details[key]
            shown = [f"{count} x {text}" if count > 1 else text for text, count in list(details.items())[:_SHOWN]]
            rest = [f"{len(details) - _SHOWN} others"] if len(details) > _SHOWN else []
            found.append(_book().finding(rule, module, "; ".join([*shown, *rest]), severity))
        return found


def _inputs(entry: Entry, name: str) -> Iterator[_Hit]:
    values = {node.name: node.meta["val"] for node in entry.graph.graph.nodes if node.op == "placeholder"}
    for shown, inner in zip(entry.inputs, entry.graph.graph_signature.user_inputs, strict=True):
        value = values[str(inner)]
        if value.dtype == torch.int64:
            yield "int64-input", f"input {shown} of entry {name}", None
        if not all(isinstance(size, int) for size in value.shape):
            yield "dynamic-shape", f"input {shown} of entry {name}: ({', '.join(map(str, value.shape))})", None


def _written(entry: Entry) -> dict[fx.Node, str]:
    """Placeholders of the buffers that the graph writes into, which become states, and the buffers' paths."""
    buffers, written = entry.graph.graph_signature.inputs_to_buffers, {}
    for node in entry.graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for given, declared in zip(node.args, node.target._schema.arguments, strict=False):
            place = _origin(given) if declared.alias_info and declared.alias_info.is_write else None
            if isinstance(place, fx.Node) and place.name in buffers:
                written[place] = buffers[place.name]
    return written


def _caches(program: Program) -> Iterator[_Hit]:
    """A decoder's caches become states as well."""
    context, rows = (program.decoder.context, program.decoder.rows) if program.decoder else (0, ())
    for name, width in rows:
        if context % _STATE_STEP or width % _STATE_STEP:
            yield "state-32", f"{name} (1, {context}, {width})", None


def _buffers(entry: Entry, states: dict[fx.Node, str]) -> Iterator[tuple[str, _Hit]]:
    """Hits in states and in constants, with the modules that hold them; of a tensor without a name, that use it."""
    for node, path in states.items():
        shape = tuple(node.meta["val"].shape)
        if any(size % _STATE_STEP for size in shape[-2:]):
            yield path.rpartition(".")[0], ("state-32", f"{path.rpartition('.')[2]} {shape}", None)
    signature = entry.graph.graph_signature
    tensors = {**entry.graph.state_dict, **entry.graph.constants}
    for node in entry.graph.graph.nodes:
        buffer = signature.inputs_to_buffers.get(node.name)
        value = tensors.get(buffer or signature.inputs_to_lifted_tensor_constants.get(node.name, ""))
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            continue
        lowest = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0).min().item()
        if lowest < _LOWEST and node.users and node not in states:
            module = buffer.rpartition(".")[0] if buffer else path_of(next(iter(node.users)))
            name = buffer.rpartition(".")[2] if buffer else "constant"
            yield module, ("mask-overflow", f"{name} {tuple(value.shape)}, lowest {lowest:g}", None)


def _branches(graph: fx.GraphModule, place: str = "") -> Iterator[tuple[fx.GraphModule, str]]:
    """The graphs inside a graph, with the module that each belongs to."""
    for node in graph.graph.nodes:
        inner = getattr(graph, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            module = next((path_of(user) for user in node.users), place)
            yield inner, module
            yield from _branches(inner, module)


def _nodes(graph: fx.Graph, scope: _Scope) -> Iterator[tuple[fx.Node, _Hit]]:
    for node in graph.nodes:
        rules = _RULES if node in scope.live else _OF_CONSTANTS
        if node.op == "placeholder":
            rules = _OF_INPUTS if node in scope.live else ()
        if node.op in ("call_function", "placeholder") and node.target is not operator.getitem:
            for rule in rules:
                yield from ((node, hit) for hit in rule(node, scope))


def _widest(device: Device | None) -> int:
    chip = re.match(r"Apple ([AM])(\d+)", (device and device.chip) or "")
    return _WIDER if chip and int(chip[2]) >= _WIDER_FROM[chip[1]] else _WIDEST


def lint(program: Program, device: Device | None) -> list[Finding]:
    """Findings in the captured program, before any conversion: one for each rule and module.

    Args:
        device: whose chip decides how wide a tensor may be; without one it is the narrowest.
    """
    findings, widest = _Findings(), _widest(device)
    for hit in _caches(program):
        findings.add("", hit)
    for name, entry in program.entries.items():
        states, graph = _written(entry), entry.graph.graph_module
        for hit in _inputs(entry, name):
            findings.add("", hit)
        for module, hit in _buffers(entry, states):
            findings.add(module, hit)
        varying = {*entry.graph.graph_signature.user_inputs, *(node.name for node in states)}
        fixed = {n.name for n in graph.graph.nodes if n.op == "placeholder"} - varying
        for node, hit in _nodes(graph.graph, _Scope.of(graph, fixed, widest)):
            findings.add(path_of(node), hit)
        for branch, place in _branches(graph):
            for node, hit in _nodes(branch.graph, _Scope.of(branch, (), widest)):
                findings.add(path_of(node) or place, hit)
    return findings.list()
