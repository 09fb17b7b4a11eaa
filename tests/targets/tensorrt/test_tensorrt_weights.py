"""A decoder's small weights: numbers against NumPy, and what TensorRT's plans say that it multiplies with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeattn.core.numerics import Array, compare
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep
from edgeattn.targets.onnx_graph.execute import outputs_of
from edgeattn.targets.onnx_graph.export import name_nodes
from edgeattn.targets.onnx_graph.files import save, weight_bytes
from edgeattn.targets.tensorrt.engine import Builder
from edgeattn.targets.tensorrt.weights import round_eight, round_four, small_weights
from tests.targets.tensorrt.plans import kernels, of_type

pytest.importorskip("tensorrt_rtx")

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
#: Vocabulary, width, heads, and what each head takes and gives.
V, D, H, K, N = 1024, 512, 4, 128, 256
OPTIONS = {"level": "3", "workspace_mb": "default", "weight_streaming": "no"}
BOUND = {"w8": 0.02, "w4": 0.25}


def value(name: str, shape: tuple[int, ...], dtype: ir.DataType, array: Array | None = None) -> ir.Value:
    tensor = None if array is None else ir.tensor(array.astype(dtype.numpy()), name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)


def graph(dtype: ir.DataType = HALF, tokens: int = 1, seed: int = 0) -> ir.Model:
    """A step in small: rows of an embedding, a product for each head, one with a bias, and with the embedding again."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> ir.Value:
        scale = rng.uniform(0.3, 3.0, (*shape[:-1], 1)) / np.sqrt(shape[-1])  # rows and columns that differ in size
        return value(name, shape, dtype, rng.standard_normal(shape) * scale)

    weights = [weight("table", V, D), weight("heads", H, K, N), weight("mixed", H * N, D), weight("bias", D)]
    sizes = [value(f"s{i}", (len(s),), ir.DataType.INT64, np.array(s)) for i, s in enumerate([(tokens, H, K)])]
    back = value("s1", (2,), ir.DataType.INT64, np.array((tokens, H * N)))
    ids = value("ids", (tokens,), ir.DataType.INT64)
    table, heads, mixed, bias = weights
    nodes = [
        ir.node("Gather", [table, ids], name="lookup"),
    ]
    nodes.append(ir.node("Relu", [nodes[-1].outputs[0]]))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], sizes[0]]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0, 2]}))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], heads], name="by_head"))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0, 2]}))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], back]))
    nodes.append(ir.node("Relu", [nodes[-1].outputs[0]]))
    nodes.append(ir.node("Gemm", [nodes[-1].outputs[0], mixed, bias], name="mix"))
    nodes.append(ir.node("Relu", [nodes[-1].outputs[0]]))
    nodes.append(ir.node("Gemm", [nodes[-1].outputs[0], table], {"transB": 1}, name="out"))
    shapes = [(tokens, D), (tokens, D), (tokens, H, K), (H, tokens, K), (H, tokens, N), (tokens, H, N)]
    shapes += [(tokens, H * N), (tokens, H * N), (tokens, D), (tokens, D), (tokens, V)]
    for i, (node, shape) in enumerate(zip(nodes, shapes, strict=True)):
        out = node.outputs[0]
        out.name, out.type, out.shape = f"v{i}", ir.TensorType(dtype), ir.Shape(shape)
    nodes[-1].outputs[0].name = "y"
    made = ir.Graph(
        [ids], [nodes[-1].outputs[0]], nodes=nodes, initializers=[*weights, *sizes, back], opset_imports={"": 20}
    )
    model = ir.Model(made, ir_version=10)
    name_nodes(model)
    return model


def feeds(tokens: int = 1) -> dict[str, Array]:
    return {"ids": np.arange(7, 7 + tokens)}


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize(("precision", "flavour"), [("w8", "rtx"), ("w4", "rtx"), ("w4", "full")])
def test_the_graph_computes_nearly_the_same(
    precision: str, flavour: str, dtype: ir.DataType, tokens: int, tmp_path: Path
) -> None:
    model = graph(dtype, tokens)
    before, size = outputs_of(model, feeds(tokens))["y"], weight_bytes(model)
    done = small_weights(model, QuantPlan(precision), flavour)
    assert [(d["node"], d["weights"]) for d in done] == [
        (n, f"int{precision[1]}") for n in ("lookup", "by_head", "mix", "out")
    ]
    after = outputs_of(model, feeds(tokens))["y"]
    assert 0 < compare(before, after).relative_l2 < BOUND[precision]
    assert weight_bytes(model) < size * (0.3 if precision == "w4" else 0.55)  # scales and a bias beside them
    ranks = [len(node.inputs[0].shape) for node in model.graph if node.op_type == "DequantizeLinear"]
    assert max(ranks) == (2 if flavour == "full" else 3)
    save(model, tmp_path / "m.onnx")
    Builder(tmp_path / "m.onnx", "rtx").parse()


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_one_token_reads_weights_as_they_are_stored(precision: str, tmp_path: Path) -> None:
    """No kernel makes floats of a weight and stores them: each one that reads integers multiplies or looks up."""
    model = graph()
    small_weights(model, QuantPlan(precision), "rtx")
    save(model, tmp_path / "m.onnx")
    builder = Builder(tmp_path / "m.onnx", "rtx")
    builder.parse()
    plan = builder.build("portable", precision, OPTIONS, {}).plan
    small = of_type(plan, "int8", "int4")
    readers = [kernel for kernel in kernels(plan) if small & set(kernel.inputs)]
    assert len(readers) >= 3  # the first two are one kernel, where TensorRT likes that better
    assert all(kernel.multiplies or "Gath" in kernel.name for kernel in readers), readers


def test_a_scale_for_each_channel_would_be_unpacked_first(tmp_path: Path) -> None:
    """Why the scales are not in front of the product; when this fails they can be."""
    from edgeattn.targets.onnx_graph.weights import small_weights as by_channel

    model = graph()
    by_channel(model, QuantPlan("w8"), standard=True)
    save(model, tmp_path / "m.onnx")
    builder = Builder(tmp_path / "m.onnx", "rtx")
    builder.parse()
    plan = builder.build("portable", "w8", OPTIONS, {}).plan
    small = of_type(plan, "int8")
    assert not all(kernel.multiplies for kernel in kernels(plan) if small & set(kernel.inputs))


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_rounding(dtype: ir.DataType) -> None:
    rng = np.random.default_rng(1)
    rows = (rng.standard_normal((64, 96)) * np.geomspace(1e-3, 10, 64)[:, None]).astype(dtype.numpy())
    rows[3], rows[5, :32] = 0, -np.abs(rows[5, :32])
    integers, whole, rest = round_eight(rows, dtype)
    assert np.abs(integers).max() == 127
    assert rest.max() == 1
    back = integers * (whole.astype(np.float32) * rest.astype(np.float32))
    steps = np.abs(rows.astype(np.float32)).max(axis=1) / 127
    assert (np.abs(back - rows).max(axis=1) <= 0.6 * np.maximum(steps, whole * 1e-4)).all()
    integers, scales = round_four(rows, 32, dtype)
    assert (integers.min(), integers.max()) == (-8, 7)
    assert (scales > 0).all()
    blocks = rows.astype(np.float32).reshape(64, 3, 32)
    off = np.abs(integers.reshape(64, 3, 32) * scales.astype(np.float32)[..., None] - blocks).max(axis=-1)
    assert (off <= 1.001 * scales).all()
    assert compare(blocks, integers.reshape(64, 3, 32) * scales.astype(np.float32)[..., None]).relative_l2 < 0.1


def test_kept_modules_and_weights_read_from_both_sides_stay() -> None:
    model = graph()
    for node, module in zip(model.graph, "a.....b...c", strict=False):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", module, node.name])
    heads = [d["node"] for d in small_weights(model, QuantPlan("w4", keep=(Keep(modules=("a",)),)), "rtx")]
    assert heads == ["by_head", "mix", "out"]
    assert {v.dtype for v in model.graph.initializers.values() if v.name == "table"} == {HALF}
    other = graph()
    (mix,) = (node for node in other.graph if node.name == "mix")
    (table,) = (v for v in other.graph.initializers.values() if v.name == "table")
    again = ir.node("MatMul", [next(n for n in other.graph if n.name == "out").outputs[0], table], name="again")
    again.outputs[0].name, again.outputs[0].type = "z", ir.TensorType(HALF)
    again.outputs[0].shape = ir.Shape((1, D))
    other.graph.append(again)
    other.graph.outputs.append(again.outputs[0])
    assert mix is not None
    before = outputs_of(other, feeds())["z"]
    done = small_weights(other, QuantPlan("w8"), "rtx")
    assert "again" not in [d["node"] for d in done]
    assert compare(before, outputs_of(other, feeds())["z"]).relative_l2 < 0.03
