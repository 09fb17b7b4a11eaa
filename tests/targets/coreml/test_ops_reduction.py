"""Reductions against their definitions, of integers in Python's own numbers, and against what coremltools infers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from edgeattn.core.numerics import Array
from tests.targets.coreml.cases import NUMBERS, Case, check, defined_in, each
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = defined_in("reduction")
# What each computes of a list of Python's numbers.
REDUCTIONS: dict[str, Callable[[list[Any]], float]] = {
    "reduce_l1_norm": lambda values: sum(map(abs, values)),
    "reduce_l2_norm": lambda values: math.hypot(*values),
    "reduce_log_sum": lambda values: math.log(sum(values)),
    "reduce_log_sum_exp": lambda values: math.log(math.fsum(map(math.exp, values))),
    "reduce_max": max,
    "reduce_mean": lambda values: sum(values) / len(values),
    "reduce_min": min,
    "reduce_prod": math.prod,
    "reduce_sum": sum,
    "reduce_sum_square": lambda values: sum(value * value for value in values),
}
# Shapes and axes; without axes all are reduced.
AXES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((5,), {}),
    ((2, 3), {"axes": [-1]}),
    ((2, 3, 4), {}),
    ((2, 3, 4), {"axes": [-1, 0]}),
    ((2, 1, 2, 1, 2), {"axes": [1, -1, 2]}),
]
KEEP: list[dict[str, Any]] = [{"keep_dims": False}, {"keep_dims": True}]


def positive(shape: tuple[int, ...], dtype: str) -> Array:
    """Numbers from 1 up, of which there is a logarithm."""
    return np.abs(numbers(7, shape, dtype)) + np.ones((), dtype)


def as_int32(value: float) -> int:
    """Cut off towards zero, and counted modulo 2^32."""
    return (math.trunc(value) + 2**31) % 2**32 - 2**31


def reduced(function: Callable[[list[Any]], Any], x: Array, axes: list[int], keep_dims: bool) -> Array:
    """What a function makes of each list of values along the axes."""
    axes = [axis % x.ndim for axis in axes]
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    lists = x.transpose(*kept, *axes).reshape(math.prod(x.shape[axis] for axis in kept), -1).tolist()
    values = [as_int32(function(row)) if x.dtype == np.int32 else function(row) for row in lists]
    sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return np.reshape(values, sizes if keep_dims else [x.shape[axis] for axis in kept])


def along_axes(op: str) -> Callable[..., Array]:
    function = REDUCTIONS[op]
    return lambda x, axes=None, keep_dims=False: reduced(
        function, x, list(range(x.ndim)) if axes is None else axes, keep_dims
    )


def place_of(best: Callable[..., Any]) -> Callable[..., Array]:
    """Index of the number that ``best`` picks."""
    return lambda x, axis=-1, keep_dims=False, output_dtype="int32": reduced(
        lambda values: values.index(best(values)), x, [axis], keep_dims
    )


#: What is fed to each.
FEEDS: dict[str, Callable[[tuple[int, ...], str], Array]] = {
    op: positive if op == "reduce_log_sum" else partial(numbers, 3) for op in REDUCTIONS
}
BEST: dict[str, Callable[..., Any]] = {"reduce_argmax": max, "reduce_argmin": min}
#: All different, so that there is one index only.
MIXED = np.random.default_rng(5).permutation(24).reshape(2, 3, 4) - 9
#: What is longer than an int16 can count.
LONG = np.sin(np.arange(40000, dtype=np.float32) / 25465)
NO_AXES = np.array([], np.int32)


JUDGED = [
    *(
        Case(op, 15, dtype, {"x": feed(shape, dtype)}, {**axes, **keep}, along_axes(op), factor=4)
        for (op, feed), (shape, axes), keep, dtype in product(FEEDS.items(), AXES, KEEP, NUMBERS.split())
    ),
    # coremltools writes no axes too, and means that nothing is reduced.
    *(
        Case(op, 15, "float32", {"x": positive((2, 3), "float32")}, {"axes": NO_AXES}, along_axes(op))
        for op in REDUCTIONS
    ),
    *(Case(op, 15, "float32", {"x": positive((2, 3), "float32")}, {}, along_axes(op)) for op in REDUCTIONS),
    *(
        Case(op, 15, "int32", {"x": np.array([70000, 70001, 3], np.int32)}, {}, along_axes(op))
        for op in ("reduce_prod", "reduce_sum_square")
    ),
    Case("reduce_sum", 15, "int32", {"x": np.array([2**31 - 1, 2], np.int32)}, {}, lambda x: 1 - 2**31),
    Case("reduce_mean", 15, "int32", {"x": np.array([2**31 - 1, 2**31 - 3], np.int32)}, {}, lambda x: 2**31 - 2),
    *(
        Case(op, opset, "float32", {"x": MIXED.astype(dtype)}, {"axis": axis, **keep}, place_of(best))
        for (op, best), opset, dtype, axis, keep in product(BEST.items(), (16, 17), NUMBERS.split(), (0, 1, -1), KEEP)
    ),
    *(Case(op, 15, "float32", {"x": MIXED[0].astype(np.float32)}, {}, place_of(best)) for op, best in BEST.items()),
    *(
        Case(op, 17, "float32", {"x": LONG}, {"output_dtype": dtype}, place_of(best))
        for (op, best), dtype in product(BEST.items(), ("int32", "uint16"))
    ),
]


@each(JUDGED)
def test_as_defined_and_as_inferred(case: Case, dtype: str) -> None:
    check(case, dtype, judged=True)


@each(case for case in JUDGED if case.dtypes == "float16" and case.given["keep_dims"])
def test_float16_in_itself(case: Case, dtype: str) -> None:
    feeds = case.arrays(dtype)
    found = interpret(case.built, feeds, max(16, case.opset), "native")
    agree(found, [case.expected(**feeds, **case.given)], dtype, 8)


def test_large_numbers_have_a_logarithm_of_exponentials() -> None:
    x = np.array([[1000, 1000], [-1000, -1001]], np.float32)
    (found,) = interpret(lambda x: mb.reduce_log_sum_exp(x=x, axes=[1]), {"x": x})
    agree([found], [[1000 + math.log(2), -1000 + math.log1p(math.exp(-1))]], "float32")


def test_everything_that_coremltools_infers_is_judged() -> None:
    assert {case.op for case in JUDGED} == judgeable(FAMILY) == FAMILY
