"""conv, conv_quantized and conv_transpose against sums over windows, element by element."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = ("conv", "conv_quantized", "conv_transpose")
#: coremltools infers no values of convolutions.
JUDGED: list[str] = []

# The shapes of x and weight, then the parameters; biased by turns.
CONV: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 9), (6, 4, 3), {}),
    ((1, 4, 9), (6, 2, 3), {"strides": [2], "groups": 2}),
    ((1, 3, 10), (2, 3, 4), {"pad_type": "same"}),
    ((1, 3, 10), (2, 3, 4), {"pad_type": "same", "strides": [3]}),
    ((1, 3, 11), (2, 3, 3), {"pad_type": "custom", "pad": [2, 0], "dilations": [2]}),
    ((1, 2, 1), (3, 2, 1), {}),
    ((2, 3, 7, 8), (4, 3, 3, 2), {}),
    ((2, 3, 7, 8), (4, 3, 3, 2), {"strides": [2, 3], "dilations": [2, 1]}),
    ((1, 3, 7, 8), (4, 3, 3, 3), {"pad_type": "custom", "pad": [1, 1, 1, 1]}),
    ((1, 3, 7, 8), (4, 3, 3, 3), {"pad_type": "custom", "pad": [0, 3, 2, 1], "strides": [1, 2]}),
    ((1, 6, 5, 5), (6, 1, 3, 3), {"pad_type": "custom", "pad": [1, 1, 1, 1], "groups": 6}),
    ((1, 6, 5, 5), (12, 2, 3, 3), {"pad_type": "same", "groups": 3}),
    ((1, 2, 6, 7), (3, 2, 4, 2), {"pad_type": "same", "strides": [2, 2]}),
    ((1, 2, 6, 7), (3, 2, 3, 3), {"pad_type": "same", "strides": [2, 2], "dilations": [1, 2]}),
    ((1, 2, 6, 7), (3, 2, 1, 1), {"pad_type": "same", "strides": [3, 2]}),
    ((1, 2, 6, 7), (3, 2, 3, 3), {"pad_type": "valid", "pad": [9, 9, 9, 9]}),
    ((1, 2, 4, 5, 6), (3, 2, 2, 3, 2), {}),
    ((1, 2, 4, 5, 6), (4, 1, 2, 3, 3), {"pad_type": "same", "strides": [1, 2, 3], "groups": 2}),
    ((1, 2, 4, 5, 6), (3, 2, 2, 1, 3), {"pad_type": "custom", "pad": [1, 0, 0, 2, 1, 1]}),
]
SAME_LOWER = [
    ((1, 3, 10), (2, 3, 4), {"pad_type": "same_lower", "strides": [3]}),
    ((1, 2, 6, 7), (3, 2, 4, 2), {"pad_type": "same_lower", "strides": [2, 2]}),
    ((1, 2, 4, 5, 6), (3, 2, 2, 3, 2), {"pad_type": "same_lower", "dilations": [1, 2, 1]}),
]
# (x, weight [C_in, C_out / groups, *K], parameters)
TRANSPOSE: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 5), (3, 4, 3), {}),
    ((1, 4, 5), (4, 3, 4), {"strides": [2], "groups": 2}),
    ((1, 3, 5), (3, 2, 3), {"pad_type": "same", "strides": [2]}),
    ((1, 3, 5), (3, 2, 2), {"pad_type": "same", "strides": [3]}),
    ((1, 3, 5), (3, 2, 4), {"pad_type": "custom", "pad": [2, 1], "dilations": [2]}),
    ((1, 3, 5), (3, 2, 4), {"pad_type": "custom", "pad": [0, 1], "strides": [2], "output_shape": [1, 2, 12]}),
    ((2, 3, 4, 5), (3, 4, 3, 2), {}),
    ((1, 3, 4, 5), (3, 4, 3, 3), {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2]}),
    ((1, 3, 4, 5), (3, 4, 3, 3), {"pad_type": "custom", "pad": [2, 0, 0, 1], "strides": [2, 1]}),
    ((1, 4, 4, 5), (4, 1, 3, 3), {"pad_type": "same", "strides": [2, 1], "groups": 4}),
    ((1, 3, 4, 5), (3, 2, 4, 5), {"pad_type": "same", "strides": [2, 3]}),
    ((1, 3, 4, 5), (3, 2, 4, 3), {"pad_type": "same", "strides": [2, 2], "output_shape": [1, 2, 7, 10]}),
    ((1, 3, 4, 5), (3, 2, 3, 3), {"strides": [2, 3], "output_shape": [1, 2, 10, 17]}),
    ((1, 2, 3, 2, 4), (2, 3, 2, 3, 2), {"strides": [1, 2, 2]}),
    ((1, 2, 3, 2, 4), (2, 3, 2, 3, 2), {"pad_type": "same", "strides": [1, 2, 2]}),
]


def before(pad_type: str, pad: list[int] | None, size: int, width: int, stride: int, axis: int) -> tuple[int, int]:
    """Padding at the beginning, and outputs, of one dimension; by the text of Core ML's NeuralNetwork.proto."""
    if pad_type.startswith("same"):
        out = int(np.ceil(size / stride))
        total = max(0, (out - 1) * stride + width - size)
        return (total // 2 if pad_type == "same" else total - total // 2), out
    begin, end = (pad[2 * axis], pad[2 * axis + 1]) if pad_type == "custom" and pad else (0, 0)
    return begin, int(np.floor((size + begin + end - width) / stride)) + 1


def places(sizes: Any, kernel: Any, parameters: dict[str, Any]) -> tuple[list[int], list[tuple[Any, Any, Any]]]:
    """Sizes of the output, and every (output, tap of the kernel, input) that meet."""
    strides = parameters.get("strides", [1] * len(sizes))
    dilations = parameters.get("dilations", [1] * len(sizes))
    pad_type = parameters.get("pad_type", "valid")
    ends = [
        before(pad_type, parameters.get("pad"), size, (kernel[i] - 1) * dilations[i] + 1, strides[i], i)
        for i, size in enumerate(sizes)
    ]
    met = []
    for out in product(*(range(count) for _, count in ends)):
        for tap in product(*(range(width) for width in kernel)):
            at = tuple(o * s + t * d - e for o, s, t, d, (e, _) in zip(out, strides, tap, dilations, ends, strict=True))
            if all(0 <= a < size for a, size in zip(at, sizes, strict=True)):
                met.append((out, tap, at))
    return [count for _, count in ends], met


def summed(x: Array, weight: Array, bias: Array | None, parameters: dict[str, Any]) -> Array:
    """Convolution, tap by tap, in float64."""
    groups, channels = parameters.get("groups", 1), weight.shape[0]
    out, met = places(x.shape[2:], weight.shape[2:], parameters)
    made = np.zeros((x.shape[0], channels, *out))
    if bias is not None:
        made += bias.reshape(-1, *([1] * len(out)))
    for o, tap, at in met:
        for g in range(groups):
            rows = slice(g * channels // groups, (g + 1) * channels // groups)
            columns = slice(g * x.shape[1] // groups, (g + 1) * x.shape[1] // groups)
            given = x[(slice(None), columns, *at)].astype(np.float64)
            made[(slice(None), rows, *o)] += given @ weight[(rows, slice(None), *tap)].astype(np.float64).T
    return made


def scattered(x: Array, weight: Array, bias: Array | None, sizes: Any, parameters: dict[str, Any]) -> Array:
    """The gradient of the convolution that leads from those sizes to x: it gives back, tap by tap."""
    groups, channels = parameters.get("groups", 1), weight.shape[1]
    out, met = places(sizes, weight.shape[2:], parameters)
    assert tuple(out) == x.shape[2:]
    made = np.zeros((x.shape[0], channels * groups, *sizes))
    if bias is not None:
        made += bias.reshape(-1, *([1] * len(out)))
    for o, tap, at in met:
        for g in range(groups):
            rows = slice(g * x.shape[1] // groups, (g + 1) * x.shape[1] // groups)
            given = x[(slice(None), rows, *o)].astype(np.float64)
            made[(slice(None), slice(g * channels, (g + 1) * channels), *at)] += given @ weight[
                (rows, slice(None), *tap)
            ].astype(np.float64)
    return made


@pytest.mark.parametrize(
    ("index", "dtype", "opset"),
    [(i, "float32", 15) for i in range(len(CONV))]
    + [(i, "float16", 16 + i % 3) for i in range(0, len(CONV), 2)]
    + [(-1 - i, "float32", 16 + i) for i in range(len(SAME_LOWER))],
)
def test_conv(index: int, dtype: str, opset: int) -> None:
    shape, kernel, parameters = CONV[index] if index >= 0 else SAME_LOWER[-1 - index]
    x, weight = numbers(index + 9, shape, dtype), numbers(index + 99, kernel, dtype)
    bias = numbers(index + 999, kernel[:1], dtype) if index % 2 else None
    found = interpret(lambda x: mb.conv(x=x, weight=weight, bias=bias, **parameters), {"x": x}, opset)
    agree(found, [summed(x, weight, bias, parameters)], dtype)


@pytest.mark.parametrize("case", [CONV[0], CONV[6], CONV[9], CONV[11], CONV[16]])
def test_the_weights_of_a_convolution_can_be_computed(case: Any) -> None:
    shape, kernel, parameters = case
    feeds = {"x": numbers(1, shape), "weight": numbers(2, kernel), "bias": numbers(3, kernel[:1])}
    found = interpret(lambda x, weight, bias: mb.conv(x=x, weight=weight, bias=bias, **parameters), feeds, 17)
    agree(found, [summed(*feeds.values(), parameters)], "float32")


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), [("float32", "float16"), ("float16", "float32")])
@pytest.mark.parametrize("mode", ["fp32acc", "fp32", "native"])
def test_weights_have_another_type_from_ios17_on(x_dtype: str, weight_dtype: str, mode: str) -> None:
    x, weight, bias = numbers(1, (1, 3, 6, 6), x_dtype), numbers(2, (2, 3, 3, 3), weight_dtype), np.float32([1, 2])
    bias = bias.astype(weight_dtype)
    found = interpret(lambda x: mb.conv(x=x, weight=weight, bias=bias), {"x": x}, 17, mode)
    assert found[0].dtype == x_dtype
    agree(found, [summed(x, weight, bias, {})], x_dtype, 4 if mode == "native" else 1)
    back = numbers(4, (3, 2, 3, 3), weight_dtype)
    found = interpret(lambda x: mb.conv_transpose(x=x, weight=back, bias=bias), {"x": x}, 17, mode)
    agree(found, [scattered(x, back, bias, (8, 8), {})], x_dtype, 4 if mode == "native" else 1)


@pytest.mark.parametrize("across", [(), (1,), (4,)])
def test_conv_quantized(across: tuple[int, ...]) -> None:
    x, weight = numbers(1, (1, 3, 6, 7)), numbers(2, (4, 3, 3, 2), "uint8")
    scale, offset = np.abs(numbers(3, across)) + np.float32(0.1), numbers(4, across)
    parameters = {"pad_type": "same", "strides": [2, 1]}
    bias = numbers(5, (4,), "uint8") if across else None
    given = {"quantization_type": "linear", "nbits": 4, "quant_scale": scale, "quant_bias": offset, "bias": bias}
    found = interpret(lambda x: mb.conv_quantized(x=x, weight=weight, **given, **parameters), {"x": x})
    each = (-1, 1, 1, 1)
    dense = weight.astype(np.float64) * scale.reshape(each) + offset.reshape(each)
    agree(found, [summed(x, dense, bias, parameters)], "float32")


def test_conv_quantized_with_a_table_is_refused() -> None:
    given = {"quantization_type": "lut", "quant_scale": np.float32(1), "quant_bias": np.float32(0)}
    weight = numbers(2, (4, 3, 3, 2), "uint8")
    with pytest.raises(CheckFailed, match="quantization_type lut"):
        interpret(
            lambda x: mb.conv_quantized(x=x, weight=weight, pad_type="valid", **given), {"x": numbers(1, (1, 3, 6, 7))}
        )


@pytest.mark.parametrize(
    ("index", "dtype", "opset"),
    [(i, "float32", 15 if i % 2 else 18) for i in range(len(TRANSPOSE))]
    + [(i, "float16", 17) for i in range(0, len(TRANSPOSE), 3)],
)
def test_conv_transpose(index: int, dtype: str, opset: int) -> None:
    shape, kernel, parameters = TRANSPOSE[index]
    x, weight = numbers(index, shape, dtype), numbers(index + 99, kernel, dtype)
    bias = numbers(index + 999, [kernel[1] * parameters.get("groups", 1)], dtype) if index % 2 else None
    declared: list[tuple[int, ...]] = []

    def build(x: Any) -> Any:
        made = mb.conv_transpose(x=x, weight=weight, bias=bias, **parameters)
        declared.append(made.shape)
        return made

    found = interpret(build, {"x": x}, opset)
    agree(found, [scattered(x, weight, bias, declared[0][2:], parameters)], dtype)


@pytest.mark.parametrize(
    "parameters",
    [
        {"output_shape": [1, 2, 4, 4]},
        {"pad_type": "same", "strides": [2, 2], "output_shape": [1, 2, 9, 8]},
        {"pad_type": "custom", "pad": [1, 1, 1, 1], "output_shape": [1, 2, 5, 4]},
    ],
)
def test_an_output_shape_that_no_convolution_leads_back_from_is_refused(parameters: dict[str, Any]) -> None:
    x, weight = numbers(1, (1, 3, 4, 4)), numbers(2, (3, 2, 3, 3))
    with pytest.raises(CheckFailed, match="conv_transpose of pad_type"):
        interpret(lambda x: mb.conv_transpose(x=x, weight=weight, **parameters), {"x": x})


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == set(JUDGED)
