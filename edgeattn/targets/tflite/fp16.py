"""Weights in float16, by a cast of our own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.tflite import TFLITE_RUNTIME, flatbuffer
from edgeattn.targets.tflite.flatbuffer import digest

#: Weights with fewer elements than this stay in float32: a bias is no size to speak of, and its digits are cheap.
FEW = 256

_LARGEST_HALF = float(np.finfo(np.float16).max)


def to_fp16(model: Any, runtime: str = "", tables: Collection[bytes] = ()) -> int:
    """Store weights in float16, each with a DEQUANTIZE in front of the operations that read it.

    Given: a float32 model. Result: the same with every float32 constant of ``FEW`` elements or more in half its bytes;
    runtimes unpack it once at load, and compute in float32. Of a table of embeddings they unpack the rows that are
    looked up alone, after that, unless it is multiplied with as well. Constants beyond float16's range stay.

    Args:
        runtime: that the file is made for; tflite-runtime looks nothing up in float16. tables: see ``computed_tables``;
            those that are looked up in stay.

    Returns:
        The number of weights that were cast.
    """
    halves: dict[int, int] = {}  # buffers of float32 -> of float16
    count = 0
    for graph in model.subgraphs:
        outside = {*graph.inputs, *graph.outputs}
        looked = [o for o in graph.operators if flatbuffer.operator_name(model, o) == "EMBEDDING_LOOKUP"]
        kept = {int(o.inputs[1]) for o in looked if _digest(model, graph, o.inputs[1]) in tables}
        before, after = [], {}
        for index in range(len(graph.tensors)):
            tensor = graph.tensors[index]
            data = model.buffers[tensor.buffer].data
            if tensor.type != schema.TensorType.FLOAT32 or data is None or index in outside or index in kept:
                continue
            values = np.frombuffer(bytes(data), np.float32)
            if values.size < FEW or not np.isfinite(values).all() or np.abs(values).max() > _LARGEST_HALF:
                continue
            if tensor.buffer not in halves:
                buffer = schema.BufferT()
                buffer.data = np.frombuffer(values.astype(np.float16).tobytes(), np.uint8)
                halves[tensor.buffer] = len(model.buffers)
                model.buffers.append(buffer)
            half = _half(graph, tensor, halves[tensor.buffer])
            for operator in looked if runtime != TFLITE_RUNTIME else ():
                if operator.inputs[1] == index:
                    row = _half(graph, graph.tensors[operator.outputs[0]], 0)
                    after[int(operator.outputs[0])] = _unpack(model, row, operator.outputs[0])
                    operator.inputs, operator.outputs = [operator.inputs[0], half], [row]
            before.append(_unpack(model, half, index))
            tensor.buffer = 0  # by convention the empty one
            count += 1
        read = {int(t) for o in graph.operators for t in o.inputs}
        before = [o for o in before if int(o.outputs[0]) in read]
        rows = {int(o.inputs[0]): o for o in after.values()}
        graph.operators = [
            o for each in [*before, *graph.operators] for o in (each, rows.get(int(each.outputs[0]))) if o is not None
        ]
    still_read = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    for index in set(halves) - still_read:
        model.buffers[index].data = None
    return count


def _digest(model: Any, graph: Any, tensor: int) -> bytes:
    data = model.buffers[graph.tensors[tensor].buffer].data
    return b"" if data is None else digest(data)


def _half(graph: Any, tensor: Any, buffer: int) -> int:
    """Number of a new tensor, like one of float32."""
    half = schema.TensorT()
    half.name = flatbuffer.text(tensor.name).encode() + b"_fp16"
    half.shape, half.type, half.buffer = tensor.shape, schema.TensorType.FLOAT16, buffer
    graph.tensors.append(half)
    return len(graph.tensors) - 1


def _unpack(model: Any, half: int, whole: int) -> Any:
    """The operation that makes float32 of float16; version 3 is the first that takes it."""
    unpack = schema.OperatorT()
    unpack.opcodeIndex = flatbuffer.code_of(model, "DEQUANTIZE", 3)
    unpack.inputs, unpack.outputs = [half], [whole]
    return unpack
