"""avg_pool, l2_pool and max_pool against their definitions, window by window."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers
from tests.targets.coreml.test_ops_conv import before

FAMILY = ("avg_pool", "l2_pool", "max_pool")
#: coremltools infers no values of poolings.
JUDGED: list[str] = []

# The shape of x, the window, and the other parameters.
PLAIN: list[tuple[tuple[int, ...], list[int], dict[str, Any]]] = [
    ((2, 3, 9), [3], {"pad_type": "valid"}),
    ((2, 3, 9), [4], {"pad_type": "same", "strides": [2]}),
    ((2, 3, 9), [2], {"pad_type": "custom", "pad": [1, 0], "strides": [3]}),
    ((1, 2, 7, 8), [3, 2], {"pad_type": "valid", "strides": [2, 1]}),
    ((1, 2, 7, 8), [3, 3], {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [2, 2]}),
    ((1, 2, 7, 8), [2, 3], {"pad_type": "custom", "pad": [1, 1, 2, 2]}),
    ((1, 2, 7, 8), [3, 3], {"pad_type": "custom", "pad": [0, 2, 1, 0], "strides": [1, 2]}),
    ((1, 2, 7, 8), [4, 3], {"pad_type": "same", "strides": [2, 3]}),
    ((1, 2, 7, 8), [7, 8], {"pad_type": "valid"}),
    ((1, 2, 7, 8), [3, 3], {"pad_type": "SAME"}),
]
LOWER: list[tuple[tuple[int, ...], list[int], dict[str, Any]]] = [
    ((2, 3, 9), [4], {"pad_type": "same_lower", "strides": [2]}),
    ((1, 2, 7, 8), [2, 4], {"pad_type": "same_lower", "strides": [1, 3]}),
]
CEIL: list[tuple[tuple[int, ...], list[int], dict[str, Any]]] = [
    ((2, 3, 8), [3], {"pad_type": "valid", "strides": [3]}),
    ((2, 3, 8), [2], {"pad_type": "custom", "pad": [1, 1], "strides": [3]}),
    ((1, 2, 7, 6), [2, 2], {"pad_type": "valid", "strides": [2, 2]}),
    ((1, 2, 7, 8), [3, 3], {"pad_type": "custom", "pad": [1, 1, 1, 1], "strides": [3, 2]}),
    ((1, 2, 7, 8), [2, 3], {"pad_type": "custom", "pad": [1, 1, 0, 0], "strides": [5, 3]}),
]
DEEP: list[tuple[tuple[int, ...], list[int], dict[str, Any]]] = [
    ((1, 2, 4, 5, 6), [2, 3, 2], {"pad_type": "valid", "strides": [2, 1, 2]}),
    ((1, 2, 4, 5, 6), [2, 3, 3], {"pad_type": "same", "strides": [1, 2, 3]}),
    ((1, 2, 4, 5, 6), [2, 3, 2], {"pad_type": "custom", "pad": [1, 0, 1, 1, 0, 0]}),
]
CASES = [*PLAIN, *DEEP, *LOWER, *((*case[:2], {**case[2], "ceil_mode": True}) for case in CEIL)]
FIRST_LOWER = len(PLAIN) + len(DEEP)


def windowed(kind: str, x: Array, kernel: list[int], parameters: dict[str, Any], out: tuple[int, ...]) -> Array:
    """Pooling with outputs of that size, from what each window sees of x."""
    sizes, x = x.shape[2:], x.astype(np.float64)
    strides = parameters.get("strides", [1] * len(kernel))
    pad_type = parameters["pad_type"].lower()
    begins = [
        before(pad_type, parameters.get("pad"), size, kernel[i], strides[i], i)[0] for i, size in enumerate(sizes)
    ]
    made = np.zeros((*x.shape[:2], *out))
    for o in product(*map(range, out)):
        cut = [
            slice(max(a * s - b, 0), max(a * s - b + k, 0))
            for a, s, b, k in zip(o, strides, begins, kernel, strict=True)
        ]
        seen = x[(slice(None), slice(None), *cut)].reshape(*x.shape[:2], -1)
        made[(slice(None), slice(None), *o)] = {
            "max_pool": lambda seen=seen: seen.max(-1),
            "l2_pool": lambda seen=seen: np.sqrt((seen**2).sum(-1)),
            "avg_pool": lambda seen=seen: seen.sum(-1) / np.prod(kernel),
            "exclusive": lambda seen=seen: seen.mean(-1),
        }[kind]()
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_poolings(index: int, dtype: str) -> None:
    shape, kernel, parameters = CASES[index]
    opset = 16 + index % 3 if dtype == "float16" or FIRST_LOWER <= index < FIRST_LOWER + len(LOWER) else 15
    x = numbers(index, shape, dtype)
    kinds = ["avg_pool", "exclusive", "max_pool", *(["l2_pool"] if len(shape) < 5 else [])]
    declared: list[tuple[int, ...]] = []

    def build(x: Any) -> Any:
        given = {"x": x, "kernel_sizes": kernel, **parameters}
        made = [
            mb.avg_pool(**given, exclude_padding_from_average=True)
            if kind == "exclusive"
            else getattr(mb, kind)(**given)
            for kind in kinds
        ]
        declared.extend(item.shape for item in made)
        return made

    found = interpret(build, {"x": x}, opset)
    expected = [windowed(kind, x, kernel, parameters, shape[2:]) for kind, shape in zip(kinds, declared, strict=True)]
    agree(found, expected, dtype, 2)


@pytest.mark.parametrize(
    ("case", "ceil_mode"),
    [*((case, ceil) for case in (PLAIN[0], PLAIN[3], PLAIN[4]) for ceil in (False, True)), (DEEP[0], False)],
)
def test_pytorch_agrees_where_no_average_counts_an_overhang(case: Any, ceil_mode: bool) -> None:
    shape, kernel, parameters = case
    x, pad = numbers(1, shape), parameters.get("pad", [0] * 6)[::2][: len(kernel)]
    rank = len(kernel)
    given = {"kernel_size": kernel, "stride": parameters.get("strides", 1), "padding": pad, "ceil_mode": ceil_mode}
    layers = [
        getattr(torch.nn, f"MaxPool{rank}d")(**given),
        getattr(torch.nn, f"AvgPool{rank}d")(**given, count_include_pad=False),
    ]
    found = interpret(
        lambda x: [
            mb.max_pool(x=x, kernel_sizes=kernel, ceil_mode=ceil_mode, **parameters),
            mb.avg_pool(x=x, kernel_sizes=kernel, ceil_mode=ceil_mode, exclude_padding_from_average=True, **parameters),
        ],
        {"x": x},
    )
    agree(found, [layer(torch.from_numpy(x)).numpy() for layer in layers], "float32")


def test_an_average_divides_by_the_overhang_other_than_in_pytorch() -> None:
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    found = interpret(
        lambda x: mb.avg_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True), {"x": x}
    )
    agree(found, [[[[[2.0, 7 / 4], [13 / 4, 8 / 4]]]]], "float32")
    torchs = torch.nn.functional.avg_pool2d(torch.from_numpy(x), 2, 2, ceil_mode=True)
    agree([torchs.numpy()], [[[[[2.0, 3.5], [6.5, 8.0]]]]], "float32")


def test_a_last_window_without_any_element_stays_other_than_in_pytorch() -> None:
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    given = {"kernel_sizes": [2], "strides": [5], "pad_type": "valid", "ceil_mode": True}
    found = interpret(lambda x: [mb.avg_pool(x=x, **given), mb.max_pool(x=x, **given)], {"x": x})
    agree(found, [[[[0.5, 0.0]]], [[[1.0, -np.inf]]]], "float32")
    assert torch.nn.functional.max_pool1d(torch.from_numpy(x), 2, 5, ceil_mode=True).shape == (1, 1, 1)


def test_an_unknown_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_type full"):
        OPS["max_pool"].function(torch.zeros(1, 1, 4), (2,), "full")


def test_all_that_coremltools_infers_is_judged() -> None:
    assert judgeable(FAMILY) == set(JUDGED)
