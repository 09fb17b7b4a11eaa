"""Normalizations. From iOS17 on, their parameters may have another float type than x."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Ints, op


def _like(x: Tensor, value: Tensor | None) -> Tensor | None:
    """A parameter in the type of x; the test first, since a needless conversion costs more."""
    return value if value is None or value.dtype == x.dtype else value.to(x.dtype)


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalize x [N, C, *D] by mean and variance [C], which are known."""
    scale, offset = _like(x, gamma), _like(x, beta)
    return torch.batch_norm(x, scale, offset, mean.to(x.dtype), variance.to(x.dtype), False, 0.0, epsilon, False)


@op("instance_norm")
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Normalize x [N, C, *D] by its mean and variance over D."""
    return torch.instance_norm(x, _like(x, gamma), _like(x, beta), None, None, True, 0.0, epsilon, False)


@op("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Divide x by the root of its sum of squares over the last three dimensions, plus epsilon under the root."""
    return x / ((x * x).sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


@op("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Ints | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalize x by its mean and variance over the axes, all without them; gamma and beta have those, in x's order."""
    rank = x.dim()
    chosen = sorted(axis % rank for axis in axes) if axes else list(range(rank))
    last = list(range(rank - len(chosen), rank))
    gamma, beta = _like(x, gamma), _like(x, beta)
    if chosen == last:
        return torch.layer_norm(x, x.shape[last[0] :], gamma, beta, epsilon)
    x = x.movedim(chosen, last)
    return torch.layer_norm(x, x.shape[last[0] :], gamma, beta, epsilon).movedim(last, chosen)


@op("local_response_norm")
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Divide x by ``(k + alpha * sum / size) ** beta``, the sum of squares over ``size`` neighbours along axis -3.

    That axis is the channels' at rank 4. At rank 3 it is the first, though MIL's text has the channels second: the
    numbers that coremltools' tests expect of a device are those of axis -3. An even ``size`` has its odd neighbour
    before, as in PyTorch.
    """
    images = x.reshape(-1, *x.shape[-3:])
    return F.local_response_norm(images, size, alpha, beta, k).reshape(x.shape)
