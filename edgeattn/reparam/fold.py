"""The algebra of folding: affine maps into kernels, and kernels into one another. Computes in the modules' own dtype.

The engine calls it on float64 copies, so that a deploy kernel is rounded to float32 once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Layer = _ConvNd | nn.Linear


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """True for convolutions (transposed too) and linear layers, and their subclasses."""
    return isinstance(module, (_ConvNd, nn.Linear))


def is_batch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """True for every BatchNorm module, subclasses included."""
    return isinstance(module, _BatchNorm)


def is_plain(bn: _BatchNorm) -> bool:
    """True if ``bn`` does what nn.BatchNorm does and nothing more."""
    return type(bn).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def channel_axis(layer: Layer, ndim: int) -> int:
    """The axis of channels (features) in a tensor of ``ndim`` axes that goes in or out of the layer."""
    return ndim - 1 if isinstance(layer, nn.Linear) else ndim - 1 - len(layer.kernel_size)


def batch_norm_affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """(s, t) with BN(x) = s x + t in eval mode; each (C,).

    Raises:
        ValueError: the layer has no running statistics, so that it is not affine.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("batch norm without running statistics normalises by the batch: it is no affine map")
    scale = (bn.running_var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    shift = -bn.running_mean * scale
    return scale, shift if bn.bias is None else shift + bn.bias


def set_kernel(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Give the layer new parameters; it gains a bias if it had none."""
    layer.weight = nn.Parameter(weight.detach(), requires_grad=layer.weight.requires_grad)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=layer.weight.requires_grad)


def bias_of(layer: Layer) -> Tensor:
    """The bias (Co,), zeros if there is none."""
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return layer.weight.new_zeros(outputs) if layer.bias is None else layer.bias


def fold_output_affine(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """Given y = s (W x + b) + t. Result: the layer computes y, W' = diag(s) W and b' = s b + t."""
    weight = layer.weight
    if isinstance(layer, _ConvTransposeNd):  # weight (Ci, Co / g, k...), groups along axis 0
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        spread = scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (grouped * spread).reshape(weight.shape)
    else:
        scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    set_kernel(layer, scaled, bias_of(layer) * scale + shift)


def fold_input_affine(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """Given y = W (s x + t) + b, no padding. Result: the layer computes y, W' = W diag(s) and b' = b + sum(W t)."""
    weight = layer.weight
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])  # (g, Co / g, Ci / g, k...)
    spread = (groups, 1, -1, *[1] * (weight.ndim - 2))
    constant = (grouped * shift.reshape(spread)).flatten(2).sum(2).flatten()
    set_kernel(layer, (grouped * scale.reshape(spread)).reshape(weight.shape), bias_of(layer) + constant)


def regroup(weight: Tensor, groups: int, to: int) -> Tensor:
    """A kernel (Co, Ci / groups, k...) as one of fewer groups (Co, Ci / to, k...), zero between the old groups.

    Raises:
        ValueError: ``to`` does not divide ``groups``.
    """
    if groups % to:
        raise ValueError(f"a kernel of {groups} groups cannot be written in {to}")
    ratio, (out, per_group), kernel = groups // to, weight.shape[:2], weight.shape[2:]
    fine = weight.reshape(to, ratio, out // groups, per_group, *kernel)
    wide = weight.new_zeros(to, ratio, out // groups, ratio, per_group, *kernel)
    for position in range(ratio):
        wide[:, position, :, position] = fine[:, position]
    return wide.reshape(out, per_group * ratio, *kernel)


def centre(weight: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Zero-pad an odd kernel (Co, Ci, k...) to a larger odd one, on all sides alike."""
    sides = [(big - small) // 2 for big, small in zip(kernel, weight.shape[2:], strict=True)]
    return nn.functional.pad(weight, [side for side in reversed(sides) for _ in range(2)])


def diagonal(scale: Tensor, groups: int, kernel: tuple[int, ...]) -> Tensor:
    """The kernel (C, C / groups, k...) that multiplies channel c by scale[c]: at the centre tap, zero elsewhere."""
    channels = len(scale)
    return centre(regroup(scale.reshape(channels, 1, *[1] * len(kernel)), channels, groups), kernel)


def sum_kernels(
    parts: Iterable[tuple[Tensor, Tensor, int]], scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """One convolution equal to the sum of parallel ones and of an affine identity branch.

    Args:
        parts: (weight, bias, groups) of convolutions of equal channels and stride, odd kernels, "same" padding.
        scale, shift: of the identity branch, each (C,); None if there is none.

    Returns:
        (weight, bias, groups), with the finest grouping that all branches share.
    """
    branches = list(parts)
    groups = math.gcd(*(g for _, _, g in branches))
    kernel = tuple(max(sizes) for sizes in zip(*(weight.shape[2:] for weight, _, _ in branches), strict=True))
    # One after the other: the widened kernels of all branches at once would be the peak memory of a whole export.
    weights = (centre(regroup(w, g, groups), kernel) for w, _, g in branches)
    weight, bias = sum(weights, torch.zeros(())), sum((b for _, b, _ in branches), torch.zeros(()))
    if scale is not None and shift is not None:
        weight, bias = weight + diagonal(scale, groups, kernel), bias + shift
    return weight, bias, groups
