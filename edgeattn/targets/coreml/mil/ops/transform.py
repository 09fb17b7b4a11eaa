"""Operations that change a tensor's shape or the order of its elements."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Bools, Call, Ints, Tensors, op


@op("expand_dims", moves=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """Dimensions of one element at ``axes`` of the result."""
    if len(axes) == 1:
        return x.unsqueeze(axes[0])
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", moves=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    """Without dimensions of one element: all, or those of ``axes`` that have one."""
    return x.squeeze() if axes is None else x.squeeze(axes)


@op("reshape", moves=True)
def reshape(call: Call, x: Tensor, shape: Ints) -> Tensor:
    """The same elements in another shape.

    A 0 in ``shape`` stands for a dimension of x: the one at the same place, and from iOS17 on the one at the same place
    from the end (1 where x has none). One -1 stands for what is left over.
    """
    if 0 in shape:
        own = tuple(x.shape)
        if call.opset >= 17:
            own = (1,) * (len(shape) - len(own)) + own[max(0, len(own) - len(shape)) :]
        shape = tuple(size or own[place] for place, size in enumerate(shape))
    return x.reshape(shape)


@op("reshape_like")
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors) -> Tensor:
    """The same elements; the shape is made of parts of other tensors' shapes, one after the other."""
    shape: list[int] = []
    for tensor, begin, end, open_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += tensor.shape[int(begin) : None if bool(open_end) else int(end)]
    return x.reshape(shape)


@op("transpose", moves=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    """Dimensions in the order of ``perm``."""
    return x.permute(perm)


@op("reverse")
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    """The order turned round along ``axes``, or along all."""
    return x.flip(tuple(range(x.dim())) if axes is None else axes)


@op("reverse_sequence")
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Along ``seq_axis`` the first ``lengths[i]`` elements of the i-th part along ``batch_axis`` turned round."""
    places = torch.arange(x.shape[seq_axis])
    counts = lengths.long().unsqueeze(1)
    source = torch.where(places < counts, counts - 1 - places, places)
    batch_first = x.movedim((batch_axis, seq_axis), (0, 1))
    turned = batch_first[torch.arange(len(source)).unsqueeze(1), source]
    return turned.movedim((0, 1), (batch_axis, seq_axis))


@lru_cache(maxsize=1024)
def _slices(
    shape: Ints,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> tuple[tuple[slice | int, ...], Ints]:
    """Forward slices (or an index, where the dimension goes), and the axes of the result that have to be turned round.

    As in NumPy negative places count from the end, and a mask stands for a limit that is left out. Torch takes no
    negative strides. A model asks for the same slices at every run, hence the cache.
    """
    slices: list[slice | int] = []
    turned: list[int] = []
    for i, size in enumerate(shape):
        first = None if begin_mask and begin_mask[i] else begin[i]
        if squeeze_mask and squeeze_mask[i]:
            slices.append(first or 0)
            continue
        part = slice(first, None if end_mask and end_mask[i] else end[i], stride[i] if stride else 1)
        if part.step < 0:
            places = range(size)[part][::-1]
            part = slice(places.start, places.stop, places.step) if places else slice(0, 0)
            turned.append(sum(isinstance(item, slice) for item in slices))
        slices.append(part)
    return tuple(slices), tuple(turned)


@op("slice_by_index", moves=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """``x[begin:end:stride]`` in every dimension; see ``_slices``."""
    slices, turned = _slices(tuple(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask)
    part = x[slices]
    return part.flip(turned) if turned else part


@op("slice_update", moves=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """A copy of x whose slice, as ``slice_by_index`` takes it, is ``update``.

    Raises:
        ValueError: the slice is of another shape, as one is that begins in x and does not end there.
    """
    slices, turned = _slices(tuple(x.shape), begin, end, stride, begin_mask, end_mask, squeeze_mask)
    changed = x.clone()
    place = changed[slices]
    if place.shape != update.shape:
        raise ValueError(f"an update of {tuple(update.shape)} for a slice of {tuple(place.shape)}")
    place.copy_(update.flip(turned) if turned else update)
    return changed


@op("slice_by_size", moves=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """``size`` elements from ``begin`` on in every dimension; all that are left where it is -1."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        first += x.shape[axis] if first < 0 else 0
        x = x.narrow(axis, first, x.shape[axis] - first if count < 0 else count)
    return x


@op("depth_to_space")
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """[N, C, H, W] to [N, C / b^2, H b, W b]; the blocks are the outermost part of the channels."""
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth")
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """[N, C, H, W] to [N, C b^2, H / b, W / b]; the inverse of ``depth_to_space``."""
    n, c, h, w = x.shape
    b = block_size
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("space_to_batch")
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Tensor) -> Tensor:
    """Padded with zeros, [N, C, H, W] to [N b1 b2, C, H / b1, W / b2]; the blocks are the outermost part of N."""
    (top, bottom), (left, right) = paddings.tolist()
    x = F.pad(x, (left, right, top, bottom))
    n, c, h, w = x.shape
    b1, b2 = block_shape
    moved = x.reshape(n, c, h // b1, b1, w // b2, b2).permute(3, 5, 0, 1, 2, 4)
    return moved.reshape(n * b1 * b2, c, h // b1, w // b2)


@op("batch_to_space")
def batch_to_space(x: Tensor, block_shape: Ints, crops: Tensor) -> Tensor:
    """The inverse of ``space_to_batch``, cropped."""
    (top, bottom), (left, right) = crops.tolist()
    n, c, h, w = x.shape
    b1, b2 = block_shape
    n //= b1 * b2
    whole = x.reshape(b1, b2, n, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(n, c, h * b1, w * b2)
    return whole[:, :, top : h * b1 - bottom, left : w * b2 - right]


@op("pixel_shuffle")
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    """[N, C f^2, H, W] to [N, C, H f, W f]."""
    return F.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle")
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """[N, C, H f, W f] to [N, C f^2, H, W]."""
    return F.pixel_unshuffle(x, downscale_factor)


@op("sliding_windows")
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """All windows along ``axis``: it becomes the number of windows, and after it stand their ``size`` elements."""
    return x.unfold(axis, size, stride).movedim(-1, axis % x.dim() + 1)
