"""Normalizations against their formulas in float64, PyTorch, and coremltools' own inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import inferred, interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = ("batch_norm", "instance_norm", "l2_norm", "layer_norm", "local_response_norm")

# Shape of x, axes, whether there are gamma and beta, epsilon.
LAYER: list[tuple[tuple[int, ...], list[int], bool, float]] = [
    ((3, 8), [-1], True, 1e-5),
    ((2, 3, 8), [2], True, 1e-6),
    ((2, 3, 8), [0, 1, 2], False, 1e-5),
    ((2, 3, 4), [1], True, 1e-5),
    ((2, 3, 4, 5), [2, 3], True, 1e-3),
    ((2, 3, 4, 5), [1], True, 1e-6),
    ((2, 3, 4, 5), [-3, -1], True, 1e-5),
    ((2, 3, 4, 5), [3, 0], True, 1e-5),
    ((2, 3, 4, 5), [0, 1, 2, 3], True, 1e-1),
    ((2, 1, 3, 2, 2), [1, 2], True, 1e-5),
    ((7,), [0], True, 1e-5),
]
L2 = [((2, 3, 4), 1e-6), ((2, 3, 4, 5), 1e-2), ((2, 3, 1, 4, 5), 1e-6)]
#: Cases whose results coremltools infers too.
JUDGED: list[tuple[str, Any]] = [*(("layer_norm", case) for case in LAYER), *(("l2_norm", case) for case in L2)]

CHANNELS = [(2, 3, 5), (2, 3, 4, 5), (1, 3, 2, 3, 4)]


def scaled(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """x less its mean, over its deviation; in float64."""
    x = x.astype(np.float64)
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)


def over_channels(value: Array, rank: int) -> Array:
    return value.astype(np.float64).reshape(1, -1, *([1] * (rank - 2)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", LAYER)
def test_layer_norm(case: Any, dtype: str) -> None:
    shape, axes, affine, epsilon = case
    x = numbers(1, shape, dtype) * np.dtype(dtype).type(3) + np.dtype(dtype).type(1)
    chosen = sorted(axis % len(shape) for axis in axes)
    sizes = [shape[axis] for axis in chosen]
    gamma, beta = (numbers(2, sizes, dtype), numbers(3, sizes, dtype)) if affine else (None, None)

    def build(x: Any) -> Any:
        return mb.layer_norm(x=x, axes=axes, gamma=gamma, beta=beta, epsilon=np.dtype(dtype).type(epsilon))

    expected = scaled(x, tuple(chosen), float(np.dtype(dtype).type(epsilon)))
    if gamma is not None and beta is not None:
        at = [size if axis in chosen else 1 for axis, size in enumerate(shape)]
        expected = expected * gamma.reshape(at).astype(np.float64) + beta.reshape(at)
    found = interpret(build, {"x": x}, 18 if dtype == "float16" else 15)
    agree(found, [expected], dtype, 2)
    judged = inferred(build, {"x": x}, 18 if dtype == "float16" else 15)
    assert judged is not None
    agree(found, judged, dtype, 8)


def test_layer_norm_without_axes_goes_over_all() -> None:
    # coremltools' builder fails on its own default here.
    x = numbers(1, (2, 3, 8))
    agree([OPS["layer_norm"].function(torch.from_numpy(x)).numpy()], [scaled(x, (0, 1, 2), 1e-5)], "float32", 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", L2)
def test_l2_norm(case: Any, dtype: str) -> None:
    shape, epsilon = case
    x = numbers(1, shape, dtype)

    def build(x: Any) -> Any:
        return mb.l2_norm(x=x, epsilon=np.dtype(dtype).type(epsilon))

    wide = x.astype(np.float64)
    lengths = np.linalg.norm(wide.reshape(*shape[:-3], -1), axis=-1)[..., None, None, None]
    found = interpret(build, {"x": x}, 17)
    agree(found, [wide / np.sqrt(lengths**2 + float(np.dtype(dtype).type(epsilon)))], dtype)
    judged = inferred(build, {"x": x}, 17)
    assert judged is not None
    agree(found, judged, dtype, 4)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "opset"), [("float32", 15), ("float16", 16), ("float16", 18)])
@pytest.mark.parametrize("shape", CHANNELS)
def test_batch_norm(shape: tuple[int, ...], dtype: str, opset: int, affine: bool) -> None:
    x, mean, gamma, beta = (numbers(i, s, dtype) for i, s in enumerate((shape, (3,), (3,), (3,))))
    variance = np.abs(numbers(5, (3,), dtype))
    given = {"gamma": gamma, "beta": beta, "epsilon": np.dtype(dtype).type(1e-3)} if affine else {}
    found = interpret(lambda x: mb.batch_norm(x=x, mean=mean, variance=variance, **given), {"x": x}, opset)
    rank = len(shape)
    expected = x - over_channels(mean, rank)
    expected /= np.sqrt(over_channels(variance, rank) + float(np.dtype(dtype).type(1e-3 if affine else 1e-5)))
    if affine:
        expected = expected * over_channels(gamma, rank) + over_channels(beta, rank)
    agree(found, [expected], dtype, 2)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "opset"), [("float32", 15), ("float16", 16), ("float16", 18)])
@pytest.mark.parametrize("shape", [*CHANNELS[:2], (2, 3, 1, 1)])
def test_instance_norm(shape: tuple[int, ...], dtype: str, opset: int, affine: bool) -> None:
    x, gamma, beta = numbers(1, shape, dtype), numbers(2, (3,), dtype), numbers(3, (3,), dtype)
    given = {"gamma": gamma, "beta": beta} if affine else {"epsilon": np.dtype(dtype).type(1e-2)}
    found = interpret(lambda x: mb.instance_norm(x=x, **given), {"x": x}, opset)
    expected = scaled(x, tuple(range(2, len(shape))), float(np.dtype(dtype).type(1e-5 if affine else 1e-2)))
    if affine:
        expected = expected * over_channels(gamma, len(shape)) + over_channels(beta, len(shape))
    agree(found, [expected], dtype, 2)


@pytest.mark.parametrize("mode", ["fp32acc", "fp32", "native"])
@pytest.mark.parametrize(("dtype", "other"), [("float16", "float32"), ("float32", "float16")])
def test_parameters_have_another_type_from_ios17_on(dtype: str, other: str, mode: str) -> None:
    x, (mean, gamma, beta) = numbers(1, (2, 3, 4), dtype), (numbers(i, (3,), other) for i in range(2, 5))
    variance, epsilon = np.abs(numbers(5, (3,), other)), np.dtype(other).type(1e-3)
    common = {"gamma": gamma, "beta": beta, "epsilon": epsilon}
    found = interpret(
        lambda x: [
            mb.batch_norm(x=x, mean=mean, variance=variance, **common),
            mb.instance_norm(x=x, **common),
            mb.layer_norm(x=x, axes=[1], **common),
            mb.l2_norm(x=x, epsilon=epsilon),
            mb.local_response_norm(x=x, size=1, alpha=np.dtype(other).type(0.5)),
        ],
        {"x": x},
        17,
        mode,
    )
    wide, small = x.astype(np.float64), float(epsilon)
    scale, offset = over_channels(gamma, 3), over_channels(beta, 3)
    expected = [
        (wide - over_channels(mean, 3)) / np.sqrt(over_channels(variance, 3) + small) * scale + offset,
        scaled(x, (2,), small) * scale + offset,
        scaled(x, (1,), small) * scale + offset,
        wide / np.sqrt((wide**2).sum() + small),
        wide / (1 + 0.5 * wide**2) ** 0.75,
    ]
    agree(found, expected, dtype, 4 if mode == "native" else 2)


@pytest.mark.parametrize(("dtype", "opset"), [("float32", 15), ("float16", 17)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("alpha", "beta", "k"), [(0.3, 0.75, 1.0), (1.5, 1.0, 2.0)])
def test_local_response_norm(size: int, alpha: float, beta: float, k: float, dtype: str, opset: int) -> None:
    x, kind = numbers(size, (2, 6, 3, 4), dtype), np.dtype(dtype).type
    found = interpret(
        lambda x: mb.local_response_norm(x=x, size=size, alpha=kind(alpha), beta=kind(beta), k=kind(k)), {"x": x}, opset
    )
    wide = x.astype(np.float64)
    sums = np.stack([(wide[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1] ** 2).sum(1) for c in range(6)], axis=1)
    agree(found, [wide / (float(kind(k)) + float(kind(alpha)) / size * sums) ** float(kind(beta))], dtype)
    layer = torch.nn.LocalResponseNorm(size, float(kind(alpha)), float(kind(beta)), float(kind(k)))
    agree(found, [layer(torch.from_numpy(x).float()).numpy()], dtype)


def test_local_response_norm_of_rank_3_goes_along_the_first_axis_other_than_in_pytorch() -> None:
    x = numbers(1, (3, 4, 5))
    found = interpret(lambda x: mb.local_response_norm(x=x, size=3, alpha=np.float32(1)), {"x": x})
    agree(found, [torch.nn.LocalResponseNorm(3, 1.0)(torch.from_numpy(x)[None])[0].numpy()], "float32")


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == {name for name, _ in JUDGED}
