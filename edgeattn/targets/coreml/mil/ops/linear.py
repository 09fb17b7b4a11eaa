"""Products of matrices. From iOS17 on, a constant operand may have another type than the other operand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Tensors, op


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in a type that holds the numbers of either."""
    if a.dtype == b.dtype:
        return a, b
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide), b.to(wide)


@op("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with x [*D, D_in] and weight [D_out, D_in]."""
    x, weight = _alike(x, weight)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return F.linear(x, weight, bias)


@op("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    """Product of matrices with NumPy's broadcasting; a vector is not transposed."""
    x, y = _alike(x, y)
    if transpose_x and x.dim() > 1:
        x = x.mT
    if transpose_y and y.dim() > 1:
        y = y.mT
    return torch.matmul(x, y)


@op("einsum")
def einsum(values: Tensors, equation: str) -> Tensor:
    """Einstein's sum; a dimension of 1 broadcasts to the same letter's in the other operand."""
    made: Tensor = torch.einsum(equation, *values)
    return made
