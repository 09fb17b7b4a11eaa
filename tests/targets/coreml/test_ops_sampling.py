"""crop_resize, resample and affine, point by point on padded images, and against PyTorch where it has the same."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeattn.core.numerics import Array
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import interpret, mb
from tests.targets.coreml.judging import agree, numbers
from tests.targets.coreml.test_ops_resize import MODES, grid

#: How NumPy pads an image as ``padding_mode`` says.
PADDINGS = {"constant": "constant", "border": "edge", "reflection": "reflect", "symmetric": "symmetric"}
MARGIN = 40


def at(image: Array, y: float, x: float) -> Array:
    """An image [C, H, W] interpolated at a point inside of it."""
    rows = [[np.interp(x, range(image.shape[2]), row) for row in channel] for channel in image]
    return np.array([np.interp(y, range(image.shape[1]), row) for row in rows])


def typed(dtype: str, value: float) -> Any:
    return np.dtype(dtype).type(value)


# ---- crop_resize

#: Corners (y, x, y, x) in an image of 6 x 7 pixels: inside; one row; the whole; turned round; partly and all outside;
#: within a pixel.
BOXES = np.array(
    [
        [1, 2, 4, 5.5],
        [2, 1, 2, 6],
        [0, 0, 5, 6],
        [4.25, 5, 0.5, 1],
        [3, -1.5, 7.25, 4],
        [-4, 2, -1, 3],
        [1.25, 2, 1.75, 2.25],
    ]
)
IMAGE_OF_BOX = np.array([1, 0, 2, 2, 1, 0, 1], np.int32)
SIZE = np.array([6, 7])


def crop_resize(x: Array, boxes: Array, images: Array, sizes: tuple[int, int], mode: str, pad_value: float) -> Array:
    """Point by point, [N, C, h, w]."""
    made = np.full((len(boxes), x.shape[1], *sizes), pad_value, np.float64)
    for n, (box, image) in enumerate(zip(boxes, images, strict=True)):
        ys, xs = (
            [a + np.sign(b - a) * p for p in grid(abs(b - a) + 1, count, mode)]
            for a, b, count in zip(box[:2], box[2:], sizes, strict=True)
        )
        for (i, y), (j, z) in product(enumerate(ys), enumerate(xs)):
            if 0 <= y <= x.shape[2] - 1 and 0 <= z <= x.shape[3] - 1:
                made[n, :, i, j] = at(x[image].astype(np.float64), y, z)
    return made


def written(boxes: Array, mode: str, normalized: bool, scale: float) -> Array:
    """Corners as ``crop_resize`` is to be given them."""
    one, other = (boxes[:, :2], boxes[:, 2:])
    if normalized:
        one, other = one / (SIZE - 1), other / (SIZE - 1)
    if mode.startswith("CENTER"):
        one, other = (one + other) / 2, other - one
    if mode.endswith("WIDTH_FIRST"):
        one, other = one[:, ::-1], other[:, ::-1]
    return np.concatenate([one, other], 1) / scale


COORDINATES = ["CORNERS_HEIGHT_FIRST", "CORNERS_WIDTH_FIRST", "CENTER_SIZE_HEIGHT_FIRST", "CENTER_SIZE_WIDTH_FIRST"]
# How boxes are written, whether normalized, times what, how sampled, to which size.
CROPS = [
    (coordinates, bool(place % 2), (1.0, 0.5, 4.0)[place % 3], mode, ((3, 4), (1, 2), (2, 1), (5, 5))[place % 4])
    for place, (mode, coordinates) in enumerate(product(MODES, COORDINATES))
]


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(("coordinates", "normalized", "scale", "mode", "sizes"), CROPS)
def test_crop_resize(
    coordinates: str, normalized: bool, scale: float, mode: str, sizes: tuple[int, int], boxed: bool
) -> None:
    opset = (17 if boxed else 15) + (sizes[0] > 1)
    x = numbers(1, (3, 2, *SIZE))
    boxes = written(BOXES, coordinates, normalized, scale).astype(np.float32)
    pad_value = 0.0 if opset == 15 else 3.5
    given: dict[str, Any] = {
        "target_height": sizes[0],
        "target_width": sizes[1],
        "normalized_coordinates": normalized,
        "spatial_scale": scale,
        "box_coordinate_mode": coordinates,
        "sampling_mode": mode,
        **({} if opset == 15 else {"pad_value": np.float32(pad_value)}),
    }
    if boxed:
        feeds = {"x": x, "boxes": boxes, "box_indices": IMAGE_OF_BOX}
        expected = crop_resize(x, BOXES, IMAGE_OF_BOX, sizes, mode, pad_value)
    else:
        feeds = {"x": x, "roi": boxes.reshape(-1, 1, 4, 1, 1)}
        expected = np.stack([crop_resize(x, BOXES, [n] * len(BOXES), sizes, mode, pad_value) for n in range(3)], 1)
    agree(interpret(lambda **v: mb.crop_resize(**v, **given), feeds, opset), [expected], "float32", 20)


@pytest.mark.parametrize("opset", [15, 16])
def test_crop_resize_with_the_image_in_the_box(opset: int) -> None:
    x = numbers(1, (3, 2, *SIZE))
    roi = np.concatenate([IMAGE_OF_BOX[:, None], BOXES], 1).astype(np.float32).reshape(-1, 1, 5, 1, 1)
    found = interpret(
        lambda x, roi: mb.crop_resize(x=x, roi=roi, target_height=3, target_width=2), {"x": x, "roi": roi}, opset
    )
    agree(found, [crop_resize(x, BOXES, IMAGE_OF_BOX, (3, 2), "DEFAULT", 0.0)[:, None]], "float32", 20)


def test_crop_resize_takes_the_nth_image_for_the_nth_box() -> None:
    x, boxes = numbers(1, (3, 2, *SIZE), "float16"), BOXES[:2].astype(np.float16)
    found = interpret(lambda x, boxes: mb.crop_resize(x=x, boxes=boxes, target_height=2), {"x": x, "boxes": boxes}, 17)
    agree(found, [crop_resize(x, BOXES[:2], [0, 1], (2, 1), "DEFAULT", 0.0)], "float16")


def test_a_box_up_to_the_border_does_not_reach_beyond_it_by_rounding() -> None:
    boxes = np.random.default_rng(1).uniform(0, 1, (60, 4)) * [5, 6, 5, 6]
    boxes[:30, 2:], boxes[30:, :2] = (5, 6), 0
    given = {"target_height": 7, "target_width": 6, "box_coordinate_mode": COORDINATES[2], "pad_value": np.float32(100)}
    found = interpret(
        lambda x, boxes: mb.crop_resize(
            x=x, boxes=boxes, box_indices=np.zeros(60, np.int32), sampling_mode="ALIGN_CORNERS", **given
        ),
        {"x": np.ones((1, 1, *SIZE), np.float32), "boxes": written(boxes, COORDINATES[2], False, 1).astype(np.float32)},
        17,
    )
    agree(found, [np.ones((60, 1, 7, 6))], "float32")


def test_crop_resize_as_devices_do_it() -> None:
    # Boxes and results: coremltools' tests, which compare with devices; TensorFlow's crop_and_resize gives the same.
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
    boxes = np.array([[0.1, 0.3, 1.3, 1.0], [0.5, 1.8, 1.0, 0.3], [0.0, 0.4, 0.6, 0.7]], np.float32)
    found = interpret(
        lambda x, boxes: mb.crop_resize(
            x=x,
            boxes=boxes,
            box_indices=np.zeros(3, np.int32),
            target_height=2,
            target_width=2,
            normalized_coordinates=True,
            sampling_mode="ALIGN_CORNERS",
            pad_value=np.float32(10),
        ),
        {"x": x, "boxes": boxes},
        17,
    )
    expected = np.array([3.1, 5.2, 10, 10, 10, 7.9, 10, 13.9, 2.2, 3.1, 9.4, 10.3]).reshape(3, 1, 2, 2)
    agree(found, [expected], "float32")


# ---- resample


def pixel(c: Array, size: int, mode: str, aligned: bool) -> Array:
    """Coordinates as places of pixels."""
    if mode == "unnormalized":
        return c
    low, high = (0, size - 1) if aligned else (-0.5, size - 0.5)
    share = c if mode == "normalized_zero_to_one" else (c + 1) / 2
    return low + share * (high - low)


def resample(x: Array, ys: Array, xs: Array, sampling: str, padding: str, value: float) -> Array:
    """Point by point on widely padded images; ``ys`` and ``xs`` are [B, h, w]."""
    pads = [(0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)]
    filled = {"constant_values": value} if padding == "constant" else {}
    wide = np.pad(x.astype(np.float64), pads, PADDINGS[padding], **filled)  # type: ignore[call-overload]
    made = np.zeros((len(x), x.shape[1], *ys.shape[1:]))
    for n, i, j in np.ndindex(ys.shape):
        y, z = ys[n, i, j] + MARGIN, xs[n, i, j] + MARGIN
        made[n, :, i, j] = wide[n, :, round(y), round(z)] if sampling == "nearest" else at(wide[n], y, z)
    return made


RESAMPLES = list(
    product(
        ["bilinear", "nearest"],
        PADDINGS,
        ["unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one"],
        [False, True],
    )
)


@pytest.mark.parametrize(("sampling", "padding", "coordinates_mode", "aligned"), RESAMPLES)
def test_resample(sampling: str, padding: str, coordinates_mode: str, aligned: bool) -> None:
    dtype = "float16" if len(sampling + padding + coordinates_mode) % 3 == 0 else "float32"
    x = numbers(1, (2, 3, 4, 5), dtype)
    rng = np.random.default_rng(len(padding))
    reach = 9.0 if coordinates_mode == "unnormalized" else 2.5
    coordinates = rng.uniform(-reach, reach, (2, 3, 4, 2)).astype(np.float32)
    given = {
        "sampling_mode": sampling,
        "padding_mode": padding,
        "padding_value": typed(dtype, 1.5),
        "coordinates_mode": coordinates_mode,
        "align_corners": aligned,
    }
    found = interpret(
        lambda x, coordinates: mb.resample(x=x, coordinates=coordinates, **given),
        {"x": x, "coordinates": coordinates},
        16,
    )
    ys, xs = (
        pixel(coordinates[..., axis].astype(np.float64), size, coordinates_mode, aligned)
        for axis, size in ((1, 4), (0, 5))
    )
    agree(found, [resample(x, ys, xs, sampling, padding, 1.5)], dtype, 2)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
def test_pytorch_samples_grids_the_same_way(sampling: str, padding: str, aligned: bool) -> None:
    x = numbers(1, (2, 3, 6, 5))
    coordinates = np.random.default_rng(3).uniform(-2, 2, (2, 4, 3, 2)).astype(np.float32)
    named = {"zeros": "constant", "border": "border", "reflection": "reflection" if aligned else "symmetric"}
    found = interpret(
        lambda x, coordinates: mb.resample(
            x=x,
            coordinates=coordinates,
            sampling_mode=sampling,
            padding_mode=named[padding],
            padding_value=np.float32(0),
            coordinates_mode="normalized_minus_one_to_one",
            align_corners=aligned,
        ),
        {"x": x, "coordinates": coordinates},
        15,
    )
    tensors = torch.from_numpy(x), torch.from_numpy(coordinates)
    expected = F.grid_sample(*tensors, mode=sampling, padding_mode=padding, align_corners=aligned)
    agree(found, [expected.numpy()], "float32", 4)


@pytest.mark.parametrize(("dtype", "opset"), [("int32", 15), ("float16", 16), ("int8", 17), ("uint8", 18)])
def test_coordinates_of_other_types(dtype: str, opset: int) -> None:
    x = numbers(1, (1, 2, 4, 5))
    coordinates = np.random.default_rng(3).integers(0, 4, (1, 3, 2, 2)).astype(dtype)
    given = {
        "padding_mode": "border",
        "padding_value": np.float32(0),
        "coordinates_mode": "unnormalized",
        "align_corners": True,
    }
    found = interpret(
        lambda x, coordinates: mb.resample(x=x, coordinates=coordinates, sampling_mode="bilinear", **given),
        {"x": x, "coordinates": coordinates},
        opset,
    )
    whole = coordinates.astype(int)
    agree(found, [x[0][:, whole[..., 1], whole[..., 0]].transpose(1, 0, 2, 3)], "float32")


def test_resample_as_devices_do_it() -> None:
    # Source: coremltools' tests, which compare with devices.
    x = np.array([11, 22, 33, 44], np.float32).reshape(1, 1, 2, 2)
    coordinates = np.array([-1, -2, -3.7, -1, 0, 0, 3.5, 1.2], np.float32).reshape(1, 2, 2, 2)
    rows: list[tuple[str, str, float, str, bool, list[float]]] = [
        ("bilinear", "constant", 6.17, "normalized_minus_one_to_one", True, [8.585, 6.17, 27.5, 6.17]),
        ("nearest", "border", -1.0, "unnormalized", False, [11, 11, 11, 44]),
        ("bilinear", "reflection", -1.0, "normalized_zero_to_one", True, [22, 36.3, 11, 34.1]),
        ("nearest", "symmetric", -1.0, "normalized_zero_to_one", False, [22, 33, 11, 33]),
    ]
    found = interpret(
        lambda x, coordinates: [
            mb.resample(
                x=x,
                coordinates=coordinates,
                sampling_mode=sampling,
                padding_mode=padding,
                padding_value=np.float32(value),
                coordinates_mode=mode,
                align_corners=aligned,
            )
            for sampling, padding, value, mode, aligned, _ in rows
        ],
        {"x": x, "coordinates": coordinates},
    )
    agree(found, [np.reshape(row[-1], (1, 1, 2, 2)) for row in rows], "float32", 4)


# ---- affine


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("count", "sizes"), [(2, (3, 4)), (1, (5, 2)), (2, (1, 3)), (1, (4, 1))])
def test_pytorch_transforms_the_same_way(count: int, sizes: tuple[int, int], aligned: bool, dtype: str) -> None:
    x, matrix = numbers(1, (2, 3, 4, 5), dtype), numbers(2, (count, 6), dtype)
    given = {
        "output_height": sizes[0],
        "output_width": sizes[1],
        "sampling_mode": "bilinear",
        "padding_mode": "constant",
        "padding_value": typed(dtype, 0),
        "coordinates_mode": "normalized_minus_one_to_one",
        "align_corners": aligned,
    }
    found = interpret(
        lambda x, matrix: mb.affine(x=x, transform_matrix=matrix, **given), {"x": x, "matrix": matrix}, 16
    )
    theta = torch.from_numpy(matrix).double().reshape(-1, 2, 3).expand(2, -1, -1)
    coordinates = F.affine_grid(theta, [2, 3, *sizes], align_corners=aligned)
    expected = F.grid_sample(torch.from_numpy(x).double(), coordinates, align_corners=aligned)
    agree(found, [expected.numpy()], dtype, 2)


UNKNOWN: list[tuple[str, dict[str, str]]] = [
    ("resample", {"sampling_mode": "cubic"}),
    ("resample", {"padding_mode": "cubic"}),
    ("resample", {"coordinates_mode": "cubic"}),
    ("crop_resize", {"sampling_mode": "cubic"}),
    ("crop_resize", {"box_coordinate_mode": "cubic"}),
]


@pytest.mark.parametrize(("op", "wrong"), UNKNOWN)
def test_unknown_modes_are_refused(op: str, wrong: dict[str, str]) -> None:
    x = torch.zeros(1, 1, 2, 2)
    given: dict[str, Any] = {"x": x, "boxes": torch.zeros(1, 4)}
    if op == "resample":
        given = {"x": x, "coordinates": x, "padding_value": 0.0, "align_corners": True, "sampling_mode": "nearest"}
        given |= {"padding_mode": "border", "coordinates_mode": "unnormalized"}
    OPS[op].function(**given)
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} cubic is unknown"):
        OPS[op].function(**(given | wrong))
