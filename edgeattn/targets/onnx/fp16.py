"""Float16 storage for an ONNX graph, with the operations that do not survive it kept in float32.

What is kept is found by measuring on samples: first every tensor whose float32 values come within a factor of two of
float16's largest number, and every small constant that float16 rounds to 0; then, run by run, the first operation
whose float16 result is not finite or far from its float32 one although its inputs are near. No list of operation
names decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgeattn.core.numerics import Array, compare
from edgeattn.targets.base import TraceValue
from edgeattn.targets.onnx.runtime import module_of, trace_model

#: Largest finite float16.
LARGEST = 65504.0
#: Samples are not all inputs: a tensor that reaches half of ``LARGEST`` on them is kept in float32.
HEADROOM = 2.0
#: An operation whose relative L2 error exceeds this, and its inputs' error tenfold, is kept in float32.
JUMP = 2e-2
#: Half of the smallest float16 above 0: what is not larger is rounded to 0.
VANISHES = 2.0**-25
#: At most this many operations are added one by one after the measured ranges.
ROUNDS = 24

_HALF, _SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


@dataclass(frozen=True)
class Kept:
    """An operation kept in float32: its node, the torch module it came from, and what was measured."""

    node: str
    op: str
    module: str
    why: str

    def as_dict(self) -> dict[str, str]:
        """Plain data for the manifest."""
        return asdict(self)


def _peak(value: Array) -> float:
    """Largest finite magnitude; an attention mask of -inf is no overflow."""
    finite = np.abs(value[np.isfinite(value)])
    return float(finite.max()) if finite.size else 0.0


def _constant_peak(value: ir.Value) -> float:
    if value.const_value is None or value.dtype != _SINGLE:
        return 0.0
    return _peak(value.const_value.numpy())


def _sum_length(node: ir.Node) -> float:
    """How many terms a mean adds up before it divides: its sum, not its result, must fit."""
    if node.op_type not in ("ReduceMean", "GlobalAveragePool", "AveragePool") or not node.inputs[0]:
        return 1.0
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if node.op_type == "AveragePool":
        kernel = node.attributes["kernel_shape"].as_ints()
        return float(np.prod(kernel))
    if before is None or after is None or not all(isinstance(n, int) for n in (*before, *after)):
        return 1.0
    return float(np.prod([int(n) for n in before]) / max(1.0, float(np.prod([int(n) for n in after]))))  # type: ignore[arg-type]


def _out_of_range(node: ir.Node, peaks: Mapping[str, float]) -> str | None:
    limit = LARGEST / HEADROOM
    for value in node.inputs:
        if value is not None and _constant_peak(value) > LARGEST:
            return f"constant {value.name} reaches {_constant_peak(value):.3g}, float16 ends at {LARGEST:.0f}"
        if value is not None and peaks.get(str(value.name), 0.0) > limit:
            return f"input {value.name} reaches {peaks[str(value.name)]:.3g}, float16 ends at {LARGEST:.0f}"
    for value in node.outputs:
        peak = peaks.get(str(value.name), 0.0) * _sum_length(node)
        if peak > limit:
            return f"its result or its sum reaches {peak:.3g}, float16 ends at {LARGEST:.0f}"
    return None


def _float_inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs that are float32 tensors, single numbers left out."""
    floats = [v for v in node.inputs if v is not None and v.dtype == _SINGLE]
    return [v for v in floats if v.const_value is None or v.const_value.size > 1]


def _vanishing(model: ir.Model) -> list[tuple[ir.Node, str]]:
    """Operations with a constant that float16 rounds to 0, such as an epsilon of 1e-12, and what depends on it.

    Its use is to keep a divisor from 0, which samples need not show. Hence what consumes the result stays float32 too,
    through operations on that tensor alone, up to the first that joins it with another.
    """
    found: dict[int, tuple[ir.Node, str]] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.dtype != _SINGLE or value.const_value is None or value.const_value.size != 1:
                continue
            number = float(value.const_value.numpy().item())
            if number == 0 or abs(number) > VANISHES:
                continue
            why = f"constant {value.name} is {number:.3g}, float16 rounds it to 0"
            waiting = [node]
            while waiting:
                current = waiting.pop()
                if id(current) in found or current.graph is not model.graph:
                    continue
                found[id(current)] = (current, why)
                if current is node or len(_float_inputs(current)) == 1:
                    waiting += [use.node for output in current.outputs for use in output.uses()]
    return list(found.values())


def _makers(node: ir.Node, model: ir.Model) -> list[ir.Node]:
    """The nodes of ``model`` that compute the inputs of its node of the same name as ``node``."""
    own = next((n for n in model.graph if n.name == node.name), None)
    makers = [value.producer() for value in own.inputs if value is not None and value.dtype == _SINGLE] if own else []
    return [maker for maker in makers if maker is not None]


def _slots(node: ir.Node, opsets: Mapping[str, int]) -> tuple[list[bool], list[bool]] | None:
    """Which inputs and outputs of a node may be float16 by its operator schema; None if the node must stay float32."""
    if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}

    def formal(parameters: Sequence[Any], index: int) -> str:
        return str(parameters[min(index, len(parameters) - 1)].type_str)

    kinds = [formal(schema.inputs, i) for i in range(len(node.inputs))]
    half = {k for k in kinds if {"tensor(float16)", "tensor(float)"} <= allowed.get(k, set())}
    for kind, value in zip(kinds, node.inputs, strict=True):
        if value is not None and value.dtype == _SINGLE and kind not in half and kind != "tensor(float)":
            return None
    takes = [k in half for k in kinds]
    # An output whose type is not that of an input (Cast, Constant, ...) keeps the dtype that it declares.
    gives = [formal(schema.outputs, i) in half for i in range(len(node.outputs))]
    return takes, gives


def convert(model: ir.Model, keep: set[str]) -> None:
    """Store weights and tensors as float16 in place, except for the nodes named in ``keep``.

    Given a float32 graph; result: the same graph with float16 tensors, a Cast where the two meet, and inputs and
    outputs still float32 under their old names.
    """
    graph = model.graph
    casts: dict[tuple[int, ir.DataType], ir.Value] = {}
    nodes = list(graph)

    def as_type(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` itself, or its cast, made once and placed right behind its producer."""
        if value.dtype == dtype:
            return value
        key = (id(value), dtype)
        if key in casts:
            return casts[key]
        suffix = "fp16" if dtype == _HALF else "fp32"
        if value.is_initializer() and value.const_value is not None:
            data = value.const_value.numpy().astype(dtype.numpy())
            cast = ir.Value(
                name=f"{value.name}_{suffix}", type=ir.TensorType(dtype), shape=value.shape, const_value=ir.tensor(data)
            )
            graph.register_initializer(cast)
        else:
            node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_to_{suffix}")
            producer = value.producer()
            if producer is not None:
                if notes := producer.metadata_props.get("pkg.torch.onnx.name_scopes"):
                    node.metadata_props["pkg.torch.onnx.name_scopes"] = notes
                graph.insert_after(producer, node)
            else:
                graph.insert_before(graph[0], node)
            cast = node.outputs[0]
            cast.name, cast.type, cast.shape = f"{value.name}_{suffix}", ir.TensorType(dtype), value.shape
        casts[key] = cast
        return cast

    for node in nodes:
        slots = None if node.name in keep else _slots(node, model.opset_imports)
        for i, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_SINGLE, _HALF):
                continue
            wanted = _HALF if slots and slots[0][i] else _SINGLE
            node.replace_input_with(i, as_type(value, wanted))
        for i, value in enumerate(node.outputs):
            if slots and slots[1][i] and value.dtype == _SINGLE:
                value.type = ir.TensorType(_HALF)
            # A branch of an If, or the body of a Loop, reads values from outside of it and stays float32.
            for use in tuple(value.uses()) if slots and slots[1][i] else ():
                if use.node.graph is not graph:
                    use.node.replace_input_with(use.idx, as_type(value, _SINGLE))
    for i, output in enumerate(list(graph.outputs)):
        if output.dtype == _HALF:
            name, output.name = output.name, f"{output.name}_fp16"
            cast = as_type(output, _SINGLE)
            cast.name = name
            graph.outputs[i] = cast
    for name in [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[name]


def _worst_jump(single: Mapping[str, Array], half: Iterable[TraceValue], model: ir.Model) -> tuple[ir.Node, str] | None:
    """The first node whose float16 result leaves its float32 one while its inputs are still near."""
    errors: dict[str, float] = {}
    by_name = {item.name: item for item in half}
    for node in model.graph:
        if node.op_type == "Cast":
            continue
        for value in node.outputs:
            name = str(value.name)
            item = by_name.get(name)
            reference = single.get(name.removesuffix("_fp16") if name not in single else name)
            if item is None or reference is None or reference.shape != item.value.shape:
                continue
            measured = compare(reference, item.value.astype(np.float32))
            lost = measured.nonfinite - measured.nonfinite_reference
            errors[name] = np.inf if lost > 0 else measured.relative_l2
            before = max(
                (errors.get(str(v.name), errors.get(str(v.name).rpartition("_")[0], 0.0)) for v in node.inputs if v),
                default=0.0,
            )
            if lost > 0:
                return node, f"{lost} results are not finite in float16"
            if errors[name] > JUMP and errors[name] > 10 * before:
                return node, f"relative L2 error {errors[name]:.2g} in float16, its inputs' {before:.2g}"
    return None


def to_fp16(model: ir.Model, samples: Sequence[Mapping[str, Array]]) -> tuple[ir.Model, list[Kept]]:
    """A float16 copy of ``model``, and the operations that it keeps in float32 with the reasons.

    Args:
        model: float32, straight from the exporter.
        samples: feeds on which ranges and errors are measured; at least one.
    """
    if not samples:
        raise ValueError("to_fp16 needs at least one sample to measure on")
    for i, node in enumerate(model.graph):
        node.name = node.name or f"node_{i}"
    single: dict[str, Array] = dict(samples[0])  # every tensor of the first sample alone: they fill memory
    peaks = {name: max(_peak(feeds[name]) for feeds in samples) for name in samples[0]}
    for number, feeds in enumerate(samples):
        for item in trace_model(model, feeds):
            peaks[item.name] = max(peaks.get(item.name, 0.0), _peak(item.value))
            if number == 0:
                single[item.name] = item.value
    kept = {
        str(node.name): Kept(str(node.name), node.op_type, module_of(node), why)
        for node in model.graph
        if (why := _out_of_range(node, peaks))
    }
    for node, why in _vanishing(model):
        kept.setdefault(str(node.name), Kept(str(node.name), node.op_type, module_of(node), why))
    for _ in range(ROUNDS):
        half = model.clone()
        convert(half, set(kept))
        jump = _worst_jump(single, trace_model(half, samples[0]), half)
        if jump is None:
            break
        node, why = jump
        # A node that is in float32 already lost its numbers with its inputs.
        nodes = [node] if node.name not in kept else [n for n in _makers(node, model) if n.name not in kept]
        if not nodes:
            break
        for node in nodes:
            kept[str(node.name)] = Kept(str(node.name), node.op_type, module_of(node), why)
    return half, list(kept.values())
