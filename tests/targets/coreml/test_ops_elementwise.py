"""Arithmetic, comparison, logic, functions of one number, casts and selection against NumPy's and Python's numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from tests.targets.coreml.cases import ALL, FLOATS, NUMBERS, Case, check, defined_in, each, like
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = defined_in("elementwise_unary") | defined_in("elementwise_binary") | {"select"}
SHAPES: list[tuple[int, ...]] = [(7,), (1, 2, 3, 2, 2)]
#: Operands that broadcast.
PAIRS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5,), (5,)),
    ((2, 1, 4), (3, 1)),
    ((1, 2, 3, 1, 2), (2, 1, 4, 1)),
]
# What each computes of float64, and from where to where it is fed.
UNARY: dict[str, tuple[Callable[[Array], Any], float, float]] = {
    "abs": (lambda x: np.where(x < 0, -x, x), -9, 9),
    "acos": (np.arccos, -1, 1),
    "asin": (np.arcsin, -1, 1),
    "atan": (np.arctan, -9, 9),
    "atanh": (lambda x: np.log((1 + x) / (1 - x)) / 2, -0.9, 0.9),
    "ceil": (np.ceil, -9, 9),
    "cos": (np.cos, -9, 9),
    "cosh": (lambda x: (np.exp(x) + np.exp(-x)) / 2, -4, 4),
    "erf": (np.vectorize(math.erf), -3, 3),
    "exp": (np.exp, -5, 5),
    "exp2": (lambda x: np.float64(2) ** x, -5, 5),
    "floor": (np.floor, -9, 9),
    "round": (np.vectorize(round), -9, 9),
    "sign": (lambda x: (x > 0) * 1.0 - (x < 0), -9, 9),
    "sin": (np.sin, -9, 9),
    "sinh": (lambda x: (np.exp(x) - np.exp(-x)) / 2, -4, 4),
    "sqrt": (np.sqrt, 0, 9),
    "square": (lambda x: x * x, -9, 9),
    "tan": (lambda x: np.sin(x) / np.cos(x), -1.4, 1.4),
    "tanh": (lambda x: 1 - 2 / (np.exp(2 * x) + 1), -5, 5),
}
# What each gives at -inf, -0.0, 0.0 and inf.
EDGES: dict[str, list[float]] = {
    "abs": [math.inf, 0, 0, math.inf],
    "atan": [-math.pi / 2, 0, 0, math.pi / 2],
    "erf": [-1, 0, 0, 1],
    "exp": [0, 1, 1, math.inf],
    "sign": [-1, 0, 0, 1],
    "sqrt": [math.nan, 0, 0, math.inf],
    "tanh": [-1, 0, 0, 1],
}
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "maximum": lambda x, y: np.where(x > y, x, y),
    "minimum": lambda x, y: np.where(x > y, y, x),
}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "equal": operator.eq,
    "not_equal": operator.ne,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
}
LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "logical_and": lambda x, y: x & y,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
}
#: Python rounds quotients of integers down, as MIL does.
DIVISIONS: dict[str, Callable[[Any, Any], Any]] = {
    "floor_div": np.vectorize(lambda x, y: math.floor(x / y), otypes=[float]),
    "mod": np.vectorize(lambda x, y: x - y * math.floor(x / y), otypes=[float]),
}


def digits(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Whole numbers from -9 to 9 in a dtype."""
    return numbers(seed, shape, "int32").astype(dtype)


def spread(seed: int, shape: tuple[int, ...], dtype: str, low: float, high: float) -> Array:
    """Numbers from low to high."""
    return np.random.default_rng(seed).uniform(low, high, shape).astype(dtype)


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float64; ``y`` may be a parameter."""
    return lambda **given: function(*(np.asarray(value, np.float64) for value in given.values()))


def wrapped(value: float, dtype: str) -> Any:
    """A number as a cast brings it to a dtype of MIL: cut off towards zero, counted modulo the size of the type."""
    if dtype in ("fp16", "fp32"):
        with np.errstate(over="ignore"):
            return {"fp16": np.float16, "fp32": np.float32}[dtype](value)
    if dtype == "bool":
        return value != 0
    bits = int(dtype.lstrip("uint"))
    low = 0 if dtype[0] == "u" else -(2 ** (bits - 1))
    return (int(value) - low) % 2**bits + low


OLD_TYPES = ("fp16", "fp32", "int32", "bool")
SIGNED = (*OLD_TYPES, "int8", "int16")
TYPES = (*SIGNED, "uint8", "uint16")
# opset, the type of what is cast, what it holds, and to what it is cast. A negative float has no unsigned value.
CASTS: list[tuple[int, str, list[float], tuple[str, ...]]] = [
    *((15, source, [-2.75, -0.5, 0, 0.25, 1.875, 100.5], OLD_TYPES) for source in ("fp32", "fp16")),
    (15, "int32", [-70000, -3, 0, 1, 123456], OLD_TYPES),
    (15, "bool", [0, 1], OLD_TYPES),
    *((17, source, [-2.75, -0.5, 0, 0.25, 1.875, 100.5], SIGNED) for source in ("fp32", "fp16")),
    *((17, source, [0, 0.25, 1.875, 100.5], TYPES) for source in ("fp32", "fp16")),
    (18, "int32", [-70000, -300, -1, 0, 1, 200, 40000, 70000], TYPES),
    (17, "int16", [-32768, -300, 0, 1, 200, 32767], TYPES),
    (17, "uint16", [0, 1, 200, 40000, 65535], TYPES),
    (17, "int8", [-128, -1, 0, 1, 127], TYPES),
    (17, "uint8", [0, 1, 127, 128, 255], TYPES),
    (17, "bool", [0, 1], TYPES),
]


def casted(source: str, targets: tuple[str, ...]) -> Callable[..., Any]:
    return lambda x: [mb.cast(x=mb.cast(x=x, dtype=source), dtype=target) for target in targets]


def typed(op: str) -> Callable[..., Any]:
    """The operation with its parameters in the type of its first operand."""
    return lambda x, **given: getattr(mb, op)(x=x, **{name: like(x, value) for name, value in given.items()})


def clipped(x: Array, alpha: float, beta: float) -> list[float]:
    return [min(max(value, alpha), beta) for value in x.tolist()]


def selected(cond: Array, a: Array, b: Array) -> Array:
    """a where cond is 1, else b."""
    return cond * a.astype(np.float64) + (1 - cond) * b.astype(np.float64)


#: Epsilon's own dtype matters since iOS17 only.
EPSILON = {
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "log": lambda x, epsilon=0.0: np.log(x + epsilon),
    "rsqrt": lambda x, epsilon=0.0: (x + epsilon) ** -0.5,
}

#: NumPy, with which coremltools infers, gives 0.9985 for tanh(inf) in float16 on CPUs that compute in it.
INEXACT = ("tanh", "float16")


def edge(op: str, dtype: str) -> Case:
    """An operation at the ends of what there is, and on both sides of 0."""
    return Case(op, 16, dtype, {"x": np.array([-math.inf, -0.0, 0, math.inf], dtype)}, {}, lambda x: EDGES[op])


JUDGED = [
    *(
        Case(op, 15, dtype, {"x": spread(1, shape, dtype, low, high)}, {}, exact(function), factor=2)
        for (op, (function, low, high)), shape, dtype in product(UNARY.items(), SHAPES, FLOATS.split())
    ),
    *(edge(op, dtype) for op, dtype in product(EDGES, FLOATS.split()) if (op, dtype) != INEXACT),
    *(
        Case("round", 16, dtype, {"x": np.arange(-3.5, 4, 1, dtype)}, {}, lambda x: [-4, -2, -2, 0, 0, 2, 2, 4])
        for dtype in FLOATS.split()
    ),
    *(Case(op, 15, "int32", {"x": (4, 5)}, {}, exact(UNARY[op][0])) for op in ("abs", "sign", "square")),
    Case("exp2", 15, "int32", {"x": np.arange(31, dtype=np.int32)}, {}, lambda x: [2**i for i in range(31)]),
    Case("square", 15, "int32", {"x": np.array([70000], np.int32)}, {}, lambda x: [wrapped(70000**2, "int32")]),
    *(
        Case(op, opset, dtype, {"x": spread(1, (2, 3), dtype, 0.5, 4)}, given, exact(EPSILON[op]), typed(op))
        for op, opset, given, dtype in product(EPSILON, (15, 17), ({}, {"epsilon": 0.25}), FLOATS.split())
    ),
    *(
        Case(op, 17, dtype, {"x": spread(1, (2, 3), dtype, 0.5, 4)}, {"epsilon": epsilon(0.125)}, exact(EPSILON[op]))
        for op, (dtype, epsilon) in product(EPSILON, [("float16", np.float32), ("float32", np.float16)])
    ),
    *(
        Case(op, opset, "float32", {"x": np.zeros(3, np.float32)}, {}, lambda x, value=value: [value] * 3)
        for (op, value), opset in product({"inverse": 1e4, "log": -103.278929903, "rsqrt": 1e6}.items(), (15, 17))
    ),
    Case("log", 16, "float16", {"x": np.zeros(3, np.float16)}, {}, lambda x: [-math.inf] * 3),
    *(Case("logical_not", 15, "bool", {"x": digits(3, s, "int32") > 0}, {}, lambda x: x ^ True) for s in SHAPES),
    *(
        Case(op, 15, NUMBERS, {"x": a, "y": b}, {}, exact(function))
        for (op, function), (a, b) in product(ARITHMETIC.items(), PAIRS)
    ),
    *(
        Case(op, 15, NUMBERS, {"x": (2, 3)}, {"y": -3}, exact(function), typed(op))
        for op, function in ARITHMETIC.items()
    ),
    Case(
        "add",
        15,
        "int32",
        {n: np.array([v], np.int32) for n, v in [("x", 2**31 - 1), ("y", 1)]},
        {},
        lambda x, y: [-(2**31)],
    ),
    *(
        Case(op, 15, dtype, {"x": digits(1, a, dtype), "y": digits(2, b, dtype)}, {}, exact(function))
        for (op, function), (a, b), dtype in product(COMPARISONS.items(), PAIRS, NUMBERS.split())
    ),
    *(
        Case(op, 15, "bool", {"x": digits(1, a, "int32") > 0, "y": digits(2, b, "int32") > 0}, {}, function)
        for (op, function), (a, b) in product(LOGIC.items(), PAIRS)
    ),
    *(
        Case(op, 15, dtype, {"x": digits(1, a, dtype), "y": 2 * digits(2, b, dtype) + 1}, {}, exact(function))
        for (op, function), (a, b), dtype in product(DIVISIONS.items(), PAIRS, NUMBERS.split())
    ),
    *(
        Case(op, 15, dtype, {"x": spread(1, a, dtype, -9, 9), "y": spread(2, b, dtype, 1, 4)}, {}, exact(function))
        for (op, function), (a, b), dtype in product(
            {**DIVISIONS, "real_div": np.divide}.items(), PAIRS, FLOATS.split()
        )
    ),
    *(
        Case("pow", 15, dtype, {"x": spread(1, a, dtype, 0.5, 2), "y": spread(2, b, dtype, -3, 3)}, {}, exact(np.power))
        for (a, b), dtype in product(PAIRS, FLOATS.split())
    ),
    *(
        Case("pow", 15, dtype, {"x": spread(1, (2, 3), dtype, low, 2)}, {"y": y}, exact(np.power), typed("pow"))
        for (low, y), dtype in product([(-2, 2), (-2, 3), (0.5, -1), (0, 0.5), (0.5, -0.5), (-2, 0)], FLOATS.split())
    ),
    Case("pow", 15, "int32", {"x": digits(1, (2, 9), "int32"), "y": np.arange(9, dtype=np.int32)}, {}, exact(np.power)),
    *(
        Case("clip", opset, FLOATS, {"x": (9,)}, {"alpha": a, "beta": b}, clipped, typed("clip"))
        for opset, (a, b) in product((15, 17), [(-0.5, 0.25), (0.0, 6.0), (-math.inf, 1.0)])
    ),
    # iOS17 refuses limits that contradict each other.
    Case("clip", 15, FLOATS, {"x": (4,)}, {"alpha": 1, "beta": -1}, lambda x, alpha, beta: [-1] * 4, typed("clip")),
    *(
        Case(
            "threshold",
            15,
            NUMBERS,
            {"x": shape},
            {"alpha": alpha},
            lambda x, alpha: x * (x > alpha) + alpha * (x <= alpha),
            typed("threshold"),
        )
        for shape, alpha in [((9,), 2), ((2, 3, 4), -1), ((2, 3), 0)]
    ),
    *(
        Case("select", 15, ALL, {"cond": digits(4, c, "int32") > 0, "a": a, "b": b}, {}, selected)
        for c, a, b in [
            ((6,), (6,), (6,)),
            ((2, 3), (3,), (2, 1)),
            ((1, 3, 1), (2, 1, 4), (3, 1)),
            ((4, 3), (1,), (3,)),
        ]
    ),
    *(
        Case(
            "cast",
            opset,
            "float32",
            {"x": np.array(held, np.float32 if source.startswith("fp") else np.int32)},
            {},
            lambda x, source=source, targets=targets: tuple(
                np.array([wrapped(wrapped(value, source), target) for value in x.tolist()], np.float64)
                for target in targets
            ),
            casted(source, targets),
        )
        for opset, source, held, targets in CASTS
    ),
    Case(
        "real_div",
        15,
        "int32",
        {"x": np.array([7, -7, 7, -7, 2**24 + 1], np.int32), "y": np.array([2, 2, -2, -2, 1], np.int32)},
        {},
        lambda x, y: [3, -3, -3, 3, 2**24 + 1],
    ),
    Case("exp2", 15, "int32", {"x": np.array([-3, -1, 0], np.int32)}, {}, lambda x: [0, 0, 1]),
]
#: NumPy, with which coremltools infers, refuses negative powers of integers.
ALONE = [
    edge(*INEXACT),
    Case(
        "pow",
        15,
        "int32",
        {"x": np.array([2, 1, -1, -1, -3], np.int32), "y": np.array([-1, -5, -3, -2, -1], np.int32)},
        {},
        lambda x, y: [0, 1, -1, 1, 0],
    ),
]


@each(JUDGED)
def test_as_defined_and_as_inferred(case: Case, dtype: str) -> None:
    check(case, dtype, judged=True)


@each(ALONE)
def test_as_defined(case: Case, dtype: str) -> None:
    check(case, dtype, judged=False)


@each(case for case in JUDGED if case.dtypes == "float16" and case.op in {*UNARY, *EPSILON})
def test_float16_in_itself(case: Case, dtype: str) -> None:
    feeds = case.arrays(dtype)
    found = interpret(case.built, feeds, max(16, case.opset), "native")
    agree(found, [case.expected(**feeds, **case.given)], dtype, 4)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("fp32", np.float32(1 / (1 + 2**-11))),
        ("fp32acc", np.float16(1 / (1 + 2**-11))),
        ("native", np.float16(1)),  # 1 + 2^-11 has no float16
    ],
)
def test_where_each_mode_rounds(mode: str, wanted: Any) -> None:
    def build(x: Any) -> Any:
        return mb.cast(x=mb.inverse(x=x, epsilon=np.float16(2**-11)), dtype="fp32")

    (found,) = interpret(build, {"x": np.ones(1, np.float16)}, mode=mode)
    assert found.dtype == np.float32
    assert found[0] == np.float32(wanted)


@pytest.mark.parametrize("op", ["real_div", "floor_div", "mod"])
def test_integers_are_not_divided_by_zero(op: str) -> None:
    feeds = {"x": np.array([1, 2], np.int32), "y": np.array([1, 0], np.int32)}
    with pytest.raises(CheckFailed, match=op):
        interpret(getattr(mb, op), feeds)


def test_everything_that_coremltools_infers_is_judged() -> None:
    assert {case.op for case in JUDGED} == judgeable(FAMILY)
    assert {case.op for case in JUDGED + ALONE} == FAMILY
