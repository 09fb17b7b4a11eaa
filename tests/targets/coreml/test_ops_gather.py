"""Operations that read or write at places that indices name, element by element and as coremltools infers them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.cases import FLOATS, NUMBERS, Case, check, defined_in, each
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = defined_in("scatter_gather")
#: What becomes of an element and its update.
MODES: dict[str, Callable[[Any, Any], Any]] = {
    "update": lambda element, update: update,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "max": max,
    "min": min,
}


def places(seed: int, shape: tuple[int, ...], size: int, lowest: int = 0) -> Array:
    """Random indices of a dimension."""
    return np.random.default_rng(seed).integers(lowest, size, shape).astype(np.int32)


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, **_: Any) -> Array:
    """Element by element."""
    axis %= x.ndim
    own = indices.shape[batch_dims:]
    made = np.zeros(x.shape[:axis] + own + x.shape[axis + 1 :], x.dtype)
    for place in np.ndindex(made.shape):
        before, inner, after = place[:axis], place[axis : axis + len(own)], place[axis + len(own) :]
        made[place] = x[(*before, indices[before[:batch_dims] + inner], *after)]
    return made


def gather_along_axis(x: Array, indices: Array, axis: int = 0, **_: Any) -> Array:
    """Element by element."""
    made = np.zeros(indices.shape, x.dtype)
    for place in np.ndindex(made.shape):
        source = list(place)
        source[axis] = indices[place]
        made[place] = x[tuple(source)]
    return made


def gather_nd(x: Array, indices: Array, batch_dims: int = 0, **_: Any) -> Array:
    """Part by part."""
    rest = x.shape[batch_dims + indices.shape[-1] :]
    made = np.zeros(indices.shape[:-1] + rest, x.dtype)
    for place in np.ndindex(indices.shape[:-1]):
        made[place] = x[place[:batch_dims] + tuple(indices[place])]
    return made


def changed(data: Array, mode: str, writes: list[tuple[tuple[int, ...], Any]]) -> Array:
    """The updates brought in one after the other, in float64; whole numbers are cut off at the end of each."""
    made = data.astype(np.float64)
    for place, update in writes:
        made[place] = MODES[mode](made[place], float(update))
        made[place] = np.trunc(made[place]) if data.dtype.kind == "i" else made[place]
    return made


def scatter(data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", **_: Any) -> Array:
    axis %= data.ndim
    rows = [((*p[:axis], indices[p[axis]], *p[axis + 1 :]), updates[p]) for p in np.ndindex(updates.shape)]
    return changed(data, mode, rows)


def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: int = 0, mode: str = "add", **_: Any
) -> Array:
    axis %= data.ndim
    rows = [((*p[:axis], indices[p], *p[axis + 1 :]), updates[p]) for p in np.ndindex(updates.shape)]
    return changed(data, mode, rows)


def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", **_: Any) -> Array:
    count = indices.ndim - 1
    rows = [((*indices[place[:count]], *place[count:]), updates[place]) for place in np.ndindex(updates.shape)]
    return changed(data, mode, rows)


# The shape of x, the indices, axis.
GATHERS: list[tuple[tuple[int, ...], Array, int]] = [
    ((5,), places(1, (3,), 5, -5), 0),
    ((5, 3), places(2, (4,), 3, -3), 1),
    ((4, 3, 2), places(3, (2, 3), 4), 0),
    ((4, 3, 2), places(4, (2, 3), 3, -3), -2),
    ((2, 3, 4), places(5, (1, 2, 2), 4), 2),
]
# The shape of x, the indices, axis, batch_dims.
BATCHES: list[tuple[tuple[int, ...], Array, int, int]] = [
    ((2, 4), places(1, (2, 3), 4), 1, 1),
    ((2, 4, 3), places(2, (2, 2), 3, -3), 2, 1),
    ((2, 4, 3), places(3, (2, 2, 5), 4), 1, 1),
    ((2, 3, 4, 5), places(4, (2, 3, 2), 5), 3, 2),
    ((2, 3, 4, 5), places(5, (2, 2), 5, -5), 3, 1),
    ((2, 3, 4), places(6, (2,), 3), 1, 1),
]
ALONG: list[tuple[tuple[int, ...], Array, int]] = [
    ((5,), places(1, (3,), 5, -5), 0),
    ((4, 3), places(2, (6, 3), 4, -4), 0),
    ((2, 3, 4), places(3, (2, 3, 2), 4), -1),
    ((2, 3, 4), places(4, (2, 5, 4), 3, -3), 1),
]
VECTORS: list[tuple[tuple[int, ...], Array, int]] = [
    ((5,), places(1, (3, 1), 5, -5), 0),
    ((3, 4), places(2, (5, 2), 3, -3), 0),
    ((3, 4, 2), places(3, (2, 2, 2), 3), 0),
    ((3, 4, 2), places(4, (4, 1), 3), 0),
    ((2, 3, 4), places(5, (2, 5, 1), 3), 1),
    ((2, 3, 4, 5), places(6, (2, 3, 2, 2), 4), 2),
]
# Shapes of data, and indices of which none names a place twice.
ROWS: list[tuple[tuple[int, ...], Array, int]] = [
    ((5,), np.array([3, -5, 1], np.int32), 0),
    ((2, 4), np.array([2, 0], np.int32), -1),
    ((2, 3, 4), np.array([-1, 1], np.int32), 1),
]
FLAT: list[tuple[tuple[int, ...], Array, int]] = [
    ((5,), np.array([3, -5, 1], np.int32), 0),
    ((2, 3), np.array([[1, -2, 0], [0, 1, 1]], np.int32), 0),
    ((2, 4), np.array([[3, 0], [-3, 2]], np.int32), -1),
]
POINTS: list[tuple[tuple[int, ...], Array]] = [
    ((5,), np.array([[3], [-5]], np.int32)),
    ((2, 3), np.array([[[1, 0]], [[0, -1]]], np.int32)),
    ((3, 2, 2), np.array([[2], [0]], np.int32)),
]
#: Places that are named more than once.
AGAIN = np.array([1, 3, 1, 1], np.int32)


def write(
    op: str, place: int, shape: tuple[int, ...], indices: Array, updates: tuple[int, ...], expected: Any, **given: Any
) -> Case:
    """A case with a dtype and an operation set that depend on its place in a table."""
    dtype = NUMBERS.split()[(place + place // 3) % 3]
    rng = np.random.default_rng(place)
    # Whole numbers that can be divided by, small enough for products in float16.
    values = (rng.integers(1, 4, updates) * rng.choice([-1, 1], updates)).astype(dtype)
    return Case(op, 15 + place % 4, dtype, {"data": shape, "indices": indices, "updates": values}, given, expected)


JUDGED = [
    *(
        Case("gather", opset, "float32 int32", {"x": s, "indices": i}, {"axis": axis}, gather)
        for opset, (s, i, axis) in product((15, 17), GATHERS)
    ),
    *(
        Case("gather", opset, FLOATS, {"x": s, "indices": i}, {"axis": axis, "batch_dims": b}, gather)
        for opset, (s, i, axis, b) in product((16, 18), BATCHES)
    ),
    Case("gather", 15, NUMBERS, {"x": (3, 2), "indices": places(1, (2,), 3)}, {}, gather),
    *(
        Case("gather", 15, NUMBERS, {"x": (4, 3)}, {"indices": np.int32(i), "axis": axis}, gather)
        for i, axis in [(-2, 0), (1, -1)]
    ),
    *(
        Case("gather", 17, "float32", {"x": numbers(1, (4, 3), x), "indices": places(2, (2,), 4).astype(i)}, {}, gather)
        for x, i in [("int8", "uint8"), ("uint8", "int16"), ("float32", "int8")]
    ),
    *(
        Case("gather_along_axis", opset, NUMBERS, {"x": s, "indices": i}, {"axis": axis}, gather_along_axis)
        for opset, (s, i, axis) in zip((15, 16, 17, 18), ALONG, strict=True)
    ),
    Case("gather_along_axis", 15, NUMBERS, {"x": (3, 2), "indices": places(1, (2, 2), 3)}, {}, gather_along_axis),
    *(
        write("scatter_along_axis", place, s, i, i.shape, scatter_along_axis, axis=axis, mode="update")
        for place, (s, i, axis) in enumerate(FLAT * 3)
    ),
]
#: What coremltools infers no values of, or wrong ones.
ALONE = [
    *(
        Case("gather", opset, NUMBERS, {"x": s, "indices": i}, {"axis": axis - len(s), "batch_dims": b}, gather)
        for opset, (s, i, axis, b) in zip((16, 17, 18, 17, 16, 18), BATCHES, strict=True)
    ),
    *(
        Case("gather_nd", opset, NUMBERS, {"x": s, "indices": i}, {"batch_dims": b} if b else {}, gather_nd)
        for opset, (s, i, b) in zip((15, 16, 17, 18, 16, 17), VECTORS, strict=True)
    ),
    *(
        write(
            "scatter", place, s, i, s[: axis % len(s)] + i.shape + s[axis % len(s) + 1 :], scatter, axis=axis, mode=mode
        )
        for place, (mode, (s, i, axis)) in enumerate(product(MODES, ROWS))
    ),
    *(
        write("scatter_along_axis", place, s, i, i.shape, scatter_along_axis, axis=axis, mode=mode)
        for place, (mode, (s, i, axis)) in enumerate(product(MODES, FLAT))
    ),
    *(
        write("scatter_nd", place, s, i, i.shape[:-1] + s[i.shape[-1] :], scatter_nd, mode=mode)
        for place, (mode, (s, i)) in enumerate(product(MODES, POINTS))
    ),
    *(write("scatter", place, (3, 2), AGAIN[:1], (1, 2), scatter) for place in range(3)),
    *(
        write("scatter", place, (5, 2), AGAIN, (4, 2), scatter, mode=mode)
        for place, mode in enumerate([*MODES][1:] * 3)
    ),
    *(
        write("scatter_along_axis", place, (4,), AGAIN, (4,), scatter_along_axis, mode=mode)
        for place, mode in enumerate([*MODES][1:])
    ),
    *(
        write("scatter_nd", place, (4, 2), AGAIN.reshape(4, 1), (4, 2), scatter_nd, mode=mode)
        for place, mode in enumerate([*MODES][1:])
    ),
    *(write("scatter_along_axis", place, (4,), AGAIN, (4,), scatter_along_axis) for place in range(3)),
    *(write("scatter_nd", place, (4,), AGAIN.reshape(4, 1), (4,), scatter_nd) for place in range(3)),
]


@each(JUDGED)
def test_as_defined_and_as_inferred(case: Case, dtype: str) -> None:
    check(case, dtype, judged=True)


@each(ALONE)
def test_as_defined(case: Case, dtype: str) -> None:
    check(case, dtype, judged=False)


def test_what_coremltools_infers_wrongly_is_not_followed() -> None:
    feeds = {"data": np.ones(3, np.float32), "indices": np.array([1], np.int32), "updates": np.full(1, 5, np.float32)}
    judgement = inferred(lambda **x: mb.scatter_along_axis(**x, mode="add"), feeds)
    assert judgement is not None
    agree(judgement, [[1, 5, 1]], "float32")  # whatever the mode, it writes
    agree(interpret(lambda **x: mb.scatter_along_axis(**x, mode="add"), feeds), [[1, 6, 1]], "float32")

    x, indices = np.arange(12, dtype=np.float32).reshape(2, 3, 2), np.array([[1], [0]], np.int32)
    judgement = inferred(
        lambda x, indices: mb.gather(x=x, indices=indices, axis=-1, batch_dims=1), {"x": x, "indices": indices}
    )
    assert judgement is not None
    agree(judgement, [gather(x, indices, -2, 1)], "float32")  # a negative axis moves with the batch dimensions


X = numbers(1, (2, 5))
# The operation, indices of which the largest are allowed, and where one is changed.
BOUNDS: list[tuple[str, list[Any], tuple[int, ...], dict[str, Any]]] = [
    ("gather", [4, 0], (0,), {"axis": 1}),
    ("gather_along_axis", [[1, 0, 1, 0, 1]], (0, 2), {"axis": 0}),
    ("gather_nd", [[1, 4], [0, 0]], (0, 1), {}),
    ("gather_nd", [[4], [0]], (1, 0), {"batch_dims": 1}),
    ("scatter", [4, 0], (0,), {"axis": -1}),
    ("scatter_along_axis", [[4, 0], [1, 2]], (1, 1), {"axis": 1}),
    ("scatter_nd", [[1, 4], [0, 0]], (0, 0), {}),
]


@pytest.mark.parametrize(("op", "allowed", "where", "given"), BOUNDS)
def test_indices_outside_are_refused(
    op: str, allowed: list[Any], where: tuple[int, ...], given: dict[str, Any]
) -> None:
    indices = np.array(allowed, np.int32)
    feeds = {"data" if op.startswith("scatter") else "x": X, "indices": indices}
    if op.startswith("scatter"):
        feeds["updates"] = np.ones(
            {"scatter": (2, 2), "scatter_along_axis": (2, 2), "scatter_nd": (2,)}[op], np.float32
        )

    def run(change: int | None, validate: bool) -> Array:
        if change is not None:
            feeds["indices"] = indices.copy()
            feeds["indices"][where] = change
        return interpret(lambda **v: getattr(mb, op)(**v, **given, validate_indices=validate), feeds, 17)[0]

    np.testing.assert_array_equal(run(None, validate=True), run(None, validate=False))
    for change in (-1, 5):
        with pytest.raises(CheckFailed, match="negative or too large"):
            run(change, validate=True)
    with pytest.raises(CheckFailed):
        run(5, validate=False)
    run(-1, validate=False)  # counts from the end, as the tables above have it


@pytest.mark.parametrize("opset", [15, 16, 17, 18])
@pytest.mark.parametrize(("op", "allowed", "where", "given"), BOUNDS)
def test_negative_indices_count_from_the_end_in_every_version(
    op: str, allowed: list[Any], where: tuple[int, ...], given: dict[str, Any], opset: int
) -> None:
    """One index less the size of its dimension is the same index; less once more it is none."""
    opset = max(opset, 16) if "batch_dims" in given else opset
    indices = np.array(allowed, np.int32)
    size = {"gather_along_axis": 2, "scatter_nd": 2}.get(op, 5)

    def run(less: int) -> Array:
        changed = indices.copy()
        changed[where] -= less
        feeds = {"data" if op.startswith("scatter") else "x": X, "indices": changed}
        if op.startswith("scatter"):
            feeds["updates"] = np.ones((2,) if op == "scatter_nd" else (2, 2), np.float32)
        return interpret(lambda **v: getattr(mb, op)(**v, **given), feeds, opset)[0]

    np.testing.assert_array_equal(run(size), run(0))
    with pytest.raises(CheckFailed):
        run(2 * size)


@pytest.mark.parametrize("mode", MODES)
def test_scattering_leaves_its_source_alone(mode: str) -> None:
    feeds = {"data": np.full((3, 2), 6, np.float32), "indices": np.array([1], np.int32)}
    feeds["updates"] = np.full((1, 2), 3 if mode == "min" else 9, np.float32)

    def build(data: Any, indices: Any, updates: Any) -> Any:
        return mb.scatter(data=data, indices=indices, updates=updates, mode=mode), data

    changed, source = interpret(build, feeds)
    assert (changed[1] != 6).all()
    agree([source], [np.full((3, 2), 6)], "float32")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode average"):
        OPS["scatter"].function(torch.zeros(2), torch.tensor([0]), torch.ones(1), mode="average")


def test_every_operation_is_tested_and_judged_where_it_can_be() -> None:
    assert {case.op for case in JUDGED} == judgeable(FAMILY)
    assert {case.op for case in JUDGED + ALONE} == FAMILY
