"""States: a box that holds one tensor, and that lives as long as its caller wants."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeattn.targets.coreml.mil.registry import op


@op("read_state", moves=True)
def read_state(input: Any) -> Tensor:
    """What the state holds."""
    held: Tensor = input[0]
    return held


@op("write_state")
def write_state(input: Any, data: Tensor) -> tuple[()]:
    """Let the state hold something else; it gives no output."""
    input[0] = data
    return ()
