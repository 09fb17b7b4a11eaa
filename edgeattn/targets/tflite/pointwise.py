"""1x1 convolutions as FULLY_CONNECTED, the only operator whose int4 weights LiteRT's fast kernels multiply."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.tflite import flatbuffer


def is_pointwise(model: Any, graph: Any, operator: Any) -> bool:
    """A CONV_2D of 1x1 constant weights with stride 1 and without groups."""
    if flatbuffer.operator_name(model, operator) != "CONV_2D":
        return False
    weights, options = graph.tensors[operator.inputs[1]], operator.builtinOptions
    return (
        flatbuffer.is_constant(model, graph, operator.inputs[1])
        and all(n == 1 for n in (*weights.shape[1:3], options.strideH, options.strideW))
        and weights.shape[3] == graph.tensors[operator.inputs[0]].shape[3]
    )


def connect(model: Any, outputs: Collection[tuple[int, int]]) -> None:
    """Make FULLY_CONNECTED of CONV_2D, in place.

    Given: convolutions (B, H, W, C) -> (B, H, W, D) for which ``is_pointwise``. Result: the same product over the last
    axis.

    Args:
        outputs: number of the graph, and of the tensor that the convolution makes.
    """
    for number, graph in enumerate(model.subgraphs):
        for operator in graph.operators:
            if (number, int(operator.outputs[0])) not in outputs:
                continue
            flags = schema.FullyConnectedOptionsT()
            flags.fusedActivationFunction, flags.keepNumDims = operator.builtinOptions.fusedActivationFunction, True
            # Version 5 is the first that keeps the number of axes and takes a bias or none.
            operator.opcodeIndex = flatbuffer.code_of(model, "FULLY_CONNECTED", 5)
            operator.builtinOptions = flags
            operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
            weights = graph.tensors[operator.inputs[1]]
            weights.shape = [int(weights.shape[0]), int(weights.shape[3])]
