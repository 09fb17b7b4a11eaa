"""Activations against their definitions in float64, and against what coremltools infers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from edgeattn.core.numerics import Array
from tests.targets.coreml.cases import FLOATS, Case, check, defined_in, each
from tests.targets.coreml.harness import Build, interpret, mb, types
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = defined_in("activation")
SHAPES: list[tuple[int, ...]] = [(7,), (1, 2, 3, 2, 2)]
erf = np.vectorize(math.erf)


def channels(values: Any, x: Array) -> Array:
    """One number a channel, of each place in x."""
    index = np.indices(x.shape)[1]
    return np.asarray(values, np.float64)[index]


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of float64."""
    return lambda x, **given: function(x.astype(np.float64), **given)


def typed(op: str, dtype: type | None = None) -> Build:
    """The operation with its parameters in a dtype; without one, in that of x."""

    def build(x: Any, **given: Any) -> Any:
        own = dtype or types.nptype_from_builtin(x.dtype)
        return getattr(mb, op)(x=x, **{name: np.asarray(value, own) for name, value in given.items()})

    return build


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Its three formulas as MIL defines them."""
    if mode == "EXACT":
        return x * (1 + erf(x / 2**0.5)) / 2
    if mode == "TANH_APPROXIMATION":
        return x / (1 + np.exp(-2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-1.702 * x))


def softmax(x: Array, axis: int = -1) -> Array:
    """Exponentials over their sum."""
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


PLAIN: dict[str, Callable[[Array], Any]] = {
    "relu": lambda x: x * (x > 0),
    "relu6": lambda x: np.sort([x, x * 0, x * 0 + 6], 0)[1],
    "sigmoid": lambda x: (1 + np.tanh(x / 2)) / 2,
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: np.sign(x) * (1 - 1 / (1 + np.abs(x))),
}
# What each computes with its parameters, and which are tried: those that float16 holds exactly.
PARAMETRIC: dict[str, tuple[Callable[..., Any], list[dict[str, float]]]] = {
    "elu": (lambda x, alpha: np.where(x > 0, x, alpha * (np.exp(x) - 1)), [{"alpha": 1}, {"alpha": 0.3125}]),
    "leaky_relu": (
        lambda x, alpha: np.where(x >= 0, x, alpha * x),
        [{"alpha": 0}, {"alpha": 2**-7}, {"alpha": 2}, {"alpha": -0.5}],
    ),
    "thresholded_relu": (lambda x, alpha: np.where(x >= alpha, x, 0), [{"alpha": 1}, {"alpha": 0}, {"alpha": -0.5}]),
    "clamped_relu": (
        lambda x, alpha, beta: np.where(x >= 0, np.minimum(beta, x), np.minimum(beta, alpha * x)),
        [{"alpha": 0.125, "beta": 1}, {"alpha": 0, "beta": 6}, {"alpha": -2, "beta": 0.5}],
    ),
    "linear_activation": (
        lambda x, alpha, beta: alpha * x + beta,
        [{"alpha": 2, "beta": -1}, {"alpha": -0.375, "beta": 0}],
    ),
    "scaled_tanh": (
        lambda x, alpha, beta: alpha * (1 - 2 / (np.exp(2 * beta * x) + 1)),
        [{"alpha": 1.75, "beta": 0.625}, {"alpha": -1, "beta": 2}],
    ),
    "sigmoid_hard": (
        lambda x, alpha, beta: np.sort([x * alpha + beta, x * 0, x * 0 + 1], 0)[1],
        [{"alpha": 0.1875, "beta": 0.5}, {"alpha": 1, "beta": 0}, {"alpha": -0.5, "beta": 0.25}],
    ),
}
#: The dtypes of x and of the parameters; before iOS17 they are the same.
MIXED = [("float16", np.float32), ("float32", np.float16)]
SLOPES = [0.25, -0.5, 2.0]


def prelu(x: Array, alpha: Any) -> Array:
    """Negative numbers times the slope of their channel."""
    return np.where(x > 0, x, x * channels(alpha, x))


def softplus_parametric(x: Array, alpha: Any, beta: Any) -> Array:
    """alpha log(1 + e^(beta x)), by channel."""
    return channels(alpha, x) * np.log1p(np.exp(channels(beta, x) * x))


BY_CHANNEL: list[tuple[str, Callable[..., Any], tuple[int, ...], dict[str, list[float]]]] = [
    ("prelu", prelu, (2, 3, 4, 2), {"alpha": SLOPES}),
    ("prelu", prelu, (1, 1, 2, 2), {"alpha": [0.5]}),
    # Of another rank than 4 only one slope for all channels is allowed.
    ("prelu", prelu, (2, 3, 4), {"alpha": [0.25] * 3}),
    ("prelu", prelu, (2, 3, 2, 1, 2), {"alpha": [-0.25] * 3}),
    ("softplus_parametric", softplus_parametric, (2, 3, 4, 2), {"alpha": SLOPES, "beta": [1, 0.5, -2]}),
    ("softplus_parametric", softplus_parametric, (2, 3, 4), {"alpha": [1, 2, 3], "beta": SLOPES}),
    ("softplus_parametric", softplus_parametric, (1, 2, 3, 1, 2), {"alpha": [1, 0.5], "beta": [-1, 3]}),
]
SOFTMAX: list[tuple[tuple[int, ...], dict[str, int]]] = [
    ((5,), {}),
    ((2, 3), {"axis": 0}),
    ((2, 3, 4), {"axis": 1}),
    ((2, 3, 4), {"axis": -1}),
    ((1, 2, 3, 4), {"axis": -3}),
]
GELUS = [{}, *({"mode": mode} for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"))]

JUDGED = [
    *(
        Case(op, 15, FLOATS, {"x": shape}, {}, exact(function), factor=2)
        for (op, function), shape in product(PLAIN.items(), SHAPES)
    ),
    *(
        Case("relu6", 16, dtype, {"x": np.array([-7, -1, 0, 0.5, 6, 7], dtype)}, {}, lambda x: [0, 0, 0, 0.5, 6, 6])
        for dtype in FLOATS.split()
    ),
    *(Case("softmax", 15, FLOATS, {"x": shape}, axis, exact(softmax), factor=2) for shape, axis in SOFTMAX),
    *(Case("gelu", 15, FLOATS, {"x": s}, mode, exact(gelu), factor=4) for s, mode in product(SHAPES, GELUS)),
    *(
        Case(op, opset, FLOATS, {"x": shape}, given, exact(function), typed(op), factor=2)
        for op, (function, tried) in PARAMETRIC.items()
        for given, (shape, opset) in product(tried, zip(SHAPES, (15, 17), strict=True))
    ),
    *(
        Case(op, 17, x, {"x": (2, 3, 4)}, given, exact(function), typed(op, own), factor=2)
        for op, (function, tried) in PARAMETRIC.items()
        for given, (x, own) in product(tried, MIXED)
    ),
    *(
        Case(op, opset, FLOATS, {"x": shape}, given, exact(function), typed(op), factor=4)
        for (op, function, shape, given), opset in product(BY_CHANNEL, (15, 17))
    ),
    *(
        Case(op, 17, x, {"x": shape}, given, exact(function), typed(op, own), factor=4)
        for (op, function, shape, given), (x, own) in product(BY_CHANNEL, MIXED)
    ),
]
#: What coremltools infers no values of; and where it is not asked, as thresholded_relu changes its own feed there.
ALONE = [
    *(Case("silu", 15, FLOATS, {"x": shape}, {}, exact(lambda x: x / (1 + np.exp(-x)))) for shape in SHAPES),
    *(
        Case(
            "thresholded_relu",
            16,
            dtype,
            {"x": np.array([-1, 0.5, 1, 1.5], dtype)},
            {"alpha": 1.0},
            lambda x, alpha: [0, 0, 1, 1.5],
            typed("thresholded_relu"),
        )
        for dtype in FLOATS.split()
    ),
    *(
        Case(op, 15, "float32", {"x": np.array([-100, -30, 19.5, 20.5, 100], np.float32)}, {}, exact(function))
        for op, function in [("softplus", PLAIN["softplus"]), ("sigmoid", PLAIN["sigmoid"])]
    ),
    Case("softmax", 15, "float32", {"x": np.array([1e4, 1e4, -1e4], np.float32)}, {}, lambda x: [0.5, 0.5, 0]),
]


@each(JUDGED)
def test_as_defined_and_as_inferred(case: Case, dtype: str) -> None:
    check(case, dtype, judged=True)


@each(ALONE)
def test_as_defined(case: Case, dtype: str) -> None:
    check(case, dtype, judged=False)


NATIVE = [
    case
    for case in JUDGED
    if case.dtypes == "float16" or (case.dtypes == FLOATS and case.op in (*PLAIN, "gelu", "softmax"))
]


@each(replace(case, dtypes="float16") for case in NATIVE)
def test_float16_in_itself(case: Case, dtype: str) -> None:
    feeds = case.arrays(dtype)
    found = interpret(case.built, feeds, max(16, case.opset), "native")
    agree(found, [case.expected(**feeds, **case.given)], dtype, 4)


def test_the_formulas_of_gelu_differ() -> None:
    x = {"x": numbers(1, (64,))}
    made = [interpret(lambda x, mode=mode: mb.gelu(x=x, **mode), x)[0] for mode in GELUS]
    np.testing.assert_array_equal(made[0], made[1])
    assert 1e-5 < np.abs(made[2] - made[1]).max() < 1e-3 < np.abs(made[3] - made[1]).max()


def test_as_pytorch_has_them() -> None:
    x = numbers(3, (2, 3, 4, 5))
    torch_x = torch.from_numpy(x)
    pairs = {
        "gelu": torch.nn.GELU(),
        "silu": torch.nn.SiLU(),
        "softplus": torch.nn.Softplus(),
        "softsign": torch.nn.Softsign(),
        "relu6": torch.nn.ReLU6(),
    }
    for op, module in pairs.items():
        agree(interpret(getattr(mb, op), {"x": x}), [module(torch_x).numpy()], "float32")


def test_everything_that_coremltools_infers_is_judged() -> None:
    assert {case.op for case in JUDGED} == judgeable(FAMILY)
    assert {case.op for case in JUDGED + ALONE} == FAMILY
