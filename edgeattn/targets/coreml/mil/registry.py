"""How an operation of MIL finds its implementation, and how arguments become what it takes.

An implementation is a function whose parameters have MIL's names; their annotations say what they take:

    Tensor            a torch tensor, its numbers carried as ``carrier`` says
    Tensors           a list of them (``values`` of concat, ``x`` of while_loop)
    Ints, Bools       tuples of Python numbers, from a tensor of one dimension (strides, axes, masks)
    int float bool str Number   single values; a Number is an int or a float as it was written
    Any               whatever is carried: a state, a list, a text
    Call              not a parameter of MIL: the operation itself, its declared outputs and its blocks

It returns a tensor or a tuple of values. What it returns is brought to the declared dtypes by the program, so that no
implementation rounds. ``| None`` marks what may be left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from edgeattn.core.numerics import Array

Ints: TypeAlias = tuple[int, ...]
Bools: TypeAlias = tuple[bool, ...]
Tensors: TypeAlias = list[Tensor]
Number: TypeAlias = "int | float"

#: How numbers of a MIL type are carried, where that is not the type of the same name.
_CARRIERS = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "int4": torch.int8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
    **dict.fromkeys(("uint1", "uint2", "uint3", "uint4", "uint6"), torch.uint8),
}
#: What computes fp16: float32 without any rounding; float16; float32 with each output rounded to its dtype.
MODES = ("fp32", "native", "fp32acc")


def carrier(dtype: str, mode: str) -> torch.dtype:
    """The torch dtype in which numbers of a MIL dtype are computed."""
    return torch.float16 if dtype == "fp16" and mode == "native" else _CARRIERS[dtype]


def to_tensor(value: Array, dtype: str, mode: str) -> Tensor:
    """A constant or a feed as it is carried; the memory is shared where nothing has to be converted."""
    if value.dtype in (np.uint16, np.uint32, np.uint64):
        value = value.astype(np.int64)
    value = np.ascontiguousarray(value) if value.ndim else value
    shared = torch.from_numpy(value) if value.flags.writeable else _read_only(value)
    return shared.to(carrier(dtype, mode))


def _read_only(value: Array) -> Tensor:
    """A tensor over memory that must not be written to, which torch would warn of; no operation writes."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(value)


def conform(value: Tensor, dtype: str, mode: str) -> Tensor:
    """A result in its declared dtype, as it is carried; rounded to float16 in mode ``fp32acc``."""
    kind = carrier(dtype, mode)
    if value.dtype is not kind:
        value = value.to(kind)
    return value.half().float() if dtype == "fp16" and mode == "fp32acc" else value


@dataclass(frozen=True)
class Declared:
    """Name, dtype and static shape (None where one is open) of an operation's output."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Call:
    """The operation that an implementation runs for.

    Attributes:
        opset: number of the iOS whose operations these are: 15 to 18, or 26.
        blocks: functions from their arguments to their results, for control flow.
    """

    type: str
    name: str
    opset: int
    mode: str
    outputs: tuple[Declared, ...]
    blocks: tuple[Callable[[Sequence[Any]], list[Any]], ...] = ()


@dataclass(frozen=True)
class Op:
    """An implementation: its function, and what each of its parameters takes.

    Attributes:
        moves: every element of its results is one of its arguments', so that there is nothing to round.
    """

    function: Callable[..., Any]
    kinds: dict[str, str]
    required: frozenset[str]
    moves: bool = False


#: Implementations by MIL's name of the operation.
OPS: dict[str, Op] = {}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def op(*names: str, moves: bool = False) -> Callable[[_Function], _Function]:
    """Register an implementation under MIL's names; see the head of this file for its parameters, ``Op`` for moves."""

    def register(function: _Function) -> _Function:
        parameters = inspect.signature(function).parameters.values()
        kinds = {p.name: str(p.annotation).removesuffix(" | None") for p in parameters}
        required = frozenset(p.name for p in parameters if p.default is p.empty and kinds[p.name] != "Call")
        for name in names:
            OPS[name] = Op(function, kinds, required, moves)
        return function

    return register


def _plain(value: Any) -> Any:
    """Numbers of an array or a tensor as Python's own."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def convert(value: Any, kind: str) -> Any:
    """An argument as its parameter takes it; see the head of this file.

    Args:
        value: a tensor, an array of a constant, a text, or what else is carried.
    """
    if kind in ("Ints", "Bools"):
        plain = _plain(value)
        return tuple(plain) if isinstance(plain, list | tuple) else (plain,)
    if kind in ("int", "float", "bool", "Number"):
        plain = _plain(value)
        while isinstance(plain, list):
            (plain,) = plain
        return plain if kind == "Number" else {"int": int, "float": float, "bool": bool}[kind](plain)
    return value
