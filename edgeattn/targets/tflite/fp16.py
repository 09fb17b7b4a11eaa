"""Weights in float16, by a cast of our own."""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.tflite import flatbuffer

#: Weights with fewer elements than this stay in float32: a bias is no size to speak of, and its digits are cheap.
FEW = 256

_LARGEST_HALF = float(np.finfo(np.float16).max)


def to_fp16(model: Any) -> int:
    """Store weights in float16, each with a DEQUANTIZE in front of the operations that read it.

    Given: a float32 model. Result: the same with every float32 constant of ``FEW`` elements or more in half its bytes;
    runtimes unpack it once at load, and compute in float32. Constants beyond float16's range stay.

    Returns:
        The number of weights that were cast.
    """
    dequantize = schema.OperatorCodeT()
    dequantize.builtinCode = dequantize.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    dequantize.version = 3  # the first that takes float16
    code = len(model.operatorCodes)
    halves: dict[int, int] = {}  # buffers of float32 -> of float16
    count = 0
    for graph in model.subgraphs:
        outside = {*graph.inputs, *graph.outputs}
        before = []
        for index in range(len(graph.tensors)):
            tensor = graph.tensors[index]
            data = model.buffers[tensor.buffer].data
            if tensor.type != schema.TensorType.FLOAT32 or data is None or index in outside:
                continue
            values = np.frombuffer(bytes(data), np.float32)
            if values.size < FEW or not np.isfinite(values).all() or np.abs(values).max() > _LARGEST_HALF:
                continue
            if tensor.buffer not in halves:
                buffer = schema.BufferT()
                buffer.data = np.frombuffer(values.astype(np.float16).tobytes(), np.uint8)
                halves[tensor.buffer] = len(model.buffers)
                model.buffers.append(buffer)
            half = schema.TensorT()
            half.name = flatbuffer.text(tensor.name).encode() + b"_fp16"
            half.shape, half.type, half.buffer = tensor.shape, schema.TensorType.FLOAT16, halves[tensor.buffer]
            unpack = schema.OperatorT()
            unpack.opcodeIndex, unpack.inputs, unpack.outputs = code, [len(graph.tensors)], [index]
            graph.tensors.append(half)
            before.append(unpack)
            tensor.buffer = 0  # by convention the empty one
            count += 1
        graph.operators = [*before, *graph.operators]
    if count:
        model.operatorCodes.append(dequantize)
    still_read = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    for index in set(halves) - still_read:
        model.buffers[index].data = None
    return count
