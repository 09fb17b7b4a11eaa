"""Operations that make, order and join tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Call, Ints, Number, Tensors, op


@op("identity")
def identity(x: Any) -> Any:
    """The value itself, be it a tensor or a list."""
    return x


@op("fill")
def fill(shape: Ints, value: Number = 0.0) -> Tensor:
    """One value in every place; the declared output says of which type."""
    return torch.full(shape, value)


@op("fill_like")
def fill_like(ref_tensor: Tensor, value: Number = 0.0) -> Tensor:
    """One value in the shape of another tensor."""
    return torch.full(ref_tensor.shape, value)


@op("range_1d")
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    """From ``start`` up to ``end``, which is left out; empty where ``step`` leads away from it.

    Floats are counted in float32, as MIL's type inference does: 0 to 0.3 in steps of 0.1 are three, not four.
    """
    if start.is_floating_point():
        count = max(0, math.ceil(float((end - start) / step)))
    else:
        count = len(range(int(start), int(end), int(step)))
    return start + step * torch.arange(count, dtype=start.dtype)


@op("one_hot")
def one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: Number = 1, off_value: Number = 0
) -> Tensor:
    """A new dimension at ``axis`` with ``on_value`` where its place is the index; nowhere for an index outside."""
    places = torch.arange(one_hot_vector_size)
    hit = indices.unsqueeze(-1) == places
    return torch.where(hit, on_value, off_value).movedim(-1, axis)


@op("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Of the last two dimensions the diagonals from ``lower`` below to ``upper`` above; a negative one means all."""
    if lower >= 0:
        x = x.triu(-lower)
    return x.tril(upper) if upper >= 0 else x


@op("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sums of all elements up to each place, with it or (exclusive) without; ``reverse`` from the end."""
    given = x.flip(axis) if reverse else x
    if exclusive:  # moved one place on: taking the element off the sum would round
        given = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), given.narrow(axis, 0, x.shape[axis] - 1)], axis)
    total = given.cumsum(axis, dtype=x.dtype)
    return total.flip(axis) if reverse else total


@op("pad")
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: Number = 0.0) -> Tensor:
    """Elements before and after, given in pairs for the last dimensions; constant, reflected or replicated."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    if mode == "constant":
        return F.pad(x, [n for pair in reversed(pairs) for n in pair], value=constant_val)
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        if before or after:
            x = x.index_select(axis, _mirrored(x.shape[axis], before, after, mode))
    return x


def _mirrored(size: int, before: int, after: int, mode: str) -> Tensor:
    """Places that a padded dimension is filled from."""
    places = torch.arange(-before, size + after)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    return size - 1 - (size - 1 - places.abs()).abs()


@op("tile")
def tile(x: Tensor, reps: Ints) -> Tensor:
    """Every dimension repeated so many times."""
    return x.repeat(reps)


def _order(x: Tensor, axis: int, ascending: bool) -> Tensor:
    """Places in sorted order; equal values stay in theirs."""
    return x.argsort(dim=axis, descending=not ascending, stable=True)


@op("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """Places of the values along ``axis`` in sorted order, the largest first unless ``ascending``."""
    return _order(x, axis, ascending)


@op("topk")
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    """The k largest values (smallest, if ascending) and their places; all for -1. They are sorted even if ``sort`` is
    not asked for, where any order is allowed; the declared output says what type the places have.
    """
    places = _order(x, axis, ascending).narrow(axis, 0, x.shape[axis] if k == -1 else k)
    values = x.gather(axis, places)
    return (values, places) if return_indices else values


@op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    """Indices of the elements that are not zero, [count, rank]."""
    return x.nonzero()


@op("concat", moves=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Joined along ``axis``, one after the other or (interleave) in turns, element by element; scalars to a vector."""
    if values[0].dim() == 0:
        return torch.stack(values)
    if interleave:
        axis %= values[0].dim()
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@op("stack", moves=True)
def stack(values: Tensors, axis: int) -> Tensor:
    """Joined along a new dimension."""
    return torch.stack(values, axis)


@op("split", moves=True)
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> tuple[Tensor, ...]:
    """Taken apart along ``axis``: into parts of ``split_sizes``, or else into ``num_splits`` equal ones."""
    if split_sizes is not None:
        return x.split_with_sizes(split_sizes, axis)
    return x.tensor_split(num_splits or 1, axis)


@op("flatten2d")
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    """Two dimensions: those before ``axis``, and the others."""
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("shape")
def shape(x: Tensor) -> Tensor:
    """The sizes of the dimensions, [rank]."""
    return torch.tensor(x.shape, dtype=torch.int32)


def _overlap(boxes: Tensor, chosen: Tensor) -> Tensor:
    """Intersection over union of boxes (B, 4) as centre and size with one box (4,); NaN where both are empty."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    own_low, own_high = chosen[:2] - chosen[2:] / 2, chosen[:2] + chosen[2:] / 2
    shared = (torch.minimum(high, own_high) - torch.maximum(low, own_low)).clamp(min=0).prod(-1)
    union = boxes[:, 2:].prod(-1) + chosen[2:].prod() - shared
    return shared / union


def _survivors(boxes: Tensor, scores: Tensor, iou: float, least: float, most: int, per_class: bool) -> list[int]:
    """Places of the boxes (B, 4) with scores (B, K) that stay, best first."""
    best, label = scores.max(-1)
    alive = best >= least
    stay: list[int] = []
    while len(stay) < most and bool(alive.any()):
        place = int(torch.where(alive, best, -torch.inf).argmax())
        stay.append(place)
        suppressed = _overlap(boxes, boxes[place]) > iou
        alive = alive & ~(suppressed & (label == label[place]) if per_class else suppressed)
        alive[place] = False
    return stay or [int(best.argmax())]


@op("non_maximum_suppression")
def non_maximum_suppression(
    call: Call,
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    score_threshold: float = -math.inf,
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """The boxes that no better one overlaps by more than the threshold, padded to ``max_boxes``.

    Boxes (n, B, 4) are (x, y, width, height) around the centre, scores (n, B, K); from iOS17 on (n, 4, B) and
    (n, K, B), without score threshold and count. A box is as good as its best class; per class it meets only boxes
    that have the same best class. The best box stays even below the score threshold. Boxes and scores are padded with
    0, indices with -1. Source of the last two: coremltools' tests, which compare with devices (up to iOS16).
    """
    box_last = call.opset >= 17
    if box_last:
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)
    rows = []
    for box, score in zip(boxes, scores, strict=True):
        stay = _survivors(box.float(), score.float(), iou_threshold, score_threshold, max_boxes, per_class_suppression)
        rest = max_boxes - len(stay)
        places = torch.tensor(stay)
        rows.append((F.pad(box[places], (0, 0, 0, rest)), F.pad(score[places], (0, 0, 0, rest)), places, rest))
    kept, points = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    indices = torch.stack([F.pad(places, (0, rest), value=-1) for _, _, places, rest in rows])
    if box_last:
        return kept.transpose(1, 2), points.transpose(1, 2), indices
    return kept, points, indices, torch.tensor([max_boxes - row[3] for row in rows])
