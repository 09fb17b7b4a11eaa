"""Integers for weights and data, by ai-edge-quantizer: what, and with which ranges, is the plan's to say."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.core.errors import CheckFailed, ConversionFailed
from edgeattn.core.quiet import quiet
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import MOST_BIAS_STEPS
from edgeattn.targets.base import LowerPlan, Tensor
from edgeattn.targets.tflite import TFLITE_RUNTIME, flatbuffer
from edgeattn.targets.tflite.operations import FLOAT, MEASURED, How, Operation, operations
from edgeattn.targets.tflite.pointwise import connect, is_pointwise
from edgeattn.targets.tflite.ranges import measure

#: What a precision is made of, in words.
_NUMBERS = {"w8a8": "int8 weights and data", "w8": "int8 weights", "w4": "int4 weights"}
#: A scale that float16 holds, small beside ``operations.LEAST_SCALE``.
NEXT_TO_ZERO = 2.0**-22
_NUMBERED = re.compile(r"\d+\.\d+\.")


def _number(model: Any) -> dict[str, str]:
    """Name every tensor by its graph and number: the quantizer finds operations and ranges by names of the whole file.

    Returns:
        The names that they had.
    """
    names = {}
    for number, graph in enumerate(model.subgraphs):
        for index, tensor in enumerate(graph.tensors):
            names[f"{number}.{index}."] = flatbuffer.text(tensor.name)
            tensor.name = f"{number}.{index}.".encode()
    return names


def _name(model: Any, names: Mapping[str, str]) -> None:
    """The opposite; what the quantizer added is named after what it was made of, and after that."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            own = _NUMBERED.match(flatbuffer.text(tensor.name))
            if own:
                tensor.name = (names[own[0]] + flatbuffer.text(tensor.name)[own.end() :]).encode()


def _add(worker: Any, operation: Operation) -> None:
    """Tell the quantizer about one operation."""
    from ai_edge_quantizer import qtyping

    how = operation.how
    assert how is not None
    scale = qtyping.QuantGranularity
    granularity = scale[f"BLOCKWISE_{how.block}"] if how.block else scale.TENSORWISE if how.one_scale else (
        scale.CHANNELWISE
    )  # fmt: skip
    names = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}
    kind = qtyping.TFLOperationName(names.get(operation.kind, operation.kind))
    # An operation is found by its output's name, with a semicolon behind it.
    regex = f"^{re.escape(f'{operation.graph}.{operation.output}.')};$"
    if how.data == MEASURED:
        worker.add_static_config(regex, kind, 8, how.bits, granularity)
    elif how.data == FLOAT:
        worker.add_weight_only_config(regex, kind, how.bits, granularity)
    else:
        worker.add_dynamic_config(regex, kind, how.bits, granularity)


def _integers(model: Any, found: Sequence[Operation], ranges: Mapping[tuple[int, int], tuple[float, float]]) -> Any:
    """The model with these operations in integers."""
    from ai_edge_quantizer import quantizer

    names = _number(model)
    worker = quantizer.Quantizer(bytearray(flatbuffer.write(model)))
    for operation in found:
        _add(worker, operation)
    known = {}
    for (graph, tensor), (low, high) in ranges.items():
        shape = (1,) * len(model.subgraphs[graph].tensors[tensor].shape)
        # A tensor of nothing but zeros has a range of no width, which gives no scale.
        ends = {"min": low, "max": high if high > low else low + 1.0}
        known[f"{graph}.{tensor}."] = {key: np.full(shape, end, np.float32) for key, end in ends.items()}
    made = worker.quantize(known or None, enable_progress_bar=False, enable_progress_report=False)
    quantized = flatbuffer.read(bytes(made.quantized_model))
    _name(quantized, names)
    return quantized


def _apart(model: Any, found: Sequence[Operation]) -> None:
    """Give operations that share weights, but store them in several ways, their own: the quantizer fails at it."""
    at = {(o.graph, o.output): o.how for o in found}
    for number, graph in enumerate(model.subgraphs):
        ways: dict[int, dict[How | None, int]] = {}
        for operator in graph.operators:
            key = (number, int(operator.outputs[0]))
            if key not in at:
                continue
            shared = int(operator.inputs[1])
            known = ways.setdefault(shared, {at[key]: shared})
            if at[key] not in known:
                one, buffer = copy(graph.tensors[shared]), schema.BufferT()
                buffer.data, one.buffer = model.buffers[one.buffer].data, len(model.buffers)
                model.buffers.append(buffer)
                known[at[key]] = len(graph.tensors)
                graph.tensors.append(one)
            operator.inputs = [known[at[key]] if i == 1 else int(t) for i, t in enumerate(operator.inputs)]


def _fill_empty_blocks(model: Any, found: Sequence[Operation]) -> None:
    """In a block of zeros one weight becomes next to 0: its scale would be one that float16 does not hold."""
    blocks = {(o.graph, o.output): o.how.block for o in found if o.how is not None and o.how.block}
    for number, graph in enumerate(model.subgraphs):
        for operator in graph.operators:
            block = blocks.get((number, int(operator.outputs[0])))
            if block is None:
                continue
            buffer = model.buffers[graph.tensors[operator.inputs[1]].buffer]
            weights = np.frombuffer(bytes(buffer.data), np.float32).reshape(-1, block).copy()
            empty = np.abs(weights).max(axis=1) < 7 * NEXT_TO_ZERO
            if empty.any():
                weights[empty] = 0.0
                weights[empty, 0] = 7 * NEXT_TO_ZERO
                buffer.data = np.frombuffer(weights.tobytes(), np.uint8)


def _hold_biases(
    model: Any, measured: Sequence[Operation], ranges: Mapping[tuple[int, int], tuple[float, float]]
) -> None:
    """Where a bias, in steps of the data's scale times the weights', would leave int32, the largest weight is raised.

    The quantizer clips it, and a channel of tiny weights, as behind a batch norm that switched it off, loses what it
    lives by. The weight makes of the largest datum 1.5e-5 of the bias.
    """
    at = {(o.graph, o.output): o for o in measured}
    for number, graph in enumerate(model.subgraphs):
        for operator in graph.operators:
            operation = at.get((number, int(operator.outputs[0])))
            if operation is None or len(operator.inputs) < 3:
                continue
            if not flatbuffer.is_constant(model, graph, operator.inputs[2]):
                continue
            tensors = [graph.tensors[operator.inputs[i]] for i in (1, 2)]
            weight, bias = (np.frombuffer(bytes(model.buffers[t.buffer].data), np.float32) for t in tensors)
            last = operation.kind == "DEPTHWISE_CONV_2D"
            shape = (-1, len(bias)) if last else (len(bias), -1)
            rows = weight.reshape(shape).T.copy() if last else weight.reshape(shape).copy()
            low, high = ranges[number, operation.data]
            step = (max(high, 0.0) - min(low, 0.0)) / 255 or 1.0
            least = 127 * np.abs(bias) / (step * MOST_BIAS_STEPS)
            places = np.arange(len(rows)), np.abs(rows).argmax(axis=1)
            raised = np.abs(rows[places]) < least
            if raised.any():
                rows[places] = np.where(raised, np.copysign(least, rows[places]), rows[places])
                data = np.ascontiguousarray(rows.T if last else rows).tobytes()
                model.buffers[tensors[0].buffer].data = np.frombuffer(data, np.uint8)


def _refuse(plan: LowerPlan) -> None:
    """Raises ConversionFailed for what tflite-runtime computes wrong, or not at all."""
    if plan.precision == "w4" and plan.runtime == TFLITE_RUNTIME:
        raise ConversionFailed(
            "tflite-runtime cannot multiply int4 weights",
            value="w4",
            why="2.14.0 gives other numbers for blocks of them without an error, and does not unpack them",
            fix="--precision w8; or a device that has ai-edge-litert",
        )


def quantize(
    model: Any, plan: LowerPlan, inputs: Mapping[str, Sequence[Tensor]], tables: Collection[bytes] = ()
) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The model in the plan's precision, and what is worth knowing of each entry.

    Args:
        model: in float32, fresh from the converter. inputs: of every entry, see ``ranges.measure``.
        tables: see ``computed_tables``.

    Raises:
        ConversionFailed: the quantizer cannot take it, or the runtime would compute it wrong.
        CheckFailed: there is nothing to quantize, or nothing to measure ranges on.
    """
    _refuse(plan)
    quant = plan.quant if plan.quant.quantizes else QuantPlan(plan.precision)
    _connect(model, quant)
    found = operations(model, quant, plan.runtime, tables)
    chosen = [operation for operation in found if operation.how is not None]
    if not chosen:
        raise CheckFailed(
            "there is nothing to quantize",
            value=plan.precision,
            why="no operation with constant weights is left to it",
            fix="--precision fp16, or keep fewer modules in floats",
        )
    measured = [o for o in chosen if o.how is not None and o.how.data == MEASURED]
    ranges = {}
    if measured:
        wanted = {(o.graph, tensor) for o in measured for tensor in (o.data, o.output)}
        ranges = measure(model, wanted, inputs, plan.calibration or plan.samples, quant.observer)
        _hold_biases(model, measured, ranges)
    _apart(model, found)
    _fill_empty_blocks(model, chosen)
    try:
        with quiet():
            made = _integers(model, chosen, ranges)
    except Exception as error:
        raise ConversionFailed(
            "the quantizer failed",
            value=plan.precision,
            why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:400],
            fix="--precision fp16 or fp32",
        ) from error
    return made, {entry: _facts(model, entry, found, quant) for entry in inputs}


def _connect(model: Any, quant: QuantPlan) -> None:
    """1x1 convolutions whose weights will be int4 as fully connected layers."""
    pointwise = {
        (number, int(operator.outputs[0]))
        for number, graph in enumerate(model.subgraphs)
        for operator in graph.operators
        if is_pointwise(model, graph, operator)
    }
    small = {(o.graph, o.output) for o in operations(model, quant, "") if o.scheme.weights == 4 and o.how is not None}
    connect(model, pointwise & small)


def _facts(model: Any, entry: str, found: Iterable[Operation], quant: QuantPlan) -> dict[str, Any]:
    number = flatbuffer.signature(model, entry).subgraphIndex
    own = [operation for operation in found if operation.graph == number]
    left = [operation for operation in own if operation.how is None]
    return {
        "numbers": _NUMBERS[quant.precision],
        "operations": [operation.fact() for operation in own if operation.how is not None],
        "left_in_floats": [operation.name for operation in left],
        "modules_in_floats": sorted({operation.module for operation in left}),
    }
