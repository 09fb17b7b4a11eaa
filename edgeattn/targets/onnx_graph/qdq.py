"""Explicit quantization of an ONNX graph: pairs of QuantizeLinear and DequantizeLinear at its weighted operations.

Symmetric, because TensorRT takes no zero point: activations with one scale a tensor, which clips where clipping costs
less than rounding on the calibration samples; int8 weights with one scale an output channel, fp8 weights with one a
tensor. Biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeattn.core.numerics import Array
from edgeattn.targets.onnx_graph.execute import module_of, trace_model

#: Of each activation at most so many numbers of a sample are looked at to choose its scale; the largest always.
LOOKED_AT = 65536
#: Shares of the largest number at which an activation may be clipped.
CLIPS = np.linspace(1.0, 0.3, 36)

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Numbers:
    """A kind of small number.

    Attributes:
        largest: magnitude that it ends at.
        round: numbers (float32, already divided by the scale) as it stores them.
    """

    name: str
    dtype: ir.DataType
    largest: float
    per_channel: bool
    round: Callable[[Array], Array]


def _int8(value: Array) -> Array:
    rounded: Array = np.clip(np.rint(value), -127, 127).astype(np.int8)
    return rounded


def _fp8(value: Array) -> Array:
    rounded: Array = np.clip(value, -448, 448).astype(ir.DataType.FLOAT8E4M3FN.numpy())
    return rounded


#: By precision.
NUMBERS = {
    "w8a8": Numbers("int8", ir.DataType.INT8, 127.0, True, _int8),
    "fp8": Numbers("fp8 (E4M3)", ir.DataType.FLOAT8E4M3FN, 448.0, False, _fp8),
}


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


def _spread(value: Array) -> Array:
    """Magnitudes of a tensor, thinned out evenly, the largest first."""
    flat = np.abs(value.astype(np.float32).reshape(-1))
    step = max(1, flat.size // LOOKED_AT)
    return np.concatenate([flat.max(initial=0.0, keepdims=True), flat[::step]])


def _scale(magnitudes: Array, numbers: Numbers) -> tuple[float, float]:
    """The scale with the smallest mean squared error on these numbers, and that error as a share of their energy."""
    peak = float(magnitudes.max(initial=0.0))
    if peak == 0 or not np.isfinite(peak):
        return 1.0, 0.0
    energy = float(np.square(magnitudes, dtype=np.float64).mean())
    best = (np.inf, 1.0)
    for clip in CLIPS:
        scale = peak * float(clip) / numbers.largest
        back = numbers.round(magnitudes / np.float32(scale)).astype(np.float32) * np.float32(scale)
        best = min(best, (float(np.square(back - magnitudes, dtype=np.float64).mean()), scale))
    return best[1], best[0] / energy


def _weight_scales(weight: Array, axis: int, numbers: Numbers) -> Array:
    """Scales (channels) or one (), none of them 0."""
    others = tuple(i for i in range(weight.ndim) if i != axis) if numbers.per_channel else None
    peaks = np.abs(weight.astype(np.float32)).max(axis=others)
    scales: Array = np.where(peaks > 0, peaks / numbers.largest, 1.0).astype(np.float32)
    return scales


def _along(scales: Array, axis: int, rank: int) -> Array:
    return scales.reshape([-1 if i == axis else 1 for i in range(rank)]) if scales.ndim else scales


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

    def _scales(self, name: str, scales: Array, like: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point. A scale that float16 cannot hold becomes the nearest one that it can."""
        if like == ir.DataType.FLOAT16:
            tiny = np.float32(np.finfo(np.float16).smallest_normal)
            scales = np.clip(scales, tiny, np.float32(65504)).astype(np.float16)
        zero = np.zeros(scales.shape, self.numbers.dtype.numpy())
        return self._constant(f"{name}_scale", scales, like), self._constant(f"{name}_zero", zero, self.numbers.dtype)

    def _pair(self, made: list[ir.Node], like: ir.Value, name: str, ahead: ir.Node) -> ir.Value:
        for node in made:
            if notes := ahead.metadata_props.get("pkg.torch.onnx.name_scopes"):
                node.metadata_props["pkg.torch.onnx.name_scopes"] = notes
        result = made[-1].outputs[0]
        result.name, result.type, result.shape = f"{name}_dequantized", like.type, like.shape
        return result

    def activation(self, value: ir.Value, scale: float, reader: ir.Node) -> ir.Value:
        """``value`` through a pair, made once and placed right behind its producer."""
        if id(value) not in self._done:
            assert value.dtype is not None
            scales = self._scales(str(value.name), np.array(scale, np.float32), value.dtype)
            to = ir.node("QuantizeLinear", [value, *scales], name=f"{value.name}_quantize")
            to.outputs[0].name, to.outputs[0].type = f"{value.name}_quantized", ir.TensorType(self.numbers.dtype)
            to.outputs[0].shape = value.shape
            back = ir.node("DequantizeLinear", [to.outputs[0], *scales], name=f"{value.name}_dequantize")
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, [to, back])
            else:
                self.graph.insert_before(self.graph[0], [to, back])
            self._done[id(value)] = self._pair([to, back], value, str(value.name), producer or reader)
        return self._done[id(value)]

    def weight(self, of: Weighted, scales: Array) -> ir.Value:
        """The weight stored in small numbers, with what makes floats of them in front of its readers."""
        if id(of.weight) not in self._done:
            assert of.weight.const_value is not None
            assert of.weight.dtype is not None
            name, value = str(of.weight.name), of.weight.const_value.numpy()
            scale, zero = self._scales(name, scales, of.weight.dtype)
            assert scale.const_value is not None
            stored = scale.const_value.numpy().astype(np.float32)
            small = self.numbers.round(value.astype(np.float32) / _along(stored, of.axis, value.ndim))
            constant = self._constant(f"{name}_{self.numbers.name.split()[0]}", small, self.numbers.dtype)
            attributes = {"axis": of.axis} if scales.ndim else {}
            back = ir.node("DequantizeLinear", [constant, scale, zero], attributes, name=f"{name}_dequantize")
            self.graph.insert_before(self.graph[0], back)
            self._done[id(of.weight)] = self._pair([back], of.weight, name, of.node)
        return self._done[id(of.weight)]


class Calibration:
    """Scales of a graph's weighted operations, measured on samples.

    Args:
        model: its tensors in float32 or float16. samples: at least one.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Mapping[str, Array]], numbers: Numbers) -> None:
        self.numbers = numbers
        found = weighted(model)
        wanted = {str(w.data.name) for w in found}
        seen: dict[str, list[Array]] = {}
        for feeds in samples:
            for name in wanted & set(feeds):
                seen.setdefault(name, []).append(_spread(feeds[name]))
            for item in trace_model(model, feeds):
                if item.name in wanted:
                    seen.setdefault(item.name, []).append(_spread(item.value))
        self.activations = {name: _scale(np.concatenate(parts), numbers) for name, parts in seen.items()}
        self.weights: dict[str, Array] = {}
        self.operations: list[Weighted] = []
        for w in found:
            if str(w.data.name) not in self.activations:
                continue
            assert w.weight.const_value is not None
            value = w.weight.const_value.numpy().astype(np.float32)
            scales = _weight_scales(value, w.axis, numbers)
            along = _along(scales, w.axis, value.ndim)
            back = numbers.round(value / along).astype(np.float32) * along
            energy = float(np.square(value, dtype=np.float64).sum()) or 1.0
            noise = float(np.square(back - value, dtype=np.float64).sum()) / energy
            self.weights[str(w.weight.name)] = scales
            noise += self.activations[str(w.data.name)][1]
            self.operations.append(Weighted(w.node, w.data, w.weight, w.axis, noise))

    def apply(self, model: ir.Model, without: Collection[str] = ()) -> ir.Model:
        """A copy of ``model``, the graph that was measured, with the pairs.

        Args:
            without: names of nodes that stay as they are.
        """
        copy = model.clone()
        writer = _Writer(copy.graph, self.numbers)
        for w in weighted(copy):
            if w.node.name in without or str(w.data.name) not in self.activations:
                continue
            data = writer.activation(w.data, self.activations[str(w.data.name)][0], w.node)
            weight = writer.weight(w, self.weights[str(w.weight.name)])
            w.node.replace_input_with(0, data)
            w.node.replace_input_with(1, weight)
        for name in [n for n, v in copy.graph.initializers.items() if not v.uses() and not v.is_graph_output()]:
            del copy.graph.initializers[name]
        return copy

    def facts(self, without: Collection[str] = ()) -> list[dict[str, object]]:
        """What is quantized: node, operation, module and the activation's scale."""
        return [
            {
                "node": str(w.node.name),
                "op": w.node.op_type,
                "module": module_of(w.node),
                "activation_scale": float(f"{self.activations[str(w.data.name)][0]:.6g}"),
            }
            for w in self.operations
            if w.node.name not in without
        ]
