"""Integers of a .tflite file as the floats that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.core.numerics import Array


def in_floats(tensor: Any, value: Array) -> Array:
    """A tensor's numbers: floats as they are, integers times their scale if they have one.

    Args:
        tensor: the schema's, with one scale or one for each index of an axis.
    """
    quantization = tensor.quantization
    scales = None if quantization is None else quantization.scale
    if value.dtype.kind == "f" or scales is None or not len(scales):
        return value
    shape = [1] * value.ndim
    if len(scales) > 1:
        shape[quantization.quantizedDimension] = -1
    zeros = np.reshape(np.asarray(quantization.zeroPoint, np.float32), shape if len(scales) > 1 else ())
    each = np.reshape(np.asarray(scales, np.float32), shape if len(scales) > 1 else ())
    back: Array = (value.astype(np.float32) - zeros) * each
    return back


def _four(data: Any, count: int) -> Array:
    """int4 numbers, two in a byte, the first in its lower half."""
    packed = np.frombuffer(bytes(data), np.uint8)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
    both: Array = (halves ^ 8) - 8
    return both


def unpack(model: Any) -> int:
    """Turn int4 weights into the float32 numbers that they stand for, in place.

    Without XNNPACK, LiteRT 2.3.0's own FULLY_CONNECTED takes no notice of the scales of blocks: relative L2 of the
    logits 0.75 on ``fmvit-digits``, where XNNPACK's has 0.09, without an error.

    Returns:
        The number of weights.
    """
    count = 0
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if tensor.type != schema.TensorType.INT4 or data is None or not len(data):
                continue
            shape = [int(n) for n in tensor.shape]
            values: Array = _four(data, int(np.prod(shape))).reshape(shape)
            details = tensor.quantization.details
            if isinstance(details, schema.BlockwiseQuantizationT):
                stored = model.buffers[graph.tensors[details.scales].buffer].data
                scales = np.frombuffer(bytes(stored), np.float16).astype(np.float32).reshape(*shape[:-1], -1)
                values = values * np.repeat(scales, details.blockSize, axis=-1)
            else:
                values = in_floats(tensor, values)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values, np.float32).tobytes(), np.uint8)
            tensor.buffer, tensor.type, tensor.quantization = len(model.buffers), schema.TensorType.FLOAT32, None
            model.buffers.append(buffer)
            count += 1
    return count
