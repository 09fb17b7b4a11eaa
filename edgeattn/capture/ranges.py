"""Dimensions that may vary: exported with every range held to, or refused with the input, axis and module."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.capture.program import Dynamic
from edgeattn.core.errors import ConversionFailed
from edgeattn.core.specs import step_of

#: Number of an input, and an axis of it.
_Place = tuple[int, int]
#: A dimension as torch.export is told to call it, by its place, and as its messages explain it.
_DIM = re.compile(r"dim_(\d+)_(\d+)(?: = L\[[^]]*\](?:\[\d+\])?\.size\(\)\[\d+\])?")


def export_ranges(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dynamic: Dynamic,
    exporter: Callable[..., torch.export.ExportedProgram],
) -> torch.export.ExportedProgram:
    """Export with every range held to: named dimensions, unlike ``Dim.AUTO``, may neither shrink nor become constant.

    Raises:
        ConversionFailed: a dimension cannot vary over its range.
    """
    order = list(inputs)
    axes = {(order.index(name), axis): ends for name, found in dynamic.items() for axis, ends in found.items()}
    leaders = {place: place for place in axes}  # of the dimensions that are one, the first
    while True:
        args, shapes = tuple(value.clone() for value in inputs.values()), torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        dims = {}
        for i, axis in set(leaders.values()):
            (low, _, high), step = axes[i, axis][:3], step_of(axes[i, axis])
            size = torch.export.Dim(f"dim_{i}_{axis}", min=low // step, max=high // step)
            dims[i, axis] = size if step == 1 else step * size
        for name, found in dynamic.items():
            i = order.index(name)
            shapes[args[i]] = {axis: dims[leaders[i, axis]] for axis in found}
        with _narrowed(model, list(axes)) as blamed:
            try:
                graph = exporter(model, args, dynamic_shapes=shapes)
            except Exception as error:
                lines = [line.strip(" -\t") for line in str(error).splitlines()]
                if "Cannot create Dim" in str(error):  # torch's words for a range that the model narrows to one size
                    raise ConversionFailed(
                        "a dimension of an input cannot vary",
                        value=" or ".join(f"{ends[0]} to {ends[2]}" for ends in axes.values()),
                        where=" or ".join(f"input {order[i]}, axis {axis}" for i, axis in axes),
                        why="of the sizes in its range the model takes one at most",
                        fix=_NOT_DYNAMIC,
                    ) from error
                if not any(map(_places, lines)):
                    raise
                if not _join(lines, axes, leaders):
                    raise _cannot_vary(lines, order, axes, blamed) from error
            else:
                _check_ranges(graph, order, axes)
                if any(step_of(ends) > 1 for ends in axes.values()):
                    _check_steps(graph, order, axes, leaders)
                return graph


def _places(text: str) -> list[_Place]:
    return [(int(i), int(axis)) for i, axis in _DIM.findall(text)]


def _join(lines: list[str], axes: Mapping[_Place, tuple[int, ...]], leaders: dict[_Place, _Place]) -> bool:
    """Make one dimension of those of several inputs that must be equal, if their ranges are; False if there are none.

    Axes of a single input stay apart: the recipe lets them vary one by one, which they could not.
    """
    joined = False
    for line in lines:
        found = sorted(_places(line)) if "must always be equal" in line else []
        members = [place for place, leader in leaders.items() if leader in found]
        if (
            len(found) == 2
            and len({axes[place] for place in found}) == 1
            and len({i for i, _ in members}) == len(members)
        ):
            leaders.update(dict.fromkeys(members, found[0]))
            joined = True
    return joined


def _cannot_vary(
    lines: list[str],
    order: list[str],
    axes: Mapping[_Place, tuple[int, ...]],
    blamed: Mapping[_Place, str],
) -> ConversionFailed:
    """torch.export's message about dimensions, in words that name inputs and axes."""
    at = next(place for line in lines for place in _places(line))

    def named(text: str) -> str:
        text = _DIM.sub(lambda match: f"axis {match[2]} of {order[int(match[1])]}", text)
        text = re.sub(r"L\[[^]]*\](?:\[\d+\])?\.size\(\)\[(\d+)\]", r"size(\1)", text)
        text = re.sub(r"Not all values of .* satisfy the generated guard (.*)", r"not every size satisfies \1", text)
        return re.sub(r"You marked (.*) as dynamic but .* a constant \((\d+)\).*", r"\1 is always \2", text)

    end = next((i for i, line in enumerate(lines) if line.startswith("Suggested fixes")), len(lines))
    reasons = [line for line in lines[1:end] if _places(line)] or lines[:1]
    own = [named(reason) for reason in reasons if at in _places(reason)]
    first = next((reason for reason in reasons if at in _places(reason)), reasons[0])
    low, _, high = axes[at][:3]
    return ConversionFailed(
        "a dimension of an input cannot vary",
        value=f"{low} to {high}",
        where=f"input {order[at[0]]}, axis {at[1]}" + (f"; module {blamed[at] or '(model)'}" if at in blamed else ""),
        why=f"in the captured graph: {named(first)[:400]}",
        fix="give both the same range, or neither" if "must always be equal" in first else _advice(own, axes[at]),
        details=[named(reason)[:400] for reason in reasons if reason is not first][:5],
    )


_NOT_DYNAMIC = "remove the range of this axis, or write the model's code for any size of it"
#: A condition of torch's that every multiple of a number meets.
_MULTIPLE = re.compile(r"\(size\(\d+\) % (\d+)\)+ == 0")


def _advice(reasons: list[str], ends: tuple[int, ...]) -> str:
    """What to do about an axis that cannot vary freely: a step that its conditions and the range's ends agree with."""
    steps = [int(n) for reason in reasons for n in _MULTIPLE.findall(reason)]
    step = math.lcm(*steps, step_of(ends))
    if step == step_of(ends):
        return (
            f"{_NOT_DYNAMIC}; where it takes the multiples of a number alone, give that as the step: MIN..OPT..MAX/STEP"
        )
    low, high = -(-ends[0] // step) * step, ends[2] // step * step
    opt = min(max(round(ends[1] / step) * step, low), high)
    return f"it takes multiples of {step} alone; say so with a step: {low}..{opt}..{high}/{step}"


@contextlib.contextmanager
def _narrowed(model: nn.Module, places: list[_Place]) -> Iterator[dict[_Place, str]]:
    """In which module each dimension lost a part of its range, while ``model`` is exported.

    torch has no public way to ask; where this one fails the module is not known.
    """
    sizes: dict[_Place, tuple[Any, str]] = {}
    found: dict[_Place, str] = {}

    def state(size: Any) -> str:
        return f"{size.node.expr} {size.node.shape_env.bound_sympy(size.node.expr)}"

    def begin(_module: nn.Module, args: tuple[Any, ...]) -> None:
        with contextlib.suppress(Exception):
            sizes.update({(i, axis): (args[i].shape[axis], state(args[i].shape[axis])) for i, axis in places})

    def leave(path: str) -> None:
        with contextlib.suppress(Exception):
            for place, (size, before) in sizes.items():
                if place not in found and state(size) != before:
                    found[place] = path

    # Children are left before their parents are: the first one to see a change is the innermost.
    handles: list[Any] = [model.register_forward_pre_hook(begin)]
    handles += [m.register_forward_hook(lambda *_, path=path: leave(path)) for path, m in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_ranges(
    graph: torch.export.ExportedProgram, order: list[str], axes: Mapping[_Place, tuple[int, ...]]
) -> None:
    """Whether the graph takes every dimension over its whole range; an exporter may narrow one without a word.

    Raises:
        ConversionFailed: it does not.
    """
    users = graph.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"}
    for (i, axis), ends in axes.items():
        low, _, high = ends[:3]
        size: Any = values[str(users[i])].shape[axis]
        held = None if isinstance(size, int) else graph.range_constraints.get(size.node.expr)
        if held is None or held.lower > low or held.upper < high:
            raise ConversionFailed(
                "a dimension of an input cannot vary",
                value=f"{low} to {high}",
                where=f"input {order[i]}, axis {axis}",
                why=f"the captured graph takes {size if held is None else f'{held.lower} to {held.upper}'}",
                fix=_NOT_DYNAMIC,
            )


#: Most sizes of one axis, and most shapes with several, that the conditions of a graph are asked about.
_ASKED = 2000


def _check_steps(
    graph: torch.export.ExportedProgram,
    order: list[str],
    axes: Mapping[_Place, tuple[int, ...]],
    leaders: dict[_Place, _Place],
) -> None:
    """Whether the graph takes every multiple of the steps: of these torch.export only notes what it assumed.

    Raises:
        ConversionFailed: it does not; names a size and the condition.
    """
    refusal = _refusal(graph)
    while True:
        free = {place: ends for place, ends in axes.items() if place in leaders.values()}
        usual = {place: ends[1] for place, ends in free.items()}
        every = {place: range(ends[0], ends[2] + 1, step_of(ends)) for place, ends in free.items()}
        every = {place: r if len(r) <= _ASKED else r[:: len(r) // _ASKED + 1] for place, r in every.items()}
        pick = random.Random(0)
        asked = [usual | {place: n} for place in free for n in every[place]]
        asked += [{place: pick.choice(r) for place, r in every.items()} for _ in range(_ASKED if len(free) > 1 else 0)]
        refused = next(((sizes, why) for sizes in asked if (why := refusal(sizes, leaders))), None)
        if refused is None:
            return
        if not _join([refused[1]], axes, leaders):
            break
    sizes, why = refused
    at = next((place for place in free if sizes[place] != usual[place]), next(iter(free)))
    (low, opt, high), step = axes[at][:3], step_of(axes[at])
    taken = [n for n in every[at] if not refusal(usual | {at: n}, leaders)]
    fix, multiple = _NOT_DYNAMIC, math.gcd(*taken)
    if 1 < len(taken) < len(every[at]) and taken == list(range(taken[0], taken[-1] + 1, multiple)):
        fix = f"it takes {taken[0]}..{min(max(opt, taken[0]), taken[-1])}..{taken[-1]}/{multiple}"
    named = _DIM.sub(lambda match: f"(axis {match[2]} of {order[int(match[1])]})", why)
    raise ConversionFailed(
        "a dimension of an input cannot vary",
        value=f"{low} to {high}" + f" in steps of {step}" * (step > 1),
        where=f"input {order[at[0]]}, axis {at[1]}",
        why=f"the captured graph does not take {sizes[at]}: {named[:400]}",
        fix="give both the same range, or neither" if "must always be equal" in why else fix,
    )


def _refusal(graph: torch.export.ExportedProgram) -> Callable[[Mapping[_Place, int], Mapping[_Place, _Place]], str]:
    """Gives, for sizes by leader, the condition of the graph that such inputs do not meet, or nothing."""
    guards: Any = graph.module()._guards_fn
    users = [str(user) for user in graph.graph_signature.user_inputs]
    values = {node.name: node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"}
    examples: list[Any] = [values[user] for user in users]

    def refusal(sizes: Mapping[_Place, int], leaders: Mapping[_Place, _Place]) -> str:
        at = {place: sizes[leader] for place, leader in leaders.items()}
        shapes = [[at.get((i, k), n) for k, n in enumerate(x.shape)] for i, x in enumerate(examples)]
        try:
            guards(*(torch.empty(s, dtype=x.dtype, device="meta") for s, x in zip(shapes, examples, strict=True)))
        except AssertionError as error:
            text = re.sub(r"(\w+)\.size\(\)\[(\d+)\]", lambda m: f"dim_{users.index(m[1])}_{m[2]}", str(error))
            text = text.removeprefix("Guard failed: ")
            if re.fullmatch(r"dim_\d+_\d+ == dim_\d+_\d+", text):
                return f"{text.replace('==', 'and')} must always be equal"
            return f"it assumes {text}"
        return ""

    return refusal
