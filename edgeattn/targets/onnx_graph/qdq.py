"""Explicit quantization of an ONNX graph: pairs of QuantizeLinear and DequantizeLinear at its weighted operations.

Weights are symmetric: int8 with one scale an output channel, fp8 with one a tensor. Data have one scale a tensor:
symmetric for TensorRT, which takes no zero point; with a zero point for CPUs, whose fast kernels multiply uint8 data
with int8 weights, and which want the outputs of convolutions quantized as well. Biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.quant.observe import Observer
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import MOST_BIAS_STEPS
from edgeattn.targets.onnx_graph.execute import Tracer, module_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _int8(value: Array) -> Array:
    rounded: Array = np.clip(np.rint(value), -127, 127).astype(np.int8)
    return rounded


def _fp8(value: Array) -> Array:
    rounded: Array = np.clip(value, -448, 448).astype(ir.DataType.FLOAT8E4M3FN.numpy())
    return rounded


@dataclass(frozen=True)
class Numbers:
    """What weights and data are stored in.

    Attributes:
        data, weights: types. round: weights (float32, already divided by their scale) as they are stored.
        largest: magnitude of a stored weight. per_channel: one scale for each output channel of a weight.
        for_cpu: data have a zero point, and the outputs of convolutions are quantized, for every reader of them.
    """

    name: str
    data: ir.DataType
    weights: ir.DataType
    round: Callable[[Array], Array]
    largest: float
    per_channel: bool = True
    for_cpu: bool = False


#: For TensorRT, by precision.
NUMBERS = {
    "w8a8": Numbers("int8", ir.DataType.INT8, ir.DataType.INT8, _int8, 127.0),
    "fp8": Numbers("fp8 (E4M3)", ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FN, _fp8, 448.0, per_channel=False),
}
CPU_INT8 = Numbers("int8", ir.DataType.UINT8, ir.DataType.INT8, _int8, 127.0, for_cpu=True)
#: x86 CPUs without VNNI add two products of 8 and 8 bits in 16 bits, which saturates unless weights have 7 bits.
CPU_INT7 = replace(CPU_INT8, name="int8 (weights within 7 bits)", largest=63.0)


@dataclass(frozen=True)
class Weighted:
    """An operation with constant weights that can be quantized.

    Attributes:
        data, weight: its inputs. axis: of the weight's output channels.
        noise: share of the energy that rounding takes from both together, as measured.
    """

    node: ir.Node
    data: ir.Value
    weight: ir.Value
    axis: int
    noise: float = 0.0


def weighted(model: ir.Model) -> list[Weighted]:
    """The convolutions and matrix products of a graph whose weights are constants."""
    found = []
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain:
            continue
        data, weight = node.inputs[0], node.inputs[1]
        if data is None or weight is None or weight.const_value is None or data.const_value is not None:
            continue
        if data.dtype not in _FLOATS or len(weight.const_value.shape) < 2:
            continue
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", False)
        rank = len(weight.const_value.shape)
        found.append(Weighted(node, data, weight, 0 if node.op_type == "Conv" or transposed else rank - 1))
    return found


def nothing_to_quantize(precision: str) -> CheckFailed:
    """The error for a graph in which a precision changes nothing."""
    return CheckFailed(
        "there is nothing to quantize",
        value=precision,
        why="no convolution or matrix product with constant weights is left to it",
        fix="--precision fp16, or keep fewer modules in floats",
    )


def in_floats(model: ir.Model, names: Collection[str]) -> dict[str, list[str]]:
    """Of weighted operations that stay in floats the nodes and the modules."""
    nodes = [node for node in model.graph if node.name in names]
    return {
        "left_in_floats": [str(node.name) for node in nodes],
        "modules_in_floats": sorted({module_of(node) for node in nodes}),
    }


@dataclass(frozen=True)
class Data:
    """How a tensor of data is stored: ``scale * (integer - zero)``; and the share of its energy that this takes."""

    scale: float
    zero: int = 0
    noise: float = 0.0


def _data(observer: Observer, numbers: Numbers) -> Data:
    if numbers.for_cpu:
        low, high = observer.limits(8)
        if low == high:
            return Data(1.0)
        scale = (high - low) / 255.0
        return Data(scale, int(np.clip(np.rint(-low / scale), 0, 255)), observer.noise(scale * 255.0 / 254.0))
    if numbers.data == ir.DataType.INT8:
        return Data(scale := observer.scale(8), 0, observer.noise(scale))
    # Floating-point numbers lose as little at the bottom of a range as at its top: there is nothing to clip.
    peak = max(-observer.lowest, observer.highest)
    return Data(peak / numbers.largest if peak else 1.0, 0, 2.0**-8)


def _weight_scales(weight: Array, axis: int, numbers: Numbers) -> Array:
    """Scales (channels) or one (), none of them 0."""
    others = tuple(i for i in range(weight.ndim) if i != axis) if numbers.per_channel else None
    peaks = np.abs(weight.astype(np.float32)).max(axis=others)
    scales: Array = np.where(peaks > 0, peaks / numbers.largest, 1.0).astype(np.float32)
    return scales


def _along(scales: Array, axis: int, rank: int) -> Array:
    return scales.reshape([-1 if i == axis else 1 for i in range(rank)]) if scales.ndim else scales


def _rounded_output(node: ir.Node) -> ir.Value:
    """Where a convolution's output is quantized: behind the ReLU that alone reads it, which costs nothing then."""
    value = node.outputs[0]
    uses = tuple(value.uses())
    alone = len(uses) == 1 and not value.is_graph_output()
    return uses[0].node.outputs[0] if alone and uses[0].node.op_type == "Relu" else value


class _Writer:
    """Puts the pairs into a graph."""

    def __init__(self, graph: ir.Graph, numbers: Numbers) -> None:
        self.graph, self.numbers = graph, numbers
        self._done: dict[int, ir.Value] = {}

    def _constant(self, name: str, value: Array, dtype: ir.DataType) -> ir.Value:
        tensor = ir.tensor(value, dtype=dtype, name=name)
        constant = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(value.shape), const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def _scales(
        self, name: str, scales: Array, zero: int, stored: ir.DataType, like: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point. A scale that float16 cannot hold becomes the nearest one that it can."""
        if like == ir.DataType.FLOAT16:
            tiny = np.float32(np.finfo(np.float16).smallest_normal)
            scales = np.clip(scales, tiny, np.float32(65504)).astype(np.float16)
        zeros = np.full(scales.shape, zero, stored.numpy())
        return self._constant(f"{name}_scale", scales, like), self._constant(f"{name}_zero", zeros, stored)

    def _pair(self, made: list[ir.Node], like: ir.Value, name: str, ahead: ir.Node) -> ir.Value:
        for node in made:
            if notes := ahead.metadata_props.get("pkg.torch.onnx.name_scopes"):
                node.metadata_props["pkg.torch.onnx.name_scopes"] = notes
        result = made[-1].outputs[0]
        result.name, result.type, result.shape = f"{name}_dequantized", like.type, like.shape
        return result

    def data(self, value: ir.Value, how: Data, reader: ir.Node) -> ir.Value:
        """``value`` through a pair, made once and placed right behind its producer."""
        if id(value) not in self._done:
            assert value.dtype is not None
            stored = self.numbers.data
            scales = self._scales(str(value.name), np.array(how.scale, np.float32), how.zero, stored, value.dtype)
            to = ir.node("QuantizeLinear", [value, *scales], name=f"{value.name}_quantize")
            to.outputs[0].name, to.outputs[0].type = f"{value.name}_quantized", ir.TensorType(stored)
            to.outputs[0].shape = value.shape
            back = ir.node("DequantizeLinear", [to.outputs[0], *scales], name=f"{value.name}_dequantize")
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, [to, back])
            else:
                self.graph.insert_before(self.graph[0], [to, back])
            self._done[id(value)] = self._pair([to, back], value, str(value.name), producer or reader)
        return self._done[id(value)]

    def output(self, value: ir.Value, how: Data, reader: ir.Node, but: Collection[str]) -> None:
        """Have every reader of ``value`` see it rounded, but for the nodes of these names."""
        readers = [(use.node, use.idx) for use in value.uses() if use.node.name not in but]
        rounded = self.data(value, how, reader)
        for node, index in readers:
            node.replace_input_with(index, rounded)

    def weight(self, of: Weighted, scales: Array) -> ir.Value:
        """The weight stored in small numbers, with what makes floats of them in front of its readers."""
        if id(of.weight) not in self._done:
            assert of.weight.const_value is not None
            assert of.weight.dtype is not None
            name, value = str(of.weight.name), of.weight.const_value.numpy()
            scale, zero = self._scales(name, scales, 0, self.numbers.weights, of.weight.dtype)
            assert scale.const_value is not None
            stored = scale.const_value.numpy().astype(np.float32)
            small = self.numbers.round(value.astype(np.float32) / _along(stored, of.axis, value.ndim))
            constant = self._constant(f"{name}_{self.numbers.weights.name.lower()}", small, self.numbers.weights)
            attributes = {"axis": of.axis} if scales.ndim else {}
            back = ir.node("DequantizeLinear", [constant, scale, zero], attributes, name=f"{name}_dequantize")
            self.graph.insert_before(self.graph[0], back)
            self._done[id(of.weight)] = self._pair([back], of.weight, name, of.node)
        return self._done[id(of.weight)]


class Calibration:
    """Scales of a graph's weighted operations, measured on samples.

    Args:
        model: its tensors in float32 or float16. samples: at least one; they are gone through once.
        plan: which modules stay in floats, and which read data in floats.
    """

    def __init__(
        self,
        model: ir.Model,
        samples: Iterable[Mapping[str, Array]],
        numbers: Numbers,
        plan: QuantPlan | None = None,
    ) -> None:
        self.numbers, self.plan = numbers, plan or QuantPlan("w8a8")
        chosen = list(self._chosen(model))
        wanted = {str(value.name) for _, *values in chosen for value in values if value is not None}
        observers = {name: Observer(self.plan.observer) for name in wanted}
        for item in Tracer(model, wanted).over(samples):
            observers[item.name].add(item.value)
        self.activations = {name: _data(seen, numbers) for name, seen in observers.items() if seen.count}
        self.weights: dict[str, Array] = {}
        self.operations: list[Weighted] = []
        for w, data, _ in chosen:
            assert w.weight.const_value is not None
            value = w.weight.const_value.numpy().astype(np.float32)
            scales = _weight_scales(value, w.axis, numbers)
            if data is not None and str(data.name) in self.activations:
                scales = self._for_bias(w, scales, self.activations[str(data.name)].scale)
            along = _along(scales, w.axis, value.ndim)
            back = numbers.round(value / along).astype(np.float32) * along
            energy = float(np.square(value, dtype=np.float64).sum()) or 1.0
            noise = float(np.square(back - value, dtype=np.float64).sum()) / energy
            self.weights[str(w.weight.name)] = scales
            if data is not None and str(data.name) in self.activations:
                noise += self.activations[str(data.name)].noise
            self.operations.append(replace(w, noise=noise))

    def _for_bias(self, of: Weighted, scales: Array, step: float) -> Array:
        """Scales by which the bias, in steps of the data's scale times the weights', keeps within int32.

        ONNX Runtime clips it, and a channel of tiny weights, as behind a batch norm that switched it off, loses what it
        lives by.
        """
        bias = of.node.inputs[2] if len(of.node.inputs) > 2 else None
        if not self.numbers.for_cpu or bias is None or bias.const_value is None:
            return scales
        return np.maximum(scales, np.abs(bias.const_value.numpy().astype(np.float32)) / (step * MOST_BIAS_STEPS))

    def _chosen(self, model: ir.Model) -> Iterator[tuple[Weighted, ir.Value | None, ir.Value | None]]:
        """The operations that the plan quantizes; their data and their output as far as these are rounded."""
        for w in weighted(model):
            scheme = self.plan.scheme(module_of(w.node))
            if scheme.floats:
                continue
            rounds = scheme.data < 32
            output = _rounded_output(w.node) if self.numbers.for_cpu and rounds and w.node.op_type == "Conv" else None
            if output is not None and output.is_graph_output():
                output = None  # what the caller gets is not rounded
            yield w, w.data if rounds else None, output

    def apply(self, model: ir.Model, without: Collection[str] = ()) -> ir.Model:
        """A copy of ``model``, the graph that was measured, with the pairs.

        Args:
            without: names of nodes that stay as they are.
        """
        copy = model.clone()
        writer = _Writer(copy.graph, self.numbers)
        chosen = [c for c in self._chosen(copy) if c[0].node.name not in without]
        quantized = {str(w.node.name) for w, *_ in chosen}
        floats = {str(w.node.name) for w in weighted(copy)} - quantized
        for w, _, output in chosen:
            if output is not None and str(output.name) in self.activations:
                writer.output(output, self.activations[str(output.name)], w.node, floats)
        for w, data, _ in chosen:
            if data is not None and str(data.name) in self.activations and w.node.inputs[0] is data:
                how = self.activations[str(data.name)]
                if self.numbers.for_cpu:
                    writer.output(data, how, w.node, floats)
                else:
                    w.node.replace_input_with(0, writer.data(data, how, w.node))
            w.node.replace_input_with(1, writer.weight(w, self.weights[str(w.weight.name)]))
        for name in [n for n, v in copy.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            del copy.graph.initializers[name]
        return copy

    def facts(self, without: Collection[str] = ()) -> list[dict[str, object]]:
        """What is quantized: node, operation, module and the scale of its data, if they are."""
        noted: list[dict[str, object]] = []
        for w in self.operations:
            if w.node.name not in without:
                how = self.activations.get(str(w.data.name))
                noted.append(
                    {
                        "node": str(w.node.name),
                        "op": w.node.op_type,
                        "module": module_of(w.node),
                        "activation_scale": float(f"{how.scale:.6g}") if how else None,
                    }
                )
        return noted
