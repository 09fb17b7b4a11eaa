"""Operations that read or write elements at places that a tensor of indices names.

A negative index counts from the end, as coremltools infers it, also from iOS17 on, where devices promise nothing for
it; one that lies outside is an error even where ``validate_indices`` is not set and a device would give anything. With
``validate_indices`` a negative index is an error as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import op


def _checked(indices: Tensor, sizes: Sequence[int], validate: bool) -> Tensor:
    """Indices as torch takes them; the last dimension of the tensor, or all of it, belongs to ``sizes``.

    Raises:
        IndexError: ``validate`` and an index is negative or too large.
    """
    if validate and bool(((indices < 0) | (indices >= torch.tensor(sizes))).any()):
        raise IndexError(f"an index is negative or too large for a dimension of {', '.join(map(str, sizes))}")
    return indices.long()


def _batches(shape: Sequence[int], rank: int) -> tuple[Tensor, ...]:
    """Indices of batch dimensions themselves, to go with indices of that rank (batch dimensions included)."""
    return tuple(torch.arange(size).reshape((-1,) + (1,) * (rank - axis - 1)) for axis, size in enumerate(shape))


@op("gather", moves=True)
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """``x`` at ``indices`` along ``axis``: x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1:].

    The first ``batch_dims`` dimensions of both go together.
    """
    axis %= x.dim()
    places = _checked(indices, x.shape[axis : axis + 1], validate_indices)
    if batch_dims == 0:
        return x[(slice(None),) * axis + (places,)]
    index = (*_batches(x.shape[:batch_dims], places.dim()), places)
    found = x.movedim(axis, batch_dims)[index]
    new = places.dim() - batch_dims
    return found.movedim(tuple(range(batch_dims, batch_dims + new)), tuple(range(axis, axis + new)))


@op("gather_along_axis")
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    """``x`` at ``indices``, an index along ``axis`` for each element of the result."""
    size = x.shape[axis]
    places = _checked(indices, (size,), validate_indices)
    return x.gather(axis, torch.where(places < 0, places + size, places))


@op("gather_nd")
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Parts of ``x`` at the vectors that the last dimension of ``indices`` holds; batch dimensions go together.

    The result has indices.shape[:-1] + x.shape[batch_dims + indices.shape[-1]:].
    """
    depth = indices.shape[-1]
    places = _checked(indices, x.shape[batch_dims : batch_dims + depth], validate_indices)
    return x[_batches(x.shape[:batch_dims], places.dim() - 1) + places.unbind(-1)]


def _divided(data: Tensor, places: Tensor, updates: Tensor) -> Tensor:
    """Divided by all updates of a place; whole numbers are cut off towards zero."""
    product = torch.ones_like(data).scatter_reduce(0, places, updates, "prod")
    return data.div(product, rounding_mode=None if data.is_floating_point() else "trunc")


_MODES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "update": lambda data, places, updates: data.scatter(0, places, updates),
    "add": lambda data, places, updates: data.scatter_add(0, places, updates),
    "sub": lambda data, places, updates: data.scatter_add(0, places, -updates),
    "mul": lambda data, places, updates: data.scatter_reduce(0, places, updates, "prod"),
    "div": _divided,
    "max": lambda data, places, updates: data.scatter_reduce(0, places, updates, "amax"),
    "min": lambda data, places, updates: data.scatter_reduce(0, places, updates, "amin"),
}


def _scattered(data: Tensor, updates: Tensor, mode: str, places_of: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of ``data`` into which ``updates`` went where ``places_of`` would gather them from.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _MODES:
        raise ValueError(f"mode {mode} is unknown; known are {', '.join(_MODES)}")
    places = places_of(torch.arange(data.numel()).reshape(data.shape))
    return _MODES[mode](data.reshape(-1), places.reshape(-1), updates.reshape(-1)).reshape(data.shape)


@op("scatter")
def scatter(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``updates`` go to ``indices`` [C] of ``data`` along ``axis``; several of the same place all count."""
    return _scattered(data, updates, mode, lambda x: gather(x, indices, axis, 0, validate_indices))


@op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``updates`` go to ``data``, each with an index of its own along ``axis``."""
    return _scattered(data, updates, mode, lambda x: gather_along_axis(x, indices, axis, validate_indices))


@op("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    """``updates`` go to the parts of ``data`` at the vectors that the last dimension of ``indices`` holds."""
    return _scattered(data, updates, mode, lambda x: gather_nd(x, indices, 0, validate_indices))
