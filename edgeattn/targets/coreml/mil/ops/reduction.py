"""Reductions along axes. Of integers, sums wrap around at 32 bits, and what has a fraction is cut off towards zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Ints, op

#: Takes a tensor, axes (never none) and whether they stay with size 1.
_Reduce = Callable[[Tensor, Ints, bool], Tensor]


def _real(x: Tensor) -> Tensor:
    """Integers as float64, which holds each of them exactly."""
    return x if x.is_floating_point() else x.double()


def _prod(x: Tensor, axes: Ints, keep: bool) -> Tensor:
    """torch multiplies along one axis at a time."""
    for axis in axes:
        x = torch.prod(x, axis, keepdim=True)
    return x if keep else x.squeeze(axes)


_REDUCTIONS: dict[str, _Reduce] = {
    "reduce_l1_norm": lambda x, axes, keep: torch.sum(x.abs(), axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: torch.sum(_real(x).square(), axes, keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: torch.log(torch.sum(_real(x), axes, keep)),
    "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(_real(x), axes, keep),
    "reduce_max": torch.amax,
    "reduce_mean": lambda x, axes, keep: torch.mean(_real(x), axes, keep),
    "reduce_min": torch.amin,
    "reduce_prod": _prod,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, axes, keep: torch.sum(x.square(), axes, keep),
}


def _reduction(function: _Reduce) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        if axes is None:
            return function(x, tuple(range(x.dim())), keep_dims)
        # No axes mean that nothing is reduced; torch would take them for all.
        return function(x, axes, keep_dims) if axes else function(x.unsqueeze(-1), (-1,), False)

    return run


for _name, _function in _REDUCTIONS.items():
    op(_name)(_reduction(_function))


@op("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Index of the largest number along ``axis``, the first of equal ones; ``output_dtype`` is the declared dtype."""
    return torch.argmax(x, axis, keep_dims)


@op("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    """Index of the smallest number along ``axis``, the first of equal ones; ``output_dtype`` is the declared dtype."""
    return torch.argmin(x, axis, keep_dims)
