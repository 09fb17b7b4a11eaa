"""Poolings. Tensors are [N, C, *D] with one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Ints, op
from edgeattn.targets.coreml.mil.windows import borders, outermost_last

_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMUM: dict[int, Callable[..., Tensor]] = {1: torch.max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}


def _overhang(size: int, width: int, stride: int, padding: int) -> int:
    """How far the last window reaches beyond the padded input where ``ceil_mode`` adds one.

    Source: the shape inference of MIL. Other than PyTorch it keeps a last window without any element where there is
    no padding at all.
    """
    count = -(-(size + padding - width) // stride) + 1
    if padding > 0 and (count - 1) * stride >= size + padding // 2:
        count -= 1
    return max(0, (count - 1) * stride + width - size - padding)


def _ends(
    x: Tensor, kernel: Ints, strides: Ints, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> tuple[Ints, Ints]:
    """Padding before and after each spatial dimension; what ``ceil_mode`` adds counts as padding.

    Source of the latter: coremltools issue 2772, which found on devices that an average divides by it.
    """
    sizes = x.shape[2:]
    before, after = borders(pad_type.lower(), pad, sizes, kernel, strides, (1,) * len(sizes))
    if ceil_mode:
        rows = zip(sizes, kernel, strides, before, after, strict=True)
        after = tuple(b + _overhang(size, width, stride, a + b) for size, width, stride, a, b in rows)
    return before, after


def _torch_pads(before: Ints, after: Ints, kernel: Ints) -> bool:
    """Whether torch's own padding does it: the same at both ends, at most half of the window."""
    return before == after and all(2 * n <= width for n, width in zip(before, kernel, strict=True))


@op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """Mean over each window; with or without the padding in its count."""
    strides, average = strides or (1,) * len(kernel_sizes), _AVERAGE[len(kernel_sizes)]
    before, after = _ends(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if _torch_pads(before, after, kernel_sizes):
        return average(x, kernel_sizes, strides, before, False, not exclude_padding_from_average)
    around = outermost_last(before, after)
    mean = average(F.pad(x, around), kernel_sizes, strides)
    if not exclude_padding_from_average:
        return mean
    share = average(F.pad(torch.ones_like(x[:1, :1]), around), kernel_sizes, strides)
    return mean / share


@op("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Square root of the sum of squares over each window."""
    mean = avg_pool(x * x, kernel_sizes, pad_type, strides, pad, False, ceil_mode)
    return (mean * math.prod(kernel_sizes)).sqrt()


@op("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Maximum over each window; padding never wins."""
    strides, maximum = strides or (1,) * len(kernel_sizes), _MAXIMUM[len(kernel_sizes)]
    before, after = _ends(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if _torch_pads(before, after, kernel_sizes):
        return maximum(x, kernel_sizes, strides, before)
    return maximum(F.pad(x, outermost_last(before, after), value=-math.inf), kernel_sizes, strides)
