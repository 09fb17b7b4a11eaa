"""Whether a node of a captured graph is what a pattern says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.lint.graph import POINTWISE, Part, after, before, find, op_of, tensors_of, text_of
from edgeattn.lint.pattern import Condition, Kind, Pattern

#: What placeholders that are inputs, and the end of a graph, count as.
_ENDS = {"placeholder": "input", "output": "output"}


def holds(pattern: Pattern, node: fx.Node, part: Part) -> bool:
    """Whether a node of a graph is what a pattern says."""
    name = _ENDS.get(node.op) or op_of(node)
    if not name or not _named(name, pattern.op) or not _arguments(pattern, node):
        return False
    reads = [(n, value) for n in _read(node) for value in tensors_of(n)[:1]]
    for kind, tensors in ((pattern.input, reads[:1]), (pattern.other, reads[1:2]), (pattern.inputs, reads)):
        if kind is not None and not any(_is(kind, n, value, part) for n, value in tensors):
            return False
    if pattern.output is not None and not any(_is(pattern.output, node, v, part) for v in tensors_of(node)[:1]):
        return False
    if pattern.same is not None and pattern.same != (len(reads) > 1 and len({n for n, _ in reads}) == 1):
        return False
    for wanted, step in ((pattern.before, before), (pattern.after, after)):
        if wanted is not None and not _near(wanted, node, step, part, pattern.through):
            return False
    if pattern.unless is not None and holds(pattern.unless, node, part):
        return False
    return not pattern.any or any(holds(one, node, part) for one in pattern.any)


def _named(name: str, patterns: str | Iterable[str]) -> bool:
    return any(fnmatchcase(name, one) for one in ([patterns] if isinstance(patterns, str) else patterns))


def _is(kind: Kind, node: fx.Node, value: Tensor, part: Part) -> bool:
    fixed = [size for size in value.shape if isinstance(size, int)]
    if kind.rank is not None and not kind.rank.holds(value.dim()):
        return False
    if kind.dtype is not None and not _named(str(value.dtype).removeprefix("torch."), kind.dtype):
        return False
    if kind.largest is not None and not kind.largest.holds(max(fixed, default=0)):
        return False
    if kind.constant is not None and kind.constant == (node in part.live):
        return False
    if kind.dynamic is not None and kind.dynamic != (len(fixed) < value.dim()):
        return False
    return all(_size(int(axis), wanted, value) for axis, wanted in kind.sizes.items())


def _size(axis: int, wanted: Condition, value: Tensor) -> bool:
    inside = -value.dim() <= axis < value.dim()
    return inside and isinstance(value.shape[axis], int) and wanted.holds(value.shape[axis])


def _near(
    wanted: Pattern, node: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]], part: Part, through: str
) -> bool:
    if through == "nothing":
        return any(holds(wanted, other, part) for other in step(node))
    between = POINTWISE if through == "pointwise" else ()
    return find(step(node), step, lambda other: holds(wanted, other, part), between) is not None


def _arguments(pattern: Pattern, node: fx.Node) -> bool:
    if not pattern.args:
        return True
    values = arguments_of(node)
    return all(name in values and wanted.holds(*values[name]) for name, wanted in pattern.args.items())


def detail(pattern: Pattern, node: fx.Node) -> str:
    """What is shown of a node: operation, shape, and the arguments that were asked for."""
    values = arguments_of(node)
    shown = [f"{name}={values[name][0]}" for name in pattern.args if name in values]
    return ", ".join([text_of(node), *shown])


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in the order of its arguments, one that is read twice twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found


def arguments_of(node: fx.Node) -> Mapping[str, tuple[Any, bool]]:
    """Arguments of an operation by name, each with whether the model gives it; {} of what is no aten operation."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    found: dict[str, tuple[Any, bool]] = {}
    for i, declared in enumerate(node.target._schema.arguments):
        if i < len(node.args) and not declared.kwarg_only:
            found[declared.name] = (node.args[i], True)
        elif declared.name in node.kwargs:
            found[declared.name] = (node.kwargs[declared.name], True)
        else:
            found[declared.name] = (declared.default_value, False)
    return found
