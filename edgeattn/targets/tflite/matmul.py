"""Products of two computed tensors as BATCH_MATMUL, where the converter makes a fully connected layer of them."""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.tflite import flatbuffer


def matmuls(model: Any) -> int:
    """Replace fully connected layers whose weights are computed, in place.

    Given: FULLY_CONNECTED(x (..., N, K), w (M, K)) where w is no constant, without bias or activation: attention with a
    single head. XNNPACK wants constant weights there. Result: BATCH_MATMUL(x, w) with the second one transposed, which
    it takes. A product that the converter got wrong, of a swapped x, becomes right.

    Returns:
        The number that was replaced.
    """
    code = None
    count = 0
    for graph in model.subgraphs:
        inputs = set(graph.inputs)
        for operator in graph.operators:
            if flatbuffer.operator_name(model, operator) != "FULLY_CONNECTED":
                continue
            options, (x, w, *bias) = operator.builtinOptions, operator.inputs
            computed = w in inputs or not flatbuffer.is_constant(model, graph, w)
            plain = options.fusedActivationFunction == schema.ActivationFunctionType.NONE and not any(
                b >= 0 for b in bias
            )
            shapes = [list(graph.tensors[t].shape) for t in (x, w, operator.outputs[0])]
            float32 = all(graph.tensors[t].type == schema.TensorType.FLOAT32 for t in (x, w))
            straight = shapes[2] == [*shapes[0][:-1], shapes[1][0]]
            # litert-torch 0.10 takes a swap of x into the layer, which has no flag for it: LiteRT does not load that.
            swapped = shapes[0][-1] != shapes[1][-1] and shapes[2] == [*shapes[0][:-2], shapes[0][-1], shapes[1][0]]
            if not (computed and plain and float32 and (straight or swapped)):
                continue
            if code is None:
                code = len(model.operatorCodes)
                made = schema.OperatorCodeT()
                made.builtinCode = made.deprecatedBuiltinCode = schema.BuiltinOperator.BATCH_MATMUL
                made.version = 1
                model.operatorCodes.append(made)
            flags = schema.BatchMatMulOptionsT()
            flags.adjX, flags.adjY = bool(swapped), True
            operator.opcodeIndex, operator.inputs = code, [x, w]
            operator.builtinOptions, operator.builtinOptionsType = flags, schema.BuiltinOptions.BatchMatMulOptions
            count += 1
    return count
