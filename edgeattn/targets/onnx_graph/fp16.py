"""Float16 storage for an ONNX graph, with the operations that do not survive it kept in float32.

What is kept is found by measuring on samples: first every operation whose float32 values, also those that it computes
inside, come within a factor of two of float16's largest number, and every one with a small constant that float16 cannot
hold; then, run by run, the operations whose float16 results are not finite or far from their float32 ones although
their inputs are near. No list of operation names decides.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgeattn.core.numerics import TOLERANCES, Array, compare
from edgeattn.targets.onnx_graph.execute import module_of, trace_model

#: Largest finite float16.
LARGEST = 65504.0
#: Adding one to this float16 leaves it as it is.
COUNTS_TO = 2048.0
#: Samples are not all inputs: a tensor that reaches half of ``LARGEST`` on them is kept in float32.
HEADROOM = 2.0
#: An operation whose relative L2 error exceeds the first, and its inputs' error times the second, is kept in float32.
#: Later pairs serve while an output of the graph is too far off, for what that output depends on.
JUMPS = ((2e-2, 10.0), (1e-2, 5.0), (5e-3, 2.5), (2.5e-3, 2.0), (1.25e-3, 2.0))
#: Samples are not all inputs: an output must come this near on them, which leaves a fifth of what verification allows.
NEAR = 0.8 * TOLERANCES["fp16"]
#: A single constant that loses a larger share in float16 is kept in float32; only numbers below 6e-5 lose that much.
LOSES = 1e-3
#: At most this many times operations are added after the measured ranges.
ROUNDS = 48

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


def _sum_of_squares(node: ir.Node, value: Array, half_inside: bool) -> float:
    """Largest sum of squares that a normalization adds up inside, given its first input; 0 for other operations.

    LayerNormalization computes in float32 by its definition, which not every runtime heeds: ``half_inside``.
    """
    if node.op_type == "LayerNormalization" and half_inside:
        axis = node.attributes.get_int("axis", -1) % value.ndim
        rows = value.reshape(int(np.prod(value.shape[:axis])), -1)
    elif node.op_type == "InstanceNormalization":
        rows = value.reshape(value.shape[0] * value.shape[1], -1)
    elif node.op_type == "GroupNormalization":
        rows = value.reshape(value.shape[0] * node.attributes["num_groups"].as_int(), -1)
    else:
        return 0.0
    squares = np.square(rows, dtype=np.float64).sum(-1)
    return _peak(squares)


def _inside(node: ir.Node, result: float) -> float:
    """Largest number that an operation computes inside, given its largest result.

    Runtimes may compute it in float16 although the CPU, on which we measure, does not.
    """
    if node.op_type == "ReduceL2":
        return result**2
    if node.op_type in ("ReduceLogSumExp", "ReduceLogSum"):
        # Of a large negative result the sum is as small as this is large, and float16 ends there as well.
        return float(np.exp(min(result, 700.0)))
    return result * _sum_length(node)


def _out_of_range(node: ir.Node, peaks: Mapping[str, float], squares: float) -> str | None:
    limit = LARGEST / HEADROOM
    for value in node.inputs:
        if value is not None and _constant_peak(value) > LARGEST:
            return f"constant {value.name} reaches {_constant_peak(value):.3g}, float16 ends at {LARGEST:.0f}"
        if value is not None and peaks.get(str(value.name), 0.0) > limit:
            return f"input {value.name} reaches {peaks[str(value.name)]:.3g}, float16 ends at {LARGEST:.0f}"
    for value in node.outputs:
        peak = max(peaks.get(str(value.name), 0.0), _inside(node, peaks.get(str(value.name), 0.0)))
        if peak > limit:
            return f"its result or what it sums inside reaches {peak:.3g}, float16 ends at {LARGEST:.0f}"
    if squares > limit:
        return f"its sum of squares reaches {squares:.3g}, float16 ends at {LARGEST:.0f}"
    return None


def _softmax_sum(node: ir.Node, value: Array) -> float:
    """Largest sum of exponentials that a softmax divides by, given its result: the largest of a row is 1 over it."""
    if node.op_type != "Softmax" or not value.size:
        return 0.0
    return 1.0 / max(float(value.max(axis=node.attributes.get_int("axis", -1)).min()), 1e-9)


def _float_inputs(node: ir.Node) -> list[ir.Value]:
    """Inputs that are float32 tensors, single numbers left out."""
    floats = [v for v in node.inputs if v is not None and v.dtype == _SINGLE]
    return [v for v in floats if v.const_value is None or v.const_value.size > 1]


def _vanishing(model: ir.Model) -> list[tuple[ir.Node, str]]:
    """Operations with a constant that float16 rounds to 0 or badly, such as an epsilon, and what depends on it.

    Its use is to keep a divisor from 0, which samples need not show; and its inverse may be too large. Hence what
    consumes the result stays float32 too, through operations on that tensor alone, up to the first that joins it with
    another.
    """
    found: dict[int, tuple[ir.Node, str]] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.dtype != _SINGLE or value.const_value is None or value.const_value.size != 1:
                continue
            number = float(value.const_value.numpy().item())
            if number == 0 or not abs(number) <= LARGEST:
                continue
            rounded = float(np.float16(number))
            if abs(rounded - number) <= LOSES * abs(number):
                continue
            why = f"constant {value.name} is {number:.3g}, float16 rounds it to {rounded:.3g}"
            waiting = [node]
            while waiting:
                current = waiting.pop()
                if id(current) in found or current.graph is not model.graph:
                    continue
                found[id(current)] = (current, why)
                if current is node or len(_float_inputs(current)) == 1:
                    waiting += [use.node for output in current.outputs for use in output.uses()]
    return list(found.values())


def _to_keep(node: ir.Node, kept: Mapping[str, Kept], generations: int) -> list[ir.Node]:
    """The node itself or, if it is kept already, the nearest ones before it that are not; up to graph inputs.

    Args:
        node: whose result is wrong.
        kept: by node name.
        generations: how many nodes deep to go from there on.
    """
    found: list[ir.Node] = []
    seen = {id(node)}
    waiting = deque([(node, 0)])
    while waiting:
        current, depth = waiting.popleft()
        if current.name not in kept:
            found.append(current)
            depth += 1
            if depth == generations:
                continue
        for value in current.inputs:
            maker = value.producer() if value is not None and value.dtype == _SINGLE else None
            if maker is not None and maker.graph is node.graph and id(maker) not in seen:
                seen.add(id(maker))
                waiting.append((maker, depth))
    return found


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


def _converted(model: ir.Model, keep: set[str]) -> tuple[ir.Model, dict[str, str]]:
    """A float16 copy, and by the name of each of its nodes' results the name of the same tensor in ``model``."""
    half = model.clone()
    pairs = [
        (ours, theirs)
        for node, copy in zip(model.graph, half.graph, strict=True)
        for ours, theirs in zip(node.outputs, copy.outputs, strict=True)
    ]
    convert(half, keep)
    return half, {str(theirs.name): str(ours.name) for ours, theirs in pairs}


def _before(nodes: set[int], values: Sequence[ir.Value | None]) -> set[int]:
    """``nodes`` and those that ``values`` are computed from, by id."""
    waiting = [value.producer() for value in values if value is not None]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in nodes:
            nodes.add(id(node))
            waiting += [value.producer() for value in node.inputs if value is not None]
    return nodes


@dataclass
class _Search:
    """Which operations of a graph to keep in float32, found out on one sample after another."""

    model: ir.Model
    kept: dict[str, Kept] = field(default_factory=dict)
    #: Nodes that stay wrong although all before them is in float32.
    hopeless: set[str] = field(default_factory=set)
    #: How often something was kept for a node's sake.
    tries: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def keep(self, node: ir.Node, why: str) -> None:
        """Keep a node; the first reason stays."""
        name = str(node.name)
        self.kept.setdefault(name, Kept(name, node.op_type, module_of(node), why))

    def errors(self, reference: Mapping[str, Array], feeds: Mapping[str, Array]) -> dict[str, float]:
        """Relative L2 error in float16 of each tensor of ``reference``; inf where numbers are not finite, or not 0."""
        half, names = _converted(self.model, set(self.kept))
        errors: dict[str, float] = {}
        for item in trace_model(half, feeds):
            name = names.get(item.name, "")
            if name in reference and reference[name].shape == item.value.shape:
                measured = compare(reference[name], item.value)
                lost = measured.nonfinite > measured.nonfinite_reference
                errors[name] = np.inf if lost else measured.relative_l2
        return errors

    def far(self, errors: Mapping[str, float]) -> list[ir.Value]:
        """Outputs of the graph that are not near enough."""
        return [value for value in self.model.graph.outputs if errors.get(str(value.name), 0.0) > NEAR]

    def _jumps(self, errors: Mapping[str, float]) -> Iterator[tuple[ir.Node, str]]:
        """Nodes whose results are off while their inputs are near; none that depends on another that is kept for it."""
        spoilt: set[int] = set()
        far = self.far(errors)
        among = {id(node) for node in self.model.graph}
        for jump, ratio in JUMPS:
            for node in self.model.graph:
                if any(id(value) in spoilt for value in node.inputs):
                    spoilt.update(id(value) for value in node.outputs)
                    continue
                if id(node) not in among or node.op_type == "Cast" or node.name in self.hopeless:
                    continue
                before = max((errors.get(str(v.name), 0.0) for v in node.inputs if v is not None), default=0.0)
                error = max((errors.get(str(v.name), 0.0) for v in node.outputs), default=0.0)
                if node.name in self.kept and not far and np.isfinite(error):
                    continue  # it enlarges what its inputs lost, and no output suffers from it
                if error > jump and error > ratio * before:
                    lost = "not finite, or not 0," if np.isinf(error) else f"relative L2 error {error:.2g}"
                    yield node, f"{lost} in float16, its inputs' error {before:.2g}"
                    if node.name not in self.hopeless:
                        spoilt.update(id(value) for value in node.outputs)
            if spoilt or not far:
                return
            among = _before(set(), far)

    def improve(self, errors: Mapping[str, float]) -> bool:
        """Keep more, where these errors show the need; False when nothing is left to do."""
        found: list[tuple[ir.Node, str]] = []
        for node, why in self._jumps(errors):
            # What is in float32 already lost its numbers with its inputs: go back further each time, ever faster.
            nodes = _to_keep(node, self.kept, max(1, 2 ** (self.tries[str(node.name)] - 1)))
            if not nodes:
                self.hopeless.add(str(node.name))
            self.tries[str(node.name)] += 1
            found += [(other, why) for other in nodes]
        for node, why in found:
            self.keep(node, why)
        return bool(found)

    def on(self, reference: Mapping[str, Array], feeds: Mapping[str, Array]) -> None:
        """Keep more until float16 is near on this sample, nothing helps or the rounds are used up."""
        while self.rounds < ROUNDS and self.improve(self.errors(reference, feeds)):
            self.rounds += 1


def to_fp16(
    model: ir.Model,
    samples: Sequence[Mapping[str, Array]],
    *,
    half_inside: bool = False,
    refused: Callable[[ir.Node], str | None] = lambda _: None,
) -> tuple[ir.Model, list[Kept]]:
    """A float16 copy of ``model``, and the operations that it keeps in float32 with the reasons.

    Args:
        model: float32, straight from the exporter.
        samples: feeds on which ranges and errors are measured; at least one.
        half_inside: whether the runtime may compute in float16 inside of LayerNormalization and Softmax too.
        refused: why the runtime does not take a node in float16; None where it does.
    """
    if not samples:
        raise ValueError("to_fp16 needs at least one sample to measure on")
    for i, node in enumerate(model.graph):
        node.name = node.name or f"node_{i}"
    search = _Search(model)
    readers: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.inputs and node.inputs[0] is not None:
            readers.setdefault(str(node.inputs[0].name), []).append(node)
    peaks: dict[str, float] = {}
    squares: dict[str, float] = {}
    softmaxes: dict[str, float] = {}
    makers = {str(v.name): node for node in model.graph for v in node.outputs if node.op_type == "Softmax"}

    def measure(name: str, value: Array) -> None:
        peaks[name] = max(peaks.get(name, 0.0), _peak(value))
        for node in readers.get(name, ()):
            found = _sum_of_squares(node, value, half_inside)
            squares[str(node.name)] = max(squares.get(str(node.name), 0.0), found)
        if half_inside and name in makers:
            softmaxes[name] = max(softmaxes.get(name, 0.0), _softmax_sum(makers[name], value))

    outputs = {str(value.name) for value in model.graph.outputs}
    references: list[dict[str, Array]] = []  # every tensor of the first sample alone: they fill memory
    for feeds in samples:
        references.append({})
        for name, value in feeds.items():
            measure(name, value)
        for item in trace_model(model, feeds):
            measure(item.name, item.value)
            if len(references) == 1 or item.name in outputs:
                references[-1][item.name] = item.value
    for node in model.graph:
        if why := refused(node) or _out_of_range(node, peaks, squares.get(str(node.name), 0.0)):
            search.keep(node, why)
    for name, total in softmaxes.items():
        if total > COUNTS_TO:
            search.keep(makers[name], f"adds up exponentials to {total:.0f}, by ones float16 counts to {COUNTS_TO:.0f}")
    for node, why in _vanishing(model):
        search.keep(node, why)
    search.on(references[0], samples[0])
    references[0].clear()
    for reference, feeds in zip(references[1:], samples[1:], strict=True):
        if search.far(search.errors(reference, feeds)):
            search.on({item.name: item.value for item in trace_model(model, feeds)}, feeds)
    return _converted(model, set(search.kept))[0], list(search.kept.values())
