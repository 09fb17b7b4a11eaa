"""Operations that resize, crop and sample images, whose height and width are the last two dimensions.

A pixel lies at its index; everything between two pixels is interpolated linearly along each dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Ints, Number, op

#: Sampling modes that torch has as well, with its ``align_corners``.
_TORCH = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}
#: By ``box_coordinate_mode``: whether a box is centre and size, not two corners; whether x stands before y.
_BOXES = {
    "CORNERS_HEIGHT_FIRST": (False, False),
    "CORNERS_WIDTH_FIRST": (False, True),
    "CENTER_SIZE_HEIGHT_FIRST": (True, False),
    "CENTER_SIZE_WIDTH_FIRST": (True, True),
}
#: How far beyond the border of an image a box of ``crop_resize`` may reach by rounding, in pixels.
_ROUNDING = 1e-5


def _grid(size: Tensor, count: int, mode: str) -> Tensor:
    """Points at which dimensions of ``size`` [..., 1] are sampled, [..., count]; sizes may be fractions.

    Source: the documentation of ``resize_bilinear``.

    Raises:
        ValueError: an unknown mode.
    """
    steps = torch.arange(count, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and count == 1:
        points = (size - 1) / 2
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = steps * (size - 1) / max(count - 1, 1)
    elif mode == "DEFAULT":
        points = steps * size / count
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * (size - 1).clamp(min=1) / count
    elif mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * size / count - 0.5
    else:
        raise ValueError(f"sampling_mode {mode} is unknown")
    return points.clamp(min=0).minimum(size - 1)


def _points(size: int, count: int, mode: str) -> Tensor:
    """Points of one dimension, [count]."""
    return _grid(torch.tensor([float(size)], dtype=torch.float64), count, mode)


def _axes(x: Tensor, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The last dimensions of x with their new sizes."""
    return list(enumerate(sizes, x.dim() - len(sizes)))


def _images(x: Tensor) -> Tensor:
    """As [N, C, H, W]."""
    return x if x.dim() == 4 else x.reshape(1, -1, *x.shape[-2:])


def _linear(x: Tensor, sizes: Sequence[int], mode: str) -> Tensor:
    """The last dimensions brought to ``sizes``; one call of torch where it has the mode and there are two of them."""
    x = x if x.is_floating_point() else x.float()
    if len(sizes) == 2 and mode in _TORCH:
        made = F.interpolate(_images(x), tuple(sizes), mode="bilinear", align_corners=_TORCH[mode])
        return made.reshape(*x.shape[:-2], *sizes)
    for axis, count in _axes(x, sizes):
        points = _points(x.shape[axis], count, mode)
        near = points.long()
        far = (near + 1).clamp(max=x.shape[axis] - 1)
        weight = (points - near).to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1 - axis))
        x = x.index_select(axis, near).lerp(x.index_select(axis, far), weight)
    return x


def _nearest(x: Tensor, sizes: Sequence[int], mode: str) -> Tensor:
    """The last dimensions brought to ``sizes`` by the pixel nearest to each point, the latter one of two."""
    for axis, count in _axes(x, sizes):
        x = x.index_select(axis, (_points(x.shape[axis], count, mode) + 0.5).long())
    return x


def _scaled(x: Tensor, height: Number, width: Number) -> tuple[int, int]:
    """Height and width times their factors; in float32, as MIL's type inference counts."""
    old_height, old_width = x.shape[-2:]
    return math.floor(np.float32(height) * old_height), math.floor(np.float32(width) * old_width)


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: Number = 1, scale_factor_width: Number = 1) -> Tensor:
    """Pixel ``floor(i * size / new size)`` at each place i, as PyTorch's nearest."""
    sizes = _scaled(x, scale_factor_height, scale_factor_width)
    return F.interpolate(_images(x), sizes, mode="nearest").reshape(*x.shape[:-2], *sizes)


@op("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    """Pixel ``floor((i + 0.5) * size / new size)`` at each place i.

    Source: coremltools takes it for TensorFlow's nearest resizing with half pixel centres.
    """
    return _nearest(x, (target_size_height, target_size_width), "UNALIGN_CORNERS")


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Number = 1,
    scale_factor_width: Number = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """Height and width times the factors; the corners' pixels or (half pixel centres) the pixels' edges coincide.

    Raises:
        ValueError: both are asked for.
    """
    if half_pixel_centers is None:
        half_pixel_centers = not align_corners
    if align_corners and half_pixel_centers:
        raise ValueError("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half_pixel_centers else "DEFAULT"
    return _linear(x, _scaled(x, scale_factor_height, scale_factor_width), mode)


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Height and width brought to a size; see ``_grid`` for the modes."""
    return _linear(x, (target_size_height, target_size_width), sampling_mode)


@op("resize")
def resize(
    x: Tensor,
    shape: Ints,
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last ``resized_dims`` dimensions brought to the last sizes of ``shape``; a 0 keeps a size.

    The nearest pixel of mode DEFAULT is that of ``resize_nearest_neighbor``, which coremltools replaces by it.
    """
    own = x.shape[x.dim() - resized_dims :]
    sizes = [new or old for new, old in zip(shape[len(shape) - resized_dims :], own, strict=True)]
    if interpolation_mode == "LINEAR":
        return _linear(x, sizes, sampling_mode)
    return _nearest(x, sizes, "UNALIGN_CORNERS" if sampling_mode == "DEFAULT" else sampling_mode)


@op("crop")
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """Without so many rows at the top and the bottom, and columns at the left and the right."""
    height, width = x.shape[-2:]
    return x[..., crop_height[0] : height - crop_height[1], crop_width[0] : width - crop_width[1]]


def _pixels(x: Tensor, image: Tensor, ys: Tensor, xs: Tensor, fill: float) -> Tensor:
    """Pixels [..., C] of the images at whole places; ``fill`` outside."""
    height, width = x.shape[-2:]
    inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
    found = x[image, :, ys.clamp(0, height - 1).long(), xs.clamp(0, width - 1).long()]
    return torch.where(inside.unsqueeze(-1), found, fill)


def _sampled(x: Tensor, image: Tensor, ys: Tensor, xs: Tensor, fill: float = 0.0) -> Tensor:
    """Images ``image`` of x [B, C, H, W] interpolated at points, [N, C, h, w]; around them lies ``fill``.

    The three index tensors broadcast to [N, h, w].
    """
    top, left = ys.floor(), xs.floor()
    down, right = (ys - top).to(x.dtype).unsqueeze(-1), (xs - left).to(x.dtype).unsqueeze(-1)
    above = _pixels(x, image, top, left, fill).lerp(_pixels(x, image, top, left + 1, fill), right)
    below = _pixels(x, image, top + 1, left, fill).lerp(_pixels(x, image, top + 1, left + 1, fill), right)
    return above.lerp(below, down).movedim(-1, 1)


def _corners(boxes: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """First and last corner of boxes [N, 4], each [N, 2] with y before x.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _BOXES:
        raise ValueError(f"box_coordinate_mode {mode} is unknown")
    centred, x_first = _BOXES[mode]
    one, other = boxes[:, :2], boxes[:, 2:]
    if x_first:
        one, other = one.flip(1), other.flip(1)
    return (one - other / 2, one + other / 2) if centred else (one, other)


@op("crop_resize")
def crop_resize(
    x: Tensor,
    roi: Tensor | None = None,
    boxes: Tensor | None = None,
    box_indices: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    """Boxes of the images x [B, C, H, W], each brought to the target size; points outside an image are ``pad_value``.

    From iOS17 on ``boxes`` [N, 4] of the images ``box_indices`` [N], the n-th of the n-th one by default; the result is
    [N, C, h, w]. Before it ``roi``: [N, 1, 5, 1, 1] with the index of the image first, for [N, 1, C, h, w], or
    [N, 1, 4, 1, 1], for boxes of all images, [N, B, C, h, w]. A box from pixel a to pixel b is |b - a| + 1 wide.
    """
    batch, channels, height, width = x.shape
    if boxes is not None:
        image = torch.arange(len(boxes)) if box_indices is None else box_indices.long()
        leading: tuple[int, ...] = (len(boxes),)
    elif roi is not None:
        boxes = roi.reshape(len(roi), -1)
        if boxes.shape[1] == 5:
            image, boxes, leading = boxes[:, 0].long(), boxes[:, 1:], (len(roi), 1)
        else:
            image, leading = torch.arange(batch).repeat(len(roi)), (len(roi), batch)
            boxes = boxes.repeat_interleave(batch, 0)
    else:
        raise ValueError("crop_resize has neither roi nor boxes")
    first, last = _corners(boxes.double() * spatial_scale, box_coordinate_mode)
    if normalized_coordinates:
        edge = torch.tensor([height - 1, width - 1])
        first, last = first * edge, last * edge
    points, inside = [], []
    for axis, (count, size) in enumerate(((target_height, height), (target_width, width))):
        start, way = first[:, axis : axis + 1], (last - first)[:, axis : axis + 1]
        along = start + way.sign() * _grid(way.abs() + 1, count, sampling_mode)
        inside.append((along >= -_ROUNDING) & (along <= size - 1 + _ROUNDING))
        points.append(along.clamp(0, size - 1))
    made = _sampled(x, image.reshape(-1, 1, 1), points[0].unsqueeze(2), points[1].unsqueeze(1))
    covered = (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)
    return torch.where(covered, made, pad_value).reshape(*leading, channels, target_height, target_width)


def _unnormalized(points: Tensor, size: int, mode: str, align_corners: bool) -> Tensor:
    """Coordinates as places of pixels; the ends of their range are the outer pixels' centres (aligned) or edges.

    Raises:
        ValueError: an unknown mode.
    """
    if mode == "unnormalized":
        return points
    if mode not in ("normalized_minus_one_to_one", "normalized_zero_to_one"):
        raise ValueError(f"coordinates_mode {mode} is unknown")
    share = (points + 1) / 2 if mode == "normalized_minus_one_to_one" else points
    return share * (size - 1) if align_corners else share * size - 0.5


def _folded(points: Tensor, size: int, mode: str) -> Tensor:
    """Points outside an image brought to where their value comes from.

    Raises:
        ValueError: an unknown mode.
    """
    if mode == "constant":
        return points
    if mode == "reflection":  # at the centres of the outer pixels
        points = size - 1 - (points.abs() % max(2 * (size - 1), 1) - (size - 1)).abs()
    elif mode == "symmetric":  # at their edges
        points = size - 0.5 - ((points + 0.5).abs() % (2 * size) - size).abs()
    elif mode != "border":
        raise ValueError(f"padding_mode {mode} is unknown")
    return points.clamp(0, size - 1)


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Images x [B, C, H, W] at coordinates [B, h, w, 2] of (x, y), as [B, C, h, w].

    Raises:
        ValueError: an unknown mode.
    """
    places = []
    for axis, size in enumerate(reversed(x.shape[-2:])):
        points = _unnormalized(coordinates[..., axis].double(), size, coordinates_mode, align_corners)
        places.append(_folded(points, size, padding_mode))
    xs, ys = places
    image = torch.arange(len(x)).reshape(-1, 1, 1)
    if sampling_mode == "nearest":
        return _pixels(x, image, ys.round(), xs.round(), padding_value).movedim(-1, 1)
    if sampling_mode != "bilinear":
        raise ValueError(f"sampling_mode {sampling_mode} is unknown")
    return _sampled(x, image, ys, xs, padding_value)


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """Images x [B, C, H, W] through the transforms [B or 1, 6], sampled as ``resample`` does.

    The transforms lead from the result's coordinates (x, y), which run from -1 to 1, to those of x. Only such
    coordinates are defined.
    """
    ends = [1.0 if align_corners else 1 - 1 / size for size in (output_height, output_width)]
    ys, xs = (
        torch.linspace(-end, end, size, dtype=torch.float64) if size > 1 else torch.zeros(1, dtype=torch.float64)
        for end, size in zip(ends, (output_height, output_width), strict=True)
    )
    plane = torch.stack([*torch.meshgrid(xs, ys, indexing="xy"), torch.ones(output_height, output_width)], -1)
    matrix = transform_matrix.double().reshape(-1, 1, 2, 3)
    coordinates = (plane.unsqueeze(-2) * matrix.unsqueeze(1)).sum(-1).expand(len(x), -1, -1, -1)
    return resample(
        x,
        coordinates,
        sampling_mode.lower(),
        padding_mode.lower(),
        padding_value,
        coordinates_mode.lower(),
        align_corners,
    )
