"""Explicit quantization of ONNX graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from edgeattn.core.numerics import compare
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep
from edgeattn.targets.onnx_graph import qdq
from edgeattn.targets.onnx_graph.execute import outputs_of, trace_model
from edgeattn.targets.onnx_graph.fp16 import to_fp16

RNG = np.random.default_rng(0)
TEXT = """<ir_version: 9, opset_import: ["": 20]> g (float[2,3,8,8] x) => (float[2,5] y)
<float[4,3,3,3] cw, float[4] cb, float[4,6] mw, float[5,6] gw, float[5] gb>
{
  c = Conv<kernel_shape = [3, 3]>(x, cw, cb)
  r = Relu(c)
  p = GlobalAveragePool(r)
  s = Flatten(p)
  m = MatMul(s, mw)
  t = Relu(m)
  y = Gemm<transB = 1>(t, gw, gb)
}"""


def graph(scale: float = 1.0) -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    shapes = {"cw": (4, 3, 3, 3), "cb": (4,), "mw": (4, 6), "gw": (5, 6), "gb": (5,)}
    rng = np.random.default_rng(1)
    del proto.graph.initializer[:]
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32) * (scale if name == "mw" else 1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    return model


SAMPLES = [{"x": RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(2)]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("precision", ["w8a8", "fp8"])
@pytest.mark.parametrize("half", [False, True])
def test_every_weighted_operation_gets_its_pairs(precision: str, half: bool) -> None:
    model = graph()
    if half:
        model, kept = to_fp16(model, SAMPLES)
        assert not kept
    calibration = qdq.Calibration(model, SAMPLES, qdq.NUMBERS[precision])
    quantized = calibration.apply(model)
    assert [(w.node.op_type, w.axis) for w in calibration.operations] == [("Conv", 0), ("MatMul", 1), ("Gemm", 0)]
    assert ops(quantized).count("QuantizeLinear") == 3
    assert ops(quantized).count("DequantizeLinear") == 6
    assert ops(model).count("QuantizeLinear") == 0  # the given graph stays as it is
    zeros = [v.const_value.numpy() for n, v in quantized.graph.initializers.items() if n.endswith("_zero")]
    assert zeros
    assert not any(z.astype(np.float32).any() for z in zeros)
    small = [v for v in quantized.graph.initializers.values() if v.dtype == qdq.NUMBERS[precision].weights]
    assert {tuple(v.shape) for v in small} >= {(4, 3, 3, 3), (4, 6), (5, 6)}
    for node in quantized.graph:  # biases are not quantized
        if node.op_type in ("Conv", "Gemm"):
            assert node.inputs[2].producer() is None
    for feeds in SAMPLES:
        measured = compare(outputs_of(graph(), feeds)["y"], outputs_of(quantized, feeds)["y"])
        assert 0 < measured.relative_l2 < (0.02 if precision == "w8a8" else 0.15)


def test_weights_are_as_near_as_their_scale_allows() -> None:
    model = graph()
    quantized = qdq.Calibration(model, SAMPLES, qdq.NUMBERS["w8a8"]).apply(model)
    for name, axis in (("cw", 0), ("mw", 1), ("gw", 0)):
        weight = model.graph.initializers[name].const_value.numpy()
        stored = quantized.graph.initializers[f"{name}_int8"].const_value.numpy()
        scale = quantized.graph.initializers[f"{name}_scale"].const_value.numpy()
        along = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        assert (np.abs(stored * along - weight) <= along * 0.5001).all()
        assert np.abs(stored).max(tuple(i for i in range(weight.ndim) if i != axis)).tolist() == [127] * scale.size


def test_operations_can_be_left_out() -> None:
    model = graph()
    calibration = qdq.Calibration(model, SAMPLES, qdq.NUMBERS["w8a8"])
    left = calibration.operations[0].node.name
    quantized = calibration.apply(model, {left})
    assert ops(quantized).count("QuantizeLinear") == 2
    assert "cw" in quantized.graph.initializers
    assert left not in [fact["node"] for fact in calibration.facts({left})]


def test_a_tensor_with_two_readers_is_quantized_once() -> None:
    text = """<ir_version: 9, opset_import: ["": 20]> g (float[2,4] x) => (float[2,4] y)
    <float[4,4] w> { a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b) }"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.initializer[:]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    samples = [{"x": RNG.standard_normal((2, 4)).astype(np.float32)}]
    quantized = qdq.Calibration(model, samples, qdq.NUMBERS["w8a8"]).apply(model)
    assert ops(quantized).count("QuantizeLinear") == 1
    assert ops(quantized).count("DequantizeLinear") == 2


def test_zeros_and_empty_ranges_do_no_harm() -> None:
    model = graph(scale=0.0)
    quantized = qdq.Calibration(model, SAMPLES, qdq.NUMBERS["w8a8"]).apply(model)
    for item in trace_model(quantized, SAMPLES[0]):
        assert np.isfinite(item.value).all()


def test_cpus_get_zero_points_and_rounded_outputs_of_convolutions() -> None:
    model = graph()
    quantized = qdq.Calibration(model, SAMPLES, qdq.CPU_INT8).apply(model)
    # The input, what the ReLU behind the convolution gives, and the inputs of both products.
    assert ops(quantized).count("QuantizeLinear") == 4
    relu = next(node for node in quantized.graph if node.op_type == "Relu")
    (reader,) = [use.node for use in relu.outputs[0].uses()]
    assert reader.op_type == "QuantizeLinear"
    zero = reader.inputs[2].const_value.numpy()
    assert zero.dtype == np.uint8
    assert zero == 0  # nothing below 0 comes out of a ReLU
    for feeds in SAMPLES:
        measured = compare(outputs_of(model, feeds)["y"], outputs_of(quantized, feeds)["y"])
        assert 0 < measured.relative_l2 < 0.02


def test_weights_within_seven_bits() -> None:
    quantized = qdq.Calibration(graph(), SAMPLES, qdq.CPU_INT7).apply(graph())
    stored = [v.const_value.numpy() for v in quantized.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert max(np.abs(value.astype(int)).max() for value in stored) == 63


def note_modules(model: ir.Model, **modules: str) -> ir.Model:
    for node in model.graph:
        if node.outputs[0].name in modules:
            scopes = str(["", modules[node.outputs[0].name], ""])
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    return model


@pytest.mark.parametrize("numbers", [qdq.NUMBERS["w8a8"], qdq.CPU_INT8], ids=["tensorrt", "cpu"])
def test_a_kept_module_and_what_goes_in_and_out_of_it_stay_in_floats(numbers: qdq.Numbers) -> None:
    model = note_modules(graph(), c="a.conv", m="b.middle", y="c.head")
    plan = QuantPlan("w8a8", keep=(Keep(modules=("b",)),), float_data=frozenset(["c.head"]))
    calibration = qdq.Calibration(model, SAMPLES, numbers, plan)
    assert [fact["module"] for fact in calibration.facts()] == ["a.conv", "c.head"]
    quantized = calibration.apply(model)
    by_op = {node.op_type: node for node in quantized.graph}
    middle, head = by_op["MatMul"], by_op["Gemm"]
    assert middle.inputs[0].producer().op_type != "DequantizeLinear"
    assert middle.inputs[1].name == "mw"
    assert head.inputs[0].producer().op_type == "Relu"  # what the kept module gave is not rounded for its reader
    assert head.inputs[1].producer().op_type == "DequantizeLinear"


def test_all_samples_count() -> None:
    large = [{"x": SAMPLES[0]["x"] * 10}, SAMPLES[1]]
    scales = [
        qdq.Calibration(graph(), samples, qdq.NUMBERS["w8a8"], QuantPlan("w8a8", observer="minmax")).activations["x"]
        for samples in (large, large[::-1], SAMPLES)
    ]
    assert scales[0].scale == scales[1].scale > 5 * scales[2].scale
