"""Operations that make, order and join tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Call, Ints, Number, Tensors, op


@op("identity")
def identity(x: Tensor) -> Tensor:
    """The value itself."""
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
def range_1d(end: Number, start: Number, step: Number) -> Tensor:
    """From ``start`` up to ``end``, which is left out."""
    return torch.arange(start, end, step)


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
    total = given.cumsum(axis, dtype=x.dtype)
    total = total - given if exclusive else total
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


@op("concat")
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """Joined along ``axis``, one after the other or (interleave) in turns, element by element."""
    if values[0].dim() == 0:
        return torch.stack(values)
    if interleave:
        return torch.stack(values, axis % values[0].dim() + 1).flatten(
            axis % values[0].dim(), axis % values[0].dim() + 1
        )
    return torch.cat(values, axis)


@op("stack")
def stack(values: Tensors, axis: int) -> Tensor:
    """Joined along a new dimension."""
    return torch.stack(values, axis)


@op("split")
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> tuple[Tensor, ...]:
    """Taken apart along ``axis``: into parts of ``split_sizes``, or into so many equal ones."""
    sizes = split_sizes or [x.shape[axis] // (num_splits or 1)] * (num_splits or 1)
    return tuple(x.split_with_sizes(list(sizes), axis))


def _overlap(boxes: Tensor, chosen: Tensor) -> Tensor:
    """Intersection over union of boxes (B, 4) as centre and size with one box (4,)."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    own_low, own_high = chosen[:2] - chosen[2:] / 2, chosen[:2] + chosen[2:] / 2
    shared = (torch.minimum(high, own_high) - torch.maximum(low, own_low)).clamp(min=0).prod(-1)
    union = boxes[:, 2:].prod(-1) + chosen[2:].prod() - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def _suppress(boxes: Tensor, scores: Tensor, iou: float, least: float, most: int) -> list[int]:
    """Places of the boxes that stay, best first."""
    alive = scores >= least if least > -float("inf") else torch.ones_like(scores, dtype=torch.bool)
    stay: list[int] = []
    while len(stay) < most and bool(alive.any()):
        best = int(torch.where(alive, scores, torch.full_like(scores, -float("inf"))).argmax())
        stay.append(best)
        alive = alive & (_overlap(boxes, boxes[best]) <= iou)
        alive[best] = False
    return stay


@op("non_maximum_suppression")
def non_maximum_suppression(
    call: Call,
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    score_threshold: float = -float("inf"),
    per_class_suppression: bool = False,
) -> tuple[Tensor, ...]:
    """The boxes that no better one overlaps by more than the threshold, padded to ``max_boxes``.

    Boxes (n, B, 4) as (x, y, width, height) around the centre, scores (n, B, K); from iOS17 on (n, 4, B) and (n, K, B),
    no score threshold and no count. A box is as good as its best class; per class it competes within that one only.
    What pads boxes and scores is 0, indices -1.
    """
    last = call.opset >= 17
    if last:
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)
    kept, points, places, counts = [], [], [], []
    for box, score in zip(boxes.float(), scores.float(), strict=True):
        best, label = score.max(-1)
        # Boxes of different classes do not meet when each class has a plane of its own.
        apart = (box[:, :2].abs().max() + box[:, 2:].max() + 1) * 2 if box.numel() else box.new_tensor(0.0)
        moved = box + torch.nn.functional.pad((label * apart).unsqueeze(-1), (0, 3)) if per_class_suppression else box
        stay = _suppress(moved, best, iou_threshold, score_threshold, max_boxes)
        empty = max_boxes - len(stay)
        kept.append(F.pad(box[stay], (0, 0, 0, empty)))
        points.append(F.pad(score[stay], (0, 0, 0, empty)))
        places.append(F.pad(torch.tensor(stay, dtype=torch.int64), (0, empty), value=-1))
        counts.append(len(stay))
    results = [torch.stack(kept), torch.stack(points), torch.stack(places)]
    if last:
        return results[0].transpose(1, 2), results[1].transpose(1, 2), results[2]
    return (*results, torch.tensor(counts))
