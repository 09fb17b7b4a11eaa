"""Affine maps by channel, followed through the operations that let them pass.

A map y = s x + t with one (s, t) for each channel commutes with whatever only moves or averages values within a
channel: average pools that do not count padding, means over other axes, views, permutations, slices. That is what makes
"conv, flatten, BN" and "BN, pool, BN, 1x1" foldable, in whatever way the model writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from edgeattn.reparam.block import Refused
from edgeattn.reparam.trace import Call, Op, Record, Value


class Replay(nn.Module):
    """A recorded operation of one tensor, as a module: x -> func(x, ...)."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.func, self.args, self.kwargs = op.func, op.args[1:], op.kwargs

    def forward(self, x: Tensor) -> Tensor:
        """The operation on ``x`` with its recorded other arguments."""
        result: Tensor = self.func(x, *self.args, **self.kwargs)
        return result


class Fan(nn.Module):
    """One module whose output goes down several chains: x -> (chain(head(x)), ...). Chains may share modules."""

    def __init__(self, head: nn.Module, chains: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.head = head
        self.chains = nn.ModuleList(nn.Sequential(*chain) for chain in chains)

    def links(self) -> list[list[nn.Module]]:
        """The modules of each chain."""
        return [list(chain.children()) for chain in self.chains]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The end of each chain. Each starts from a copy, since an activation at its end may work in place.

        The arguments are those of the head, as the model gives them: perhaps by keyword.
        """
        y = self.head(*args, **kwargs)
        return tuple(chain(y.clone()) for chain in self.chains)


@dataclass(frozen=True)
class Step:
    """One link of a chain: a module call, or an operation that lets an affine map pass."""

    call: Call | None = None
    op: Op | None = None

    @property
    def shaped(self) -> bool:
        """True if the step holds sizes of its recorded input, so that it cannot run on a crop."""
        return self.op is not None and self.op.name in SHAPED

    def module(self) -> nn.Module:
        """The step as a module."""
        if self.call is not None:
            return self.call.module
        assert self.op is not None
        return Replay(self.op)


def enclosing(op: Op, kind: Callable[[nn.Module], bool]) -> Call | None:
    """The outermost call around ``op`` of a module of that kind."""
    found, call = None, op.call
    while call is not None:
        found = call if kind(call.module) else found
        call = call.parent
    return found


def describe(op: Op) -> str:
    """The operation and the module it is in, for a reason."""
    where = op.call.path if op.call is not None else ""
    return f"{op.name} in {where or '(model)'}"


def consumers(record: Record, value: Value) -> list[Op]:
    """All who read ``value``.

    Raises:
        Refused: it outlives the forward, or its memory is written to.
    """
    if record.leaves(value):
        raise Refused("its output is returned by the model, or kept in an attribute")
    written = record.writers(value)
    if written:
        raise Refused(f"its output is changed in place by {describe(written[0])}")
    return record.readers(value)


def passes(op: Op, axis: int) -> int:
    """Where the channel axis of the input goes when ``op`` lets an affine map by channel pass.

    Raises:
        Refused: it does not, or not exactly.
    """
    rule = _PASSES.get(op.name)
    if rule is None or len(op.inputs) != 1 or not op.args or op.args[0] is not op.inputs[0] or len(op.outputs) != 1:
        raise Refused(f"it goes through {describe(op)}, which a channel's scale and shift do not pass")
    moved = rule(op, axis, *op.args[1:], **op.kwargs)
    if moved is None:
        raise Refused(f"it goes through {describe(op)}, which mixes channels or counts padding")
    return moved


def _stays(op: Op, axis: int, *rest: Any, **named: Any) -> int | None:
    return axis


def _average(
    rank: int,
) -> Callable[..., int | None]:
    def rule(
        op: Op,
        axis: int,
        kernel: Any,
        stride: Any = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> int | None:
        exact = divisor_override is None and (not count_include_pad or not any(padding))
        return axis if exact and axis == len(op.inputs[0].shape) - rank - 1 else None

    return rule


def _adaptive(op: Op, axis: int, size: Any) -> int | None:
    return axis if axis == len(op.inputs[0].shape) - len(size) - 1 else None


def _mean(op: Op, axis: int, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> int | None:
    ndim = len(op.inputs[0].shape)
    reduced = {dim % ndim for dim in dims or range(ndim)}
    if axis in reduced or dtype is not None:
        return None
    return axis if keepdim else axis - sum(dim < axis for dim in reduced)


def _view(op: Op, axis: int, *rest: Any, **named: Any) -> int | None:
    old, new = op.inputs[0].shape, op.outputs[0].shape
    for place, size in enumerate(new):
        # The axis survives a row-major reshape where it has its size, and as many elements in front of it as before.
        if size == old[axis] and prod(new[:place]) == prod(old[:axis]):
            return place
    return None


def _permute(op: Op, axis: int, dims: Sequence[int]) -> int | None:
    return [dim % len(dims) for dim in dims].index(axis)


def _transpose(op: Op, axis: int, a: int = 0, b: int = 1) -> int | None:
    ndim = len(op.inputs[0].shape)
    if ndim < 2:
        return axis
    return {a % ndim: b % ndim, b % ndim: a % ndim}.get(axis, axis)


def _select(op: Op, axis: int, dim: int, index: int) -> int | None:
    dim %= len(op.inputs[0].shape)
    return None if dim == axis else axis - (dim < axis)


def _slice(op: Op, axis: int, dim: int = 0, *rest: Any, **named: Any) -> int | None:
    return None if dim % len(op.inputs[0].shape) == axis else axis


#: ATen operation -> rule(op, axis, the operation's other arguments) -> the new axis, or None if it is not exact.
_PASSES: dict[str, Callable[..., int | None]] = {
    "aten.avg_pool1d": _average(1),
    "aten.avg_pool2d": _average(2),
    "aten.avg_pool3d": _average(3),
    "aten._adaptive_avg_pool2d": _adaptive,
    "aten._adaptive_avg_pool3d": _adaptive,
    "aten.mean": _mean,
    "aten.view": _view,
    "aten._unsafe_view": _view,
    "aten.squeeze": _view,
    "aten.unsqueeze": _view,
    "aten.permute": _permute,
    "aten.transpose": _transpose,
    "aten.t": _transpose,
    "aten.select": _select,
    "aten.slice": _slice,
    "aten.clone": _stays,
    "aten.detach": _stays,
    "aten.alias": _stays,
}
SHAPED = frozenset({"aten.view", "aten._unsafe_view", "aten.select", "aten.slice"})


def upstream(record: Record, value: Value, kind: Callable[[nn.Module], bool]) -> tuple[Call, list[Op]]:
    """Back from ``value`` over operations that could pass an affine map, to the call of a module that made it.

    Returns:
        The call, and the operations between its output and ``value``, in order.

    Raises:
        Refused: something else made it, or a value on the way has other readers.
    """
    between: list[Op] = []
    while True:
        op = record.producer(value)
        if op is None:
            raise Refused("its input is not the output of a convolution or linear layer (it is the model's input)")
        call = enclosing(op, kind)
        if call is not None and call.outputs == (value,):
            return call, between
        if call is not None or op.name not in _PASSES or not op.inputs:
            raise Refused(f"its input is not the output of a convolution or linear layer, but of {describe(op)}")
        between.insert(0, op)
        value = op.inputs[0]


def without_affine(record: Record, call: Call) -> Iterator[nn.Module]:
    """What a BatchNorm module does after its batch norm: nothing, or its children in a row (timm's BatchNormAct2d).

    Raises:
        Refused: it does something that cannot be told apart from its batch norm.
    """
    refused = Refused(f"{type(call.module).__name__} does more than a batch norm, in a way that cannot be separated")
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        raise refused
    own = [op for op in record.ops if op.call is call and op.outputs and op.name != "aten.empty"]
    if len(own) != 1 or "batch_norm" not in own[0].name or own[0].inputs[0] != call.inputs[0]:
        raise refused
    value = own[0].outputs[0]
    for inner in record.calls:
        if inner.parent is not call:
            continue
        if inner.inputs != (value,) or len(inner.outputs) != 1:
            raise refused
        value = inner.outputs[0]
        if not isinstance(inner.module, nn.Identity):
            yield inner.module
    if value != call.outputs[0]:
        raise refused


def sequence(modules: Sequence[nn.Module]) -> nn.Module:
    """The shortest module that runs these in a row."""
    if not modules:
        return nn.Identity()
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
