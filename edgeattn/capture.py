"""From an ``nn.Module`` to a ``Program``: one exported graph for each entry, sharing their weights."""

from __future__ import annotations

import contextlib
import math
import random
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from edgeattn.core.errors import ConversionFailed, EdgeAttnError, UsageError
from edgeattn.core.specs import step_of

#: (min, opt, max) of dimensions that may vary, or (min, opt, max, step), by input and axis.
Dynamic = Mapping[str, Mapping[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Entry:
    """One named graph of a program.

    Attributes:
        graph: the exported program; it returns a flat tuple of tensors.
        inputs, outputs: names, in the order of the graph.
        dynamic: (min, opt, max), or with a step, of the inputs' dimensions that may vary, by input and axis.
    """

    graph: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Dynamic = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """What targets lower: the entries of a model by name (``main``; ``prefill``, ``decode``)."""

    entries: Mapping[str, Entry]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write ``ENTRY.pt2`` files into ``folder``; the returned plain data is what ``load`` needs beside them."""
        for name, entry in self.entries.items():
            torch.export.save(entry.graph, folder / f"{name}.pt2")
        names: dict[str, Any] = {}
        for name, entry in self.entries.items():
            names[name] = {"inputs": list(entry.inputs), "outputs": list(entry.outputs)}
            if entry.dynamic:  # JSON has no numbers as keys
                ranges = {i: [[axis, *ends] for axis, ends in axes.items()] for i, axes in entry.dynamic.items()}
                names[name]["dynamic"] = ranges
        return names

    @staticmethod
    def load(folder: Path, names: Mapping[str, Mapping[str, Any]]) -> Program:
        """Read what ``save`` wrote."""
        return Program(
            {
                name: Entry(
                    torch.export.load(folder / f"{name}.pt2"),
                    tuple(n["inputs"]),
                    tuple(n["outputs"]),
                    {i: {axis: tuple(ends) for axis, *ends in axes} for i, axes in n.get("dynamic", {}).items()},
                )
                for name, n in names.items()
            }
        )


class ModulePath:
    """The path of the module whose forward runs now; after an error, of the innermost one that raised it."""

    def __init__(self) -> None:
        self._stack: list[str] = []

    @property
    def current(self) -> str:
        """Dotted path as in ``named_modules``; ``(model)`` outside of any child."""
        return (self._stack[-1] if self._stack else "") or "(model)"

    @contextlib.contextmanager
    def follow(self, model: nn.Module) -> Iterator[ModulePath]:
        """Follow the calls inside ``model``; its hooks are taken off again."""

        # The hooks touch no argument, so nothing of them shows up in an exported graph. The branches of torch.cond are
        # compiled, where a side effect would be an error; there the module around them is named.
        def enter(path: str) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._stack.append(path)

        def leave(*_: Any) -> None:
            if not torch.compiler.is_dynamo_compiling():
                self._stack.pop()

        handles: list[Any] = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: enter(path)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a forward's result, flattened in order; numbers and None among them are no outputs."""
    return tuple(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))


def own_copies(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Inputs for one forward, which may change them in place."""
    return tuple(value.clone() for value in inputs.values())


def name_outputs(result: Any, wanted: tuple[str, ...], taken: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a forward's result, flattened in order, under the recipe's names.

    Without names a single output is ``output``; mappings give their keys, other containers ``output_0`` and so on.
    A key that is in ``taken``, the names of the inputs, becomes ``output_KEY``.

    Raises:
        UsageError: another number of outputs than names, or no tensor at all.
    """
    leaves = tensors_of(result)
    if not leaves:
        raise UsageError("the model returns no tensor", value=type(result).__name__, fix="return tensors")
    if wanted and len(wanted) != len(leaves):
        raise UsageError(
            "the recipe names another number of outputs than the model returns",
            value=", ".join(wanted),
            where="outputs",
            why=f"the model returns {len(leaves)}",
        )
    if wanted:
        names = list(wanted)
    elif isinstance(result, Mapping) and len(result) == len(leaves) and all(map(str, result)):
        names = [f"output_{key}" if str(key) in taken else str(key) for key in result]
    else:
        names = ["output"] if len(leaves) == 1 else [f"output_{i}" for i in range(len(leaves))]
    return dict(zip(names, leaves, strict=True))


def run_eager(model: nn.Module, inputs: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """One forward without gradients, inputs in order, outputs by name.

    Raises:
        UsageError: the forward fails on these inputs; names the module.
    """
    try:
        with torch.no_grad():
            return name_outputs(model(*own_copies(inputs)), outputs, inputs)
    except EdgeAttnError:
        raise
    except Exception as error:
        path = ModulePath()
        with contextlib.suppress(Exception), torch.no_grad(), path.follow(model):
            model(*own_copies(inputs))  # once more, to learn where
        shapes = ", ".join(f"{name}={tuple(value.shape)}" for name, value in inputs.items())
        raise UsageError(
            "the model cannot run on these inputs",
            value=shapes,
            where=f"module {path.current}",
            why=_reason(error),
            fix="correct --input (shape, dtype) or the recipe's [inputs]",
        ) from error


def capture(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    exporter: Callable[..., torch.export.ExportedProgram] = torch.export.export,
    dynamic: Dynamic | None = None,
) -> Program:
    """Export ``model`` in eval mode as the single entry ``main``, for the shapes of ``inputs``.

    Args:
        inputs: example tensors by name, in the order of ``forward``; a dimension that may vary has at least 2 in them.
        outputs: names of the flattened outputs.
        dynamic: dimensions that may vary. Those of several inputs may have to be equal, as batches are, if their ranges
            are the same.

    Raises:
        ConversionFailed: the graph cannot be captured; names the module whose code stands in the way, or the input and
            axis that cannot vary over their whole range.
    """
    dynamic = {name: axes for name, axes in (dynamic or {}).items() if axes}
    path = ModulePath()
    # The graph returns the tensors alone, whatever containers, numbers or named tuples the model puts them in.
    flatten = model.register_forward_hook(lambda module, args, result: tensors_of(result))
    try:
        with torch.no_grad(), warnings.catch_warnings(), path.follow(model):
            warnings.simplefilter("ignore")
            graph = _export_ranges(model, inputs, dynamic, exporter) if dynamic else exporter(model, own_copies(inputs))
    except EdgeAttnError:
        raise
    except Exception as error:
        raise ConversionFailed(
            "the model cannot be captured as a graph",
            where=f"module {path.current}",
            why=_reason(error),
            fix="its forward must not branch on values of tensors; see torch.export's notes on torch.cond",
            details=_user_frames(error),
        ) from error
    finally:
        flatten.remove()
    for module in graph.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # file paths of this machine, in every node
    return Program({"main": Entry(graph, tuple(inputs), outputs, dynamic)})


#: Number of an input, and an axis of it.
_Place = tuple[int, int]
#: A dimension as torch.export is told to call it, by its place, and as its messages explain it.
_DIM = re.compile(r"dim_(\d+)_(\d+)(?: = L\[[^]]*\](?:\[\d+\])?\.size\(\)\[\d+\])?")


def _export_ranges(
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
        args, shapes = own_copies(inputs), torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
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


#: Whose lines are no news to a user: torch's, and ours apart from the models.
_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__), Path(contextlib.__file__))


def _user_frames(error: BaseException) -> list[str]:
    """Lines of model code on the way to ``error``: everything that is not torch's or ours."""
    frames, frame = [], error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith("<") and not any(Path(file).is_relative_to(root) for root in _NOT_THE_USERS):
            frames.append(f"{file}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}")
        frame = frame.tb_next
    return frames[-3:]
