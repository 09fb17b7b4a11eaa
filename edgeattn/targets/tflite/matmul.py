"""Products of two computed tensors as BATCH_MATMUL, which XNNPACK takes, with operands that are not copied first."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.tflite import flatbuffer


def _shape(graph: Any, tensor: int) -> list[int]:
    return [int(n) for n in graph.tensors[tensor].shape]


def _without_ones(shape: list[int]) -> list[int]:
    """Without the ones in front of a matrix."""
    lead = next((i for i, n in enumerate(shape[:-2]) if n != 1), max(len(shape) - 2, 0))
    return shape[lead:]


def matmuls(model: Any) -> int:
    """Replace fully connected layers whose weights are computed, in place.

    Given: FULLY_CONNECTED(x (..., N, K), w (M, K)) where w is no constant, without bias or activation: attention with a
    single head, or over a cache that is one input. XNNPACK wants constant weights there. Result: BATCH_MATMUL(x, w)
    with the second one transposed, which it takes. A product that the converter got wrong, of a swapped x, becomes
    right.

    Returns:
        The number that was replaced.
    """
    count = 0
    for graph in model.subgraphs:
        after: dict[int, Any] = {}
        for place, operator in enumerate(graph.operators):
            if flatbuffer.operator_name(model, operator) != "FULLY_CONNECTED":
                continue
            options, (x, w, *bias) = operator.builtinOptions, operator.inputs
            computed = w in set(graph.inputs) or not flatbuffer.is_constant(model, graph, w)
            plain = options.fusedActivationFunction == schema.ActivationFunctionType.NONE and not any(
                b >= 0 for b in bias
            )
            given, weights, made = (_shape(graph, t) for t in (x, w, operator.outputs[0]))
            float32 = all(graph.tensors[t].type == schema.TensorType.FLOAT32 for t in (x, w))
            straight = given[-1] == weights[1] and _without_ones(made) == _without_ones([*given[:-1], weights[0]])
            # litert-torch 0.10 takes a swap of x into the layer, which has no flag for it: LiteRT does not load that.
            swapped = given[-1] != weights[1] and made == [*given[:-2], given[-1], weights[0]]
            if not (computed and plain and float32 and (straight or swapped)):
                continue
            flags = schema.BatchMatMulOptionsT()
            flags.adjX, flags.adjY = bool(swapped), True
            operator.opcodeIndex = flatbuffer.code_of(model, "BATCH_MATMUL", 1)
            operator.inputs = [x, w]
            operator.builtinOptions, operator.builtinOptionsType = flags, schema.BuiltinOptions.BatchMatMulOptions
            if straight and len(given) != len(made):
                after[place] = _reshaped(model, graph, operator, [*given[:-1], weights[0]])
            count += 1
        graph.operators = [o for i, each in enumerate(graph.operators) for o in (each, after.get(i)) if o is not None]
    return count


def _reshaped(model: Any, graph: Any, operator: Any, shape: list[int]) -> Any:
    """Let an operator make a tensor of that shape; what is returned makes the old one of it, as yet in no graph."""
    old = graph.tensors[operator.outputs[0]]
    made, wanted, sizes = schema.TensorT(), schema.TensorT(), schema.BufferT()
    made.name, made.shape, made.type, made.buffer = old.name, shape, old.type, 0
    sizes.data = np.frombuffer(np.asarray(old.shape, np.int32).tobytes(), np.uint8)
    wanted.name, wanted.shape = f"shape of {flatbuffer.text(old.name)}".encode(), [len(old.shape)]
    wanted.type, wanted.buffer = schema.TensorType.INT32, len(model.buffers)
    model.buffers.append(sizes)
    old.name = f"{flatbuffer.text(old.name)}#".encode()
    after, options = schema.OperatorT(), schema.ReshapeOptionsT()
    options.newShape = [int(n) for n in old.shape]
    after.opcodeIndex = flatbuffer.code_of(model, "RESHAPE", 1)
    after.builtinOptions, after.builtinOptionsType = options, schema.BuiltinOptions.ReshapeOptions
    number = len(graph.tensors)
    after.inputs, after.outputs = [number, number + 1], [operator.outputs[0]]
    graph.tensors += [made, wanted]
    operator.outputs = [number]
    return after


def whole_inputs(model: Any) -> int:
    """Let products read an input as it lies, in place.

    Given: BATCH_MATMUL of a matrix (P, C) that is RESHAPE of an input (1, P, C), a decoder's cache. XNNPACK copies it
    for that in every run: 0.6 ms for 8 MB. Result: BATCH_MATMUL of the input itself, and RESHAPE of the smaller result.

    Returns:
        The number of operands that were replaced.
    """
    count = 0
    for graph in model.subgraphs:
        inputs, readers = {int(i) for i in graph.inputs}, defaultdict(list)
        for operator in graph.operators:
            for tensor in operator.inputs:
                readers[int(tensor)].append(operator)
        whole: dict[int, int] = {}
        for operator in graph.operators:
            source, made = int(operator.inputs[0]), int(operator.outputs[0])
            if flatbuffer.operator_name(model, operator) != "RESHAPE" or source not in inputs:
                continue
            products = all(flatbuffer.operator_name(model, o) == "BATCH_MATMUL" for o in readers[made])
            unwrapped = _shape(graph, source) == [1, *_shape(graph, made)] and len(_shape(graph, made)) == 2
            if products and unwrapped and made not in graph.outputs:
                whole[made] = source
        after: dict[int, Any] = {}
        for place, operator in enumerate(graph.operators):
            found = [int(t) for t in operator.inputs if int(t) in whole]
            if not found or flatbuffer.operator_name(model, operator) != "BATCH_MATMUL":
                continue
            operator.inputs = [whole.get(int(t), int(t)) for t in operator.inputs]
            shape = _shape(graph, operator.outputs[0])
            if len(shape) == 2:
                after[place] = _reshaped(model, graph, operator, [1, *shape])
            count += len(found)
        graph.operators = [
            o
            for i, each in enumerate(graph.operators)
            for o in (each, after.get(i))
            if o is not None and int(o.outputs[0]) not in whole
        ]
    return count
