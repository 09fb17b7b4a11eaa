"""Control flow: operations that run blocks of others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Call, Tensors, op


@op("cond")
def cond(pred: Tensor, call: Call) -> tuple[Any, ...]:
    """Results of the first block where ``pred`` holds, of the second one otherwise."""
    chosen = call.blocks[0] if bool(pred) else call.blocks[1]
    return tuple(chosen(()))


@op("while_loop")
def while_loop(loop_vars: Tensors, call: Call) -> tuple[Any, ...]:
    """Replace the variables by the second block's results of them, as long as the first block's result holds."""
    holds, body = call.blocks
    variables: list[Any] = list(loop_vars)
    while bool(holds(variables)[0]):
        variables = body(variables)
    return tuple(variables)
