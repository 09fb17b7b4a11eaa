"""Lists of tensors of one shape. A list is a Python list that no operation changes in place.

Elements that nothing was written to are zeros; where the shape was left open they are None until the first write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Call, Ints, Tensors, carrier, op


@op("make_list")
def make_list(
    call: Call, elem_shape: Tensors, init_length: int = 1, dynamic_length: bool = True, dtype: str = "fp32"
) -> list[Tensor | None]:
    """So many zeros of a shape; a text in ``elem_shape`` stands for a size that the first write tells.

    Whether the length may change says nothing here: a write beyond it would be an error only of the model.
    """
    if any(isinstance(size, str) for size in elem_shape):
        return [None] * init_length
    shape = [int(size) for size in elem_shape]
    return [torch.zeros(shape, dtype=carrier(dtype, call.mode))] * init_length


@op("list_length")
def list_length(ls: Any) -> Tensor:
    """How many elements there are."""
    return torch.tensor(len(ls), dtype=torch.int32)


@op("list_read")
def list_read(ls: Any, index: int) -> Tensor:
    """The element at a place.

    Raises:
        ValueError: its shape is open, and nothing was written.
    """
    element: Tensor | None = ls[index]
    if element is None:
        raise ValueError("a list whose shape is open is read before it is written")
    return element


@op("list_write")
def list_write(ls: Any, index: int, value: Tensor) -> list[Tensor]:
    """The list with another element at a place; zeros fill it up to a place beyond its end."""
    return list_scatter(ls, (index,), value.unsqueeze(0))


@op("list_gather")
def list_gather(ls: Any, indices: Ints) -> Tensor:
    """The elements at ``indices`` [K], stacked to [K, *shape]; an error as at ``list_read``."""
    return torch.stack([list_read(ls, index) for index in indices])


@op("list_scatter")
def list_scatter(ls: Any, indices: Ints, value: Tensor) -> list[Tensor]:
    """The list with ``value[i]`` at ``indices[i]``; zeros fill it up to places beyond its end."""
    zeros = value.new_zeros(value.shape[1:])
    longer = ls + [zeros] * (max(indices, default=-1) + 1 - len(ls))
    changed = [zeros if element is None else element for element in longer]
    for index, element in zip(indices, value, strict=True):
        changed[index] = element
    return changed
