"""Named tensors: shape, dtype and the range that random values are drawn from; and batches of samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.numerics import Array

#: Most elements of an input: 4 GB in float32.
LARGEST = 1 << 30

DTYPES = ("float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool")

_SIZE = r"\d+((\.\.\d+){1,2}(/\d+)?)?"
_FORM = re.compile(
    rf"(?P<name>[A-Za-z_][\w.]*)=(?P<shape>{_SIZE}(x{_SIZE})*|scalar)"
    r"(:(?P<dtype>\w+))?(:(?P<low>[^:]+?)\.\.(?P<high>[^:]+))?"
)

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def range_fault(dtype: str, low: float | None, high: float | None) -> str | None:
    """Why ``low`` to ``high`` cannot be the range of random values of ``dtype``; None if it can or both are None."""
    if low is None and high is None:
        return None
    if low is None or high is None:
        return "a range needs both low and high"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "a range must be finite"
    if low > high:
        return "low is above high"
    if dtype.startswith(("int", "uint")):
        if low != int(low) or high != int(high):
            return f"the range of {dtype} must be whole numbers"
        ends = np.iinfo(dtype)
        if low < ends.min or high > ends.max:
            return f"{dtype} holds {ends.min}..{ends.max}"
    return None


#: Dimensions that may vary, each as (axis, min, opt, max), or (axis, min, opt, max, step) where only multiples of step
#: are sizes; min and max are inclusive.
Ranges = tuple[tuple[int, ...], ...]


def step_of(ends: Sequence[int]) -> int:
    """The step of a range (min, opt, max) or (min, opt, max, step): 1 where it names none."""
    return ends[3] if len(ends) > 3 else 1


def dynamic_fault(shape: Sequence[int], ranges: Mapping[int, Sequence[int]]) -> str | None:
    """Why dimensions of ``shape`` cannot vary over ``ranges``, (min, opt, max[, step]) by axis; None if they can."""
    for axis, ends in ranges.items():
        if not 0 <= axis < len(shape):
            return f"axis {axis}: the shape has {f'axes 0 to {len(shape) - 1}' if shape else 'no axis'}"
        if len(ends) not in (3, 4):
            return f"axis {axis}: a range is min, opt and max, and a step if it has one"
        (low, opt, high), step = ends[:3], step_of(ends)
        if low < 1:
            return f"axis {axis}: min must be at least 1"
        if not low <= opt <= high:
            return f"axis {axis}: {low}, {opt}, {high} are not in the order min, opt, max"
        if low == high:
            return f"axis {axis}: min and max are both {low}; give the shape alone"
        if step < 1:
            return f"axis {axis}: the step must be at least 1"
        if uneven := [n for n in (low, opt, high) if n % step]:
            return f"axis {axis}: {uneven[0]} is no multiple of the step {step}"
        if opt != shape[axis]:
            return f"axis {axis}: opt {opt} is not the {shape[axis]} of the shape"
    if math.prod(ranges[axis][2] if axis in ranges else n for axis, n in enumerate(shape)) > LARGEST:
        return f"more than {LARGEST:,} elements at max"
    return None


def shape_texts(shape: Sequence[int], ranges: Sequence[Sequence[int]]) -> list[str]:
    """Each dimension as text: ``4``; ``MIN..OPT..MAX[/STEP]`` where it may vary, ``MIN..MAX`` where opt is max."""
    shown = [str(n) for n in shape]
    for axis, *ends in ranges:
        low, opt, high = ends[:3]
        step = f"/{step_of(ends)}" if step_of(ends) > 1 else ""
        shown[axis] = f"{low}..{high}{step}" if opt == high else f"{low}..{opt}..{high}{step}"
    return shown


def shape_words(shape: Sequence[int], ranges: Sequence[Sequence[int]]) -> str:
    """A shape as Python writes it, with ranges: ``(1..4..8, 3, 224, 224)``."""
    shown = shape_texts(shape, ranges)
    return f"({shown[0]},)" if len(shown) == 1 else f"({', '.join(shown)})"


@dataclass(frozen=True)
class TensorSpec:
    """One named input.

    Attributes:
        name: as the entry names it.
        shape: static shape; () is a scalar. Of a dimension that may vary, its opt.
        dtype: a NumPy name out of ``DTYPES``.
        low, high: inclusive range of random integers, or the range of uniform floats; floats without a range are
            standard normal, integers without one lie in 0..1.
        dynamic: the dimensions that may vary, in the order of the axes; for targets that take several shapes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float | None = None
    high: float | None = None
    dynamic: Ranges = ()

    def at(self, end: Literal["min", "opt", "max"]) -> TensorSpec:
        """The static spec with every dimension that may vary at that end of its range."""
        which = ("min", "opt", "max").index(end)
        sizes = {axis: ends[which] for axis, *ends in self.dynamic}
        return replace(self, shape=tuple(sizes.get(i, n) for i, n in enumerate(self.shape)), dynamic=())

    def random(self, seed: int) -> Array:
        """A seeded random tensor of this spec; the same seed and spec give the same bits on every machine."""
        rng = np.random.Generator(np.random.PCG64(seed))
        if self.dtype == "bool":
            return rng.random(self.shape) < 0.5
        if self.dtype.startswith(("int", "uint")):
            low, high = int(self.low or 0), int(1 if self.high is None else self.high)
            return rng.integers(low, high, size=self.shape, endpoint=True).astype(self.dtype)
        if self.low is not None and self.high is not None:
            return (self.low + (self.high - self.low) * rng.random(self.shape)).astype(self.dtype)
        return rng.standard_normal(self.shape).astype(self.dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(shape_texts(self.shape, self.dynamic)) or "scalar"
        return f"{self.name}={shape}" + ("" if self.dtype == "float32" else f":{self.dtype}")


def _sizes(text: str) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
    """Shape and ranges of a text like ``1..4..8x3x192..256/32``."""
    shape: list[int] = []
    ranges: dict[int, tuple[int, ...]] = {}
    for axis, size in enumerate(text.split("x") if text else ()):
        range_text, _, step = size.partition("/")
        ends = [int(n) for n in range_text.split("..")]
        shape.append(ends[-1] if len(ends) < 3 else ends[1])
        if len(ends) > 1:
            ranges[axis] = (ends[0], shape[axis], ends[-1], *([int(step)] if step and int(step) != 1 else []))
    return tuple(shape), ranges


def parse_spec(text: str) -> TensorSpec:
    """Read ``NAME=SHAPE[:DTYPE[:LOW..HIGH]]``, as in ``x=1x3x224x224`` or ``ids=1x16:int64:0..31999``.

    A dimension may be a range: ``x=1..4..8x3x224x224`` (min, opt, max), or ``x=1..8x3x224x224``, whose opt is the max:
    a batch is filled up where speed counts. ``x=1x3x192..224..256/32x224`` takes multiples of 32 alone.

    Raises:
        UsageError: any other form, a zero dimension, an unknown dtype, or a range that the dtype does not hold.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            "an input could not be read",
            value=text,
            where="--input",
            why="the form is NAME=SHAPE[:DTYPE[:LOW..HIGH]]",
            fix="for example --input x=1x3x224x224, x=1..8x3x224x224 or ids=1x16:int64:0..31999",
        )
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise unknown("dtype of an input", dtype, DTYPES, where=f"--input {text}")
    shape, ranges = _sizes("" if match["shape"] == "scalar" else match["shape"])
    if 0 in shape:
        raise UsageError("an input has an empty dimension", value=match["shape"], where=f"--input {text}")
    if math.prod(shape) > LARGEST:
        raise UsageError(
            "an input is too large",
            value=match["shape"],
            where=f"--input {text}",
            why=f"more than {LARGEST:,} elements",
        )
    if fault := dynamic_fault(shape, ranges):
        raise UsageError("a dimension's range cannot be used", value=match["shape"], where=f"--input {text}", why=fault)
    ends = [match[k] for k in ("low", "high") if match[k]]
    if not all(_NUMBER.fullmatch(end) for end in ends):
        raise UsageError(
            "an input's range is not of numbers",
            value="..".join(ends),
            where=f"--input {text}",
            fix="LOW..HIGH, as 0..9",
        )
    low, high = (float(match[k]) if match[k] else None for k in ("low", "high"))
    if fault := range_fault(dtype, low, high):
        raise UsageError("an input's range cannot be used", value="..".join(ends), where=f"--input {text}", why=fault)
    dynamic = tuple((axis, *ends) for axis, ends in ranges.items())
    return TensorSpec(match["name"], shape, dtype, low, high, dynamic)


#: What a decoder's entries take beside their cache, and what they give beside its new rows.
IDS, POSITION, LAST, LOGITS = "ids", "position", "last", "logits"


def new_name(row: str) -> str:
    """The output that has the new rows of a cache tensor."""
    return f"new_{row}"


@dataclass(frozen=True)
class StepShape:
    """An entry: how many new tokens it takes, behind how many rows of the cache.

    Attributes:
        dynamic: at most so many of both; else exactly so many, the rows that are not filled and the tokens after the
            last one masked.
    """

    name: str
    tokens: int
    cached: int
    dynamic: bool = False


def batches(x: Array, size: int) -> Iterator[Array]:
    """Consecutive batches of exactly ``size``; the last one is filled up with its own last sample."""
    for start in range(0, len(x), size):
        part = x[start : start + size]
        yield np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)]) if len(part) < size else part
