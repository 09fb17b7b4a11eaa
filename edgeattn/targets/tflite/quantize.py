"""Smaller weights: float16 by our own cast of every weight, int8 by ai-edge-quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.core.errors import ConversionFailed
from edgeattn.targets.base import LowerPlan
from edgeattn.targets.tflite import TFLITE_RUNTIME, flatbuffer

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


def _kinds(runtime: str) -> dict[Any, Any]:
    """Which operators get int8 weights, and whether with one scale a channel or one a tensor.

    LiteRT computes all of them right with one a channel. Measured of tflite-runtime 2.14.0, relative L2 of one layer:

    =================== ============= ============
    operator            one a channel one a tensor
    =================== ============= ============
    FULLY_CONNECTED     0.997, wrong  0.009
    BATCH_MATMUL        1.0, wrong    0.012
    EMBEDDING_LOOKUP    1.0, wrong    0.009
    CONV_2D             0.007         0.010, with groups 0.92
    DEPTHWISE_CONV_2D   0.008         not finite
    TRANSPOSE_CONV      not loaded    not loaded
    =================== ============= ============
    """
    from ai_edge_quantizer import qtyping

    of, scale = qtyping.TFLOperationName, qtyping.QuantGranularity
    if runtime != TFLITE_RUNTIME:
        return {of.ALL_SUPPORTED: scale.CHANNELWISE}
    return {
        **dict.fromkeys((of.CONV_2D, of.DEPTHWISE_CONV_2D), scale.CHANNELWISE),
        **dict.fromkeys((of.FULLY_CONNECTED, of.BATCH_MATMUL, of.EMBEDDING_LOOKUP), scale.TENSORWISE),
    }


def _int8(model: Any, runtime: str) -> Any:
    """int8 weights, whose activations are quantized as the program runs."""
    from ai_edge_quantizer import quantizer

    worker = quantizer.Quantizer(bytearray(flatbuffer.write(model)))
    for kind, granularity in _kinds(runtime).items():
        worker.add_dynamic_config(regex=".*", operation_name=kind, num_bits=8, granularity=granularity)
    return flatbuffer.read(bytes(worker.quantize().quantized_model))


def quantize(model: Any, plan: LowerPlan) -> Any:
    """The model in the plan's precision.

    Raises:
        ConversionFailed: the quantizer cannot take it.
    """
    if plan.precision == "fp16":
        to_fp16(model)
        return model
    try:
        return _int8(model, plan.runtime)
    except Exception as error:
        raise ConversionFailed(
            "the quantizer failed",
            value=plan.precision,
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400],
            fix="--precision fp16 or fp32",
        ) from error
