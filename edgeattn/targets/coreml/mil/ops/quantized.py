"""Quantized values: those that a program computes with, and weights that it holds compressed.

The ``constexpr_`` operations run when the program is bound. Their iOS16 forms take bits packed in bytes and the
shape; those of iOS18 take one number an element.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Ints, op
from edgeattn.targets.coreml.mil.values import unpack


def _along(value: Tensor, rank: int, axis: int | None) -> Tensor:
    """A number, or a vector laid along an axis, as float32 that broadcasts to that rank."""
    shape = [1] * rank
    if value.dim() and axis is not None:
        shape[axis] = -1
    return value.float().reshape(shape)


@op("quantize")
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """``round(input / scale) + zero_point``, a half to the even neighbour, clipped to int8 or uint8."""
    steps = torch.round(input / _along(scale, input.dim(), axis))
    if zero_point is not None:
        steps = steps + _along(zero_point, input.dim(), axis)
    return steps.clamp(-128, 127) if output_dtype == "int8" else steps.clamp(0, 255)


@op("dequantize")
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """``scale * (input - zero_point)``; both are numbers, or vectors along the axis."""
    steps = input.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, input.dim(), axis)
    return steps * _along(scale, input.dim(), axis)


@op("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``scale * (quantized_data - zero_point)``; both are numbers, or vectors along the axis."""
    return dequantize(quantized_data, scale, zero_point, axis)


@op("constexpr_cast")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """The same numbers as float32, the only type that there is.

    Raises:
        ValueError: another type.
    """
    if output_dtype != "fp32":
        raise ValueError(f"constexpr_cast to {output_dtype}")
    return source_val.float()


def _spread(value: Tensor, shape: Ints) -> Tensor:
    """Each element repeated over its block, so that the whole has that shape."""
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        value = value.repeat_interleave(want // have, axis) if want != have else value
    return value


@op("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``scale * (data - offset)``, each number of the two over a block of ``data.shape / scale.shape`` elements."""
    steps = data.float()
    if offset is not None:
        steps = steps - _spread(offset.float(), data.shape)
    return steps * _spread(scale.float(), data.shape)


def _from_tables(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """Entries of tables [G..., palettes, vector]; each covers a block of the indices, as many blocks as G says."""
    groups, (palettes, vector) = lut.shape[:-2], lut.shape[-2:]
    table = torch.arange(math.prod(groups)).reshape(groups)
    entries = lut.reshape(-1, vector)[_spread(table, indices.shape) * palettes + indices]
    if vector_axis is None:
        return entries.squeeze(-1)
    axis = vector_axis % indices.dim()
    return entries.movedim(-1, axis + 1).flatten(axis, axis + 1)


@op("constexpr_lut_to_dense")
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    """Entries of tables by their indices.

    With ``shape`` (iOS16): one table [palettes], whose indices are packed. Without it (iOS18): tables [G...,
    palettes, vector], the vectors laid along ``vector_axis``.
    """
    if shape is None:
        return _from_tables(indices, lut, vector_axis)
    bits = lut.shape[0].bit_length() - 1
    return lut[torch.from_numpy(unpack(indices.numpy(), bits, False, math.prod(shape)).astype(np.int64))].reshape(shape)


@op("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    """Values where the mask is 1, in order, and zeros elsewhere; with ``shape`` (iOS16) the mask is packed."""
    if shape is not None:
        mask = torch.from_numpy(unpack(mask.numpy(), 1, False, math.prod(shape))).reshape(shape)
    dense = nonzero_data.new_zeros(mask.shape)
    dense[mask != 0] = nonzero_data
    return dense


@op("constexpr_lut_to_sparse")
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """As ``constexpr_lut_to_dense`` where the mask is 1: the mask of the result, and its values in order."""
    dense = _from_tables(constexpr_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = _spread(indices_mask, dense.shape)
    return mask, dense[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ``constexpr_blockwise_shift_scale`` where the mask is 1: the mask, and the values in order."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]
