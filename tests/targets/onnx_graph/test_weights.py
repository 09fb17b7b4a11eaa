"""Small weights in ONNX graphs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeattn.core.numerics import compare
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep
from edgeattn.targets.onnx_graph.execute import outputs_of
from edgeattn.targets.onnx_graph.files import weight_bytes
from edgeattn.targets.onnx_graph.fp16 import to_fp16
from edgeattn.targets.onnx_graph.weights import small_weights
from tests.targets.onnx_graph.test_qdq import SAMPLES, graph, note_modules, ops


def small(precision: str, standard: bool = False, group: int = 32, keep: tuple[Keep, ...] = ()) -> ir.Model:
    model = note_modules(graph(), c="a", m="b", y="c")
    done = small_weights(model, QuantPlan(precision, group, keep=keep), standard)
    assert len(done) == 3 - len(keep)
    onnx.checker.check_model(ir.to_proto(model))
    return model


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize(("precision", "limit"), [("w8", 0.01), ("w4", 0.15)])
def test_outputs_stay_near(precision: str, limit: float, standard: bool) -> None:
    model = small(precision, standard)
    for feeds in SAMPLES:
        assert 0 < compare(outputs_of(graph(), feeds)["y"], outputs_of(model, feeds)["y"]).relative_l2 < limit


def test_products_become_matmulnbits_unless_the_standard_alone_will_do() -> None:
    assert ops(small("w4")).count("MatMulNBits") == 2
    assert {node.domain for node in small("w4", standard=True).graph} == {""}


@pytest.mark.parametrize("group", [32, 64, 128])
def test_each_weight_takes_half_a_byte_and_its_share_of_a_scale(group: int) -> None:
    rng = np.random.default_rng(0)
    weight = ir.Value(
        name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((512, 256)),
        const_value=ir.tensor(rng.standard_normal((512, 256)).astype(np.float32), name="w"),
    )  # fmt: skip
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 512)))
    node = ir.node("MatMul", [x, weight], name="n")
    out = node.outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape((1, 256))
    model = ir.Model(ir.Graph([x], [out], nodes=[node], initializers=[weight], opset_imports={"": 20}), ir_version=10)
    before = outputs_of(model, feeds := {"x": rng.standard_normal((1, 512)).astype(np.float32)})["y"]
    small_weights(model, QuantPlan("w4", group))
    assert weight_bytes(model) == 512 * 256 // 2 + 4 * 512 * 256 // group
    assert compare(before, outputs_of(model, feeds)["y"]).relative_l2 < 0.15


def test_kept_modules_keep_their_weights() -> None:
    model = small("w4", keep=(Keep(modules=("b",)),))
    assert "mw" in model.graph.initializers
    assert "gw" not in model.graph.initializers


def test_a_module_may_have_eight_bits_instead() -> None:
    model = note_modules(graph(), c="a", m="b", y="c")
    done = small_weights(model, QuantPlan("w4", keep=(Keep(modules=("b",), at="w8"),)))
    assert [item["weights"] for item in done] == ["int8", "int8", "int4"]  # the first is a kernel over space


def test_half_graphs_get_half_scales() -> None:
    model, _ = to_fp16(graph(), SAMPLES, half_inside=True)
    small_weights(model, QuantPlan("w8"), standard=True)
    scales = [v for n, v in model.graph.initializers.items() if n.endswith("_scale")]
    assert {v.dtype for v in scales} == {ir.DataType.FLOAT16}
    measured = compare(outputs_of(graph(), SAMPLES[0])["y"], outputs_of(model, SAMPLES[0])["y"])
    assert measured.relative_l2 < 0.02


def test_a_weight_with_two_readers_is_stored_once() -> None:
    model = graph()
    first = next(node for node in model.graph if node.op_type == "Conv")
    again = ir.node("Conv", [first.inputs[0], first.inputs[1]], {"kernel_shape": [3, 3]}, name="again")
    again.outputs[0].name, again.outputs[0].type = "again", first.outputs[0].type
    again.outputs[0].shape = first.outputs[0].shape
    model.graph.insert_after(first, again)
    small_weights(model, QuantPlan("w8"))
    assert ops(model).count("DequantizeLinear") == 3
