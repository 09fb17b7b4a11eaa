"""Resizing and sampling of images, against the documentation's formulas, NumPy's interpolation and PyTorch."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.cases import FLOATS, NUMBERS, Case, check, defined_in, each
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, judgeable, numbers

FAMILY = defined_in("image_resizing")
#: Tested in a file of their own.
SAMPLED = {"affine", "crop_resize", "resample"}
#: coremltools infers no values of any of them.
JUDGED: list[Case] = []
MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")


def grid(size: float, count: int, mode: str) -> list[float]:
    """Points of sampling, as the documentation of ``resize_bilinear`` writes them."""
    if mode == "ALIGN_CORNERS" and count == 1:
        return [(size - 1) / 2]
    first = 0.0
    gaps = count - 1 if count > 1 else 1  # with one point there is no spacing
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        spacing = (size - 1) / gaps
    elif mode == "DEFAULT":
        spacing = (size - size / count) / gaps
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        spacing, first = ((count - 1) * delta) / gaps, 0.5 * delta
    else:
        spacing = size / count
        first = 0.5 * spacing - 0.5
    return [min(size - 1, max(0, first + i * spacing)) for i in range(count)]


def linear(x: Array, points: list[list[float]]) -> Array:
    """The last dimensions interpolated at points, one after the other."""
    x = x.astype(np.float64)
    for axis, given in enumerate(points, x.ndim - len(points)):
        x = np.apply_along_axis(lambda row, given=given: np.interp(given, range(len(row)), row), axis, x)
    return x


def resize_bilinear(
    x: Array, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Array:
    sizes = (target_size_height, target_size_width)
    return linear(x, [grid(old, new, sampling_mode) for old, new in zip(x.shape[-2:], sizes, strict=True)])


def upsample_bilinear(
    x: Array,
    scale_factor_height: float,
    scale_factor_width: float,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Array:
    height, width = (
        int(np.float32(f) * n) for f, n in zip((scale_factor_height, scale_factor_width), x.shape[-2:], strict=True)
    )
    if align_corners:
        return resize_bilinear(x, height, width, "STRICT_ALIGN_CORNERS")
    return resize_bilinear(x, height, width, "DEFAULT" if half_pixel_centers is False else "UNALIGN_CORNERS")


def nearest(x: Array, sizes: tuple[int, ...], half_pixel: bool) -> Array:
    """Pixel floor(i * size / count), or that of i + 1/2, counted in whole numbers."""
    for axis, count in enumerate(sizes, x.ndim - len(sizes)):
        size = x.shape[axis]
        x = np.take(x, [(2 * i + half_pixel) * size // (2 * count) for i in range(count)], axis)
    return x


def upsample_nearest_neighbor(x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Array:
    height, width = (
        int(np.float32(f) * n) for f, n in zip((scale_factor_height, scale_factor_width), x.shape[-2:], strict=True)
    )
    return nearest(x, (height, width), False)


def resize(
    x: Array, shape: Any, resized_dims: int, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> Array:
    own = x.shape[x.ndim - int(resized_dims) :]
    sizes = tuple(new or old for new, old in zip(list(shape)[-int(resized_dims) :], own, strict=True))
    if interpolation_mode == "LINEAR":
        made = linear(x, [grid(old, new, sampling_mode) for old, new in zip(own, sizes, strict=True)])
        return np.trunc(made) if x.dtype.kind == "i" else made
    return nearest(x, sizes, True)


SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((2, 3, 5), 6, 7),
    ((1, 2, 4, 3), 1, 8),
    ((1, 2, 6, 7), 3, 1),
    ((2, 1, 1, 3, 4), 3, 9),
    ((1, 1, 5, 1), 5, 4),
]
SCALES: list[tuple[tuple[int, ...], float, float]] = [
    ((1, 2, 3, 4), 2, 3),
    ((2, 3, 5), 2.5, 0.5),
    ((1, 2, 6, 5), 0.75, 1.3),
    ((1, 1, 3, 2), (10 + 1e-4) / 3, 1.0),
    ((1, 1, 2, 1, 3), 1.0, 2.6),
]


def scales(height: float, width: float) -> dict[str, Any]:
    kind = np.int32 if height == int(height) and width == int(width) else np.float32
    return {"scale_factor_height": kind(height), "scale_factor_width": kind(width)}


WIDE = np.uint32
ALONE = [
    *(
        Case(
            "resize_bilinear",
            15,
            FLOATS,
            {"x": s},
            {"target_size_height": h, "target_size_width": w, "sampling_mode": mode},
            resize_bilinear,
            factor=4,
        )
        for (s, h, w), mode in product(SHAPES, MODES)
    ),
    Case("resize_bilinear", 15, FLOATS, {"x": (1, 2, 3, 4)}, {}, resize_bilinear),
    *(
        Case("upsample_bilinear", 16, FLOATS, {"x": s}, {**scales(h, w), **flags}, upsample_bilinear, factor=4)
        for (s, h, w), flags in product(
            SCALES,
            [
                {},
                {"align_corners": False},
                {"align_corners": False, "half_pixel_centers": False},
                {"half_pixel_centers": False},
            ],
        )
    ),
    Case(
        "upsample_bilinear",
        15,
        "float32",
        {"x": (1, 2, 3, 4)},
        {**scales(2, 2), "align_corners": False},
        upsample_bilinear,
        factor=4,
    ),
    *(
        Case("upsample_nearest_neighbor", 15, FLOATS, {"x": s}, scales(h, w), upsample_nearest_neighbor)
        for s, h, w in SCALES
    ),
    Case("upsample_nearest_neighbor", 15, FLOATS, {"x": (1, 2, 3)}, {}, upsample_nearest_neighbor),
    *(
        Case(
            "resize_nearest_neighbor",
            15,
            FLOATS,
            {"x": s},
            {"target_size_height": h, "target_size_width": w},
            lambda x, target_size_height, target_size_width: nearest(x, (target_size_height, target_size_width), True),
        )
        for s, h, w in SHAPES
    ),
    *(
        Case(
            "resize",
            17 + place % 2,
            FLOATS,
            {"x": s},
            {"shape": shape, "resized_dims": WIDE(n), "sampling_mode": mode},
            resize,
            factor=4,
        )
        for place, ((s, shape, n), mode) in enumerate(
            product(
                [((2, 3, 4), [5], 1), ((2, 3, 4), [9, 5, 6], 2), ((1, 2, 3, 4), [4, 0, 7], 3), ((3, 4), [1, 0], 2)],
                MODES,
            )
        )
    ),
    *(
        Case(
            "resize",
            17,
            NUMBERS,
            {"x": s},
            {"shape": shape, "resized_dims": WIDE(n), "interpolation_mode": "NEAREST_NEIGHBOR", **mode},
            resize,
        )
        for (s, shape, n), mode in product(
            [((2, 3, 4), [6, 3], 2), ((1, 2, 3, 5), [0, 7], 2), ((4, 3), [9], 1)],
            [{}, {"sampling_mode": "UNALIGN_CORNERS"}],
        )
    ),
    Case(
        "resize",
        17,
        "int32",
        {"x": (2, 3, 5)},
        {"shape": [5, 9], "resized_dims": WIDE(2), "sampling_mode": "ALIGN_CORNERS"},
        resize,
    ),
    Case(
        "resize",
        18,
        FLOATS,
        {"x": (2, 3, 4), "shape": np.array([1, 5, 0], np.int32)},
        {"resized_dims": WIDE(2)},
        resize,
        factor=4,
    ),
    *(
        Case(
            "crop",
            15,
            FLOATS,
            {"x": s},
            {"crop_height": h, "crop_width": w},
            lambda x, crop_height, crop_width: np.take(
                np.take(x, range(crop_height[0], x.shape[-2] - crop_height[1]), -2),
                range(crop_width[0], x.shape[-1] - crop_width[1]),
                -1,
            ),
        )
        for s, h, w in [((1, 1, 4, 4), [0, 1], [1, 1]), ((2, 5, 6), [2, 2], [0, 0]), ((1, 2, 3, 4, 5), [0, 2], [3, 1])]
    ),
]


@each(ALONE)
def test_as_defined(case: Case, dtype: str) -> None:
    check(case, dtype, judged=False)


@pytest.mark.parametrize(
    ("count", "mode", "points"),
    [
        (5, "UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
        (5, "STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
        (5, "ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
        (5, "DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
        (5, "OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
        (6, "UNALIGN_CORNERS", [0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0]),
        (6, "STRICT_ALIGN_CORNERS", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (6, "DEFAULT", [0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0]),
        (6, "OFFSET_CORNERS", [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12]),
    ],
)
def test_the_documented_points(count: int, mode: str, points: list[float]) -> None:
    x = np.array([[[0, 1]]], np.float32)
    found = interpret(
        lambda x: mb.resize_bilinear(x=x, target_size_height=1, target_size_width=count, sampling_mode=mode), {"x": x}
    )
    agree(found, [[[points]]], "float32")


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    ("shape", "sizes", "mode"), [((2, 3, 7), [4], "linear"), ((1, 2, 3, 4, 5), [5, 2, 9], "trilinear")]
)
def test_pytorch_resizes_one_and_three_dimensions_the_same_way(
    shape: tuple[int, ...], sizes: list[int], mode: str, aligned: bool
) -> None:
    x = numbers(1, shape)
    sampling = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS"
    found = interpret(
        lambda x: mb.resize(x=x, shape=sizes, resized_dims=WIDE(len(sizes)), sampling_mode=sampling), {"x": x}
    )
    agree(found, [F.interpolate(torch.from_numpy(x), sizes, mode=mode, align_corners=aligned).numpy()], "float32", 4)


@pytest.mark.parametrize("sampling", ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "OFFSET_CORNERS"])
def test_the_nearest_pixel_of_other_samplings(sampling: str) -> None:
    x = numbers(1, (1, 4, 6))
    given = {
        "shape": [6, 4],
        "resized_dims": WIDE(2),
        "interpolation_mode": "NEAREST_NEIGHBOR",
        "sampling_mode": sampling,
    }
    found = interpret(lambda x: mb.resize(x=x, **given), {"x": x})
    rows, columns = (
        [min(range(size), key=lambda i, point=point: (abs(i - point), -i)) for point in grid(size, count, sampling)]
        for size, count in ((4, 6), (6, 4))
    )
    agree(found, [x[:, rows][:, :, columns]], "float32")


def test_corners_and_half_pixels_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        OPS["upsample_bilinear"].function(torch.zeros(1, 1, 2, 2), 2, 2, True, True)


def test_every_operation_is_tested_and_judged_where_it_can_be() -> None:
    assert judgeable(FAMILY) == {case.op for case in JUDGED}
    assert {case.op for case in ALONE} | SAMPLED == FAMILY
