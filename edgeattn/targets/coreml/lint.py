"""Core ML's lint: patterns of ``lint.toml`` in a captured program, told by operations, shapes and dtypes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from edgeattn.core import tools
from edgeattn.lint import Finding, RuleBook, operators
from edgeattn.lint.books import own
from edgeattn.lint.engine import Findings, Hit, by_pattern
from edgeattn.lint.graph import (
    Part,
    after,
    before,
    find,
    is_integral,
    is_view,
    op_of,
    origin_of,
    parts_of,
    path_of,
    rank_of,
    shape_text,
    states_of,
    tensors_of,
    text_of,
)
from edgeattn.targets.base import LowerPlan
from edgeattn.targets.coreml import COREMLTOOLS, CoreMLTarget
from edgeattn.targets.coreml.mends.qkv_rank5 import packed
from edgeattn.targets.coreml.mends.written_norm import written

if TYPE_CHECKING:
    from edgeattn.capture import Entry, Program
    from edgeattn.device import Device

#: Height and width that the Neural Engine takes, and the A and M chips from which on it takes more.
_WIDEST, _WIDER, _WIDER_FROM = 16384, 65536, {"A": 17, "M": 4}
#: The lowest number of float16. The converter keeps in float32 what is below, also what would round to it.
_LOWEST = -65504.0
#: Its square is the largest that float16 holds.
_SQUARES_TO = 255.0
#: What states are a multiple of, in their last two dimensions.
_STATE_STEP = 32

_MATMULS = {"matmul", "bmm", "baddbmm", "einsum"}
_GATHERS = {"embedding", "gather", "index", "index_select", "take", "take_along_dim", "index_put", "scatter"}
#: They sum squares, as F.normalize does.
_NORMS = {"linalg_vector_norm", "norm"}
_LARGEST = {"amax", "max", "linalg_vector_norm"}
#: At most 1, whatever they take.
_BOUNDED = {"sigmoid", "hardsigmoid", "tanh", "erf", "sin", "cos", "softmax"}


@cache
def _book() -> RuleBook:
    return own(Path(__file__).parent, "coreml")


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
    def of(part: Part, widest: int) -> _Scope:
        """The scope of a graph."""
        mended = [node for place in packed(part.module) for node in place.nodes]
        mended += [place.mean for place in written(part.module)]
        return _Scope(part.live, widest, frozenset(mended))


def _folds(node: fx.Node) -> bool:
    """Whether ``node``, of more than five dimensions, begins a view, a permute and a view back."""
    kinds = ""
    letters = {"view": "v", "reshape": "v", "_unsafe_view": "v", "unflatten": "v", "flatten": "v"}
    letters |= {"permute": "p", "transpose": "p", "contiguous": "c", "clone": "c"}
    while True:
        kinds += letters.get(op_of(node), "?")
        if rank_of(node) <= 5:
            return re.fullmatch("v+pc?v+", kinds) is not None
        if len(node.users) != 1:
            return False
        (node,) = node.users


def _ranks(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    rank = rank_of(node)
    if rank == 5 and node not in scope.mended:
        yield "rank-5", text_of(node), None
    elif rank > 5 and all(rank_of(source) <= 5 for source in node.all_input_nodes):
        yield "rank-6", text_of(node), "note" if _folds(node) else None


def _complex(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    made = any(value.dtype.is_complex for value in tensors_of(node))
    if made and not is_view(node) and op_of(node) not in ("complex", "add"):
        yield "complex", text_of(node), None


def _integer(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    if op_of(node) in _GATHERS:
        yield "integer", text_of(node), None
    elif tensors_of(node) and not is_view(node):
        reads = any(is_integral(source) for source in node.all_input_nodes if source in scope.live)
        if reads or is_integral(node):
            yield "integer", text_of(node), None


def _too_wide(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    sizes = [
        size for value in tensors_of(node) if value.dim() > 2 for size in value.shape[-2:] if isinstance(size, int)
    ]
    if max(sizes, default=0) > scope.widest:
        yield "too-wide", f"{text_of(node)}, more than {scope.widest}", None


def _linear(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    if op_of(node) == "linear" and rank_of(node) > 2:
        yield "linear-layout", f"{shape_text(node.all_input_nodes[0])} to {shape_text(node)}", None


def _product(node: fx.Node, scope: _Scope) -> bool:
    """Whether a node multiplies two matrices neither of which is constant."""
    factors = node.args[1:3] if op_of(node) == "baddbmm" else node.args
    return op_of(node) in _MATMULS and all(f in scope.live for f in tree_leaves(factors) if isinstance(f, fx.Node))


def _attention(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    if op_of(node) == "softmax":
        scores = find(node.all_input_nodes, before, lambda n: _product(n, scope))
        result = find(node.users, after, lambda n: _product(n, scope))
        if scores and result:
            yield "attention-not-fused", f"{op_of(scores)}, {text_of(node)}, {op_of(result)}", None
    elif op_of(node) == "scaled_dot_product_attention":
        query, scale = node.args[0], node.kwargs.get("scale")
        if scale is not None and isinstance(query, fx.Node):
            usual = isinstance(scale, float) and math.isclose(scale, query.meta["val"].shape[-1] ** -0.5, rel_tol=1e-6)
            yield "attention-not-fused", f"scale={scale}" + (", which is the default" if usual else ""), None
        if node.kwargs.get("enable_gqa"):
            heads = [value.meta["val"].shape[-3] for value in node.args[:2] if isinstance(value, fx.Node)]
            yield "gqa", f"{heads[0]} query heads, {heads[-1]} of keys and values", None


def _rms_norm(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    if op_of(node) == "rms_norm":
        yield "rms-norm", text_of(node), None


def _small(base: fx.Node) -> bool:
    """Whether a value cannot square to more than float16 holds: bounded, or divided by its largest."""
    base = origin_of(base)
    if op_of(base) == "clamp":
        bounds = [*base.args[1:], *base.kwargs.values()]
        return len(bounds) == 2 and all(isinstance(b, int | float) and abs(b) <= _SQUARES_TO for b in bounds)
    if op_of(base) in ("mul", "div"):
        return find(base.all_input_nodes, before, lambda n: op_of(n) in _LARGEST) is not None
    return op_of(base) in _BOUNDED


def _square(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    if op_of(node) in _NORMS and isinstance(node.args[0], fx.Node) and not _small(node.args[0]):
        yield "square-overflow", op_of(node), None
    square = origin_of(node.args[0]) if op_of(node) in ("mean", "sum") else None
    if not isinstance(square, fx.Node) or not square.args or node in scope.mended:
        return
    base, *others = square.args
    power = op_of(square) == "pow" and isinstance(others[0], int | float) and others[0] >= 2
    squared = power or op_of(square) == "square" or (op_of(square) == "mul" and others[0] is base)
    if squared and isinstance(base, fx.Node) and not is_integral(base) and not _small(base):
        yield "square-overflow", f"{op_of(square)} into {op_of(node)}", None


def _mask(node: fx.Node, scope: _Scope) -> Iterator[Hit]:
    numbers = [x for x in tree_leaves((node.args, node.kwargs)) if isinstance(x, int | float) and math.isfinite(x)]
    # A product with a large number is as low as that where its other factor is negative.
    kind = op_of(node)
    lowest = min((-x if kind == "sub" else -abs(x) if kind == "mul" else x for x in numbers), default=0.0)
    floats = any(value.is_floating_point() for value in tensors_of(node))
    if floats and not is_view(node) and lowest < _LOWEST:
        yield "mask-overflow", f"{op_of(node)} {lowest:g}", None


_RULES: tuple[Callable[[fx.Node, _Scope], Iterator[Hit]], ...] = (
    *(_ranks, _complex, _integer, _too_wide, _linear, _attention, _rms_norm, _square, _mask),
)
#: What holds of inputs, too.
_OF_INPUTS = (_ranks, _complex, _too_wide)
#: What holds of values that the converter computes itself, too.
_OF_CONSTANTS = (_complex, _mask)


def _inputs(entry: Entry, name: str) -> Iterator[Hit]:
    values = {node.name: node.meta["val"] for node in entry.graph.graph.nodes if node.op == "placeholder"}
    for shown, inner in zip(entry.inputs, entry.graph.graph_signature.user_inputs, strict=True):
        value = values[str(inner)]
        if value.dtype == torch.int64:
            yield "int64-input", f"input {shown} of entry {name}", None
        if not all(isinstance(size, int) for size in value.shape):
            yield "dynamic-shape", f"input {shown} of entry {name}: ({', '.join(map(str, value.shape))})", None


def _caches(program: Program) -> Iterator[Hit]:
    """A decoder's caches become states as well."""
    context, rows = (program.decoder.context, program.decoder.rows) if program.decoder else (0, ())
    for name, width in rows:
        if context % _STATE_STEP or width % _STATE_STEP:
            yield "state-32", f"{name} (1, {context}, {width})", None


def _buffers(entry: Entry, states: dict[fx.Node, str]) -> Iterator[tuple[str, Hit]]:
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


def _nodes(part: Part, scope: _Scope) -> Iterator[tuple[fx.Node, Hit]]:
    for node in part.nodes():
        rules = _RULES if node in scope.live else _OF_CONSTANTS
        if node.op == "placeholder":
            rules = _OF_INPUTS
        for rule in rules:
            yield from ((node, hit) for hit in rule(node, scope))


def _widest(device: Device | None) -> int:
    chip = re.match(r"Apple ([AM])(\d+)", (device and device.chip) or "")
    return _WIDER if chip and int(chip[2]) >= _WIDER_FROM[chip[1]] else _WIDEST


def _unknown(entry: Entry) -> list[operators.Placed]:
    """Nodes that coremltools has no converter for, after our decompositions and mends. Raises NotAsked."""
    if tools.version(COREMLTOOLS) is None:
        raise operators.NotAsked("coremltools is not here")
    from edgeattn.targets.coreml import lower

    plan = LowerPlan("fp16", [], {}, options=CoreMLTarget().settle({}, None, "fp16"))
    try:
        prepared = lower.prepare(entry, plan)
    except Exception as error:  # whatever a decomposition raises
        raise operators.NotAsked.raised(error) from error
    found = [(path_of(node), node) for node in lower._unknown(prepared.graph)]
    return found + operators.failing_inside(entry, "coreml")


def unsupported(program: Program) -> list[Finding]:
    """All operations that coremltools has no converter for."""
    return operators.unsupported(program, "coreml", _unknown)


def lint(program: Program, device: Device | None) -> list[Finding]:
    """Findings in the captured program, before any conversion: one for each rule and module.

    Args:
        device: whose chip decides how wide a tensor may be; without one it is the narrowest.
    """
    findings, widest = Findings(_book()), _widest(device)
    for hit in _caches(program):
        findings.add("", hit)
    for name, entry in program.entries.items():
        for hit in _inputs(entry, name):
            findings.add("", hit)
        for module, hit in _buffers(entry, states_of(entry)):
            findings.add(module, hit)
        for part in parts_of(entry):
            for node, hit in _nodes(part, _Scope.of(part, widest)):
                findings.add(path_of(node) or part.place, hit)
    return [*findings.list(), *by_pattern(program, _book(), "coreml")]
