"""ONNX decoders: one graph for all entries, weights in blocks, and a cache that is read and never copied."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn import targets
from edgeattn.capture import Program
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.numerics import compare
from edgeattn.core.specs import StepShape
from edgeattn.models.plm import PLM, plm
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import rounded
from edgeattn.recipe import Keep
from edgeattn.reparam import reparameterize
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.onnx_graph.blocks import packed

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
STEPS = [StepShape("decode", 1, 64, True), StepShape("prefill_8", 8, 64, True)]


@pytest.fixture(scope="module")
def model() -> PLM:
    torch.manual_seed(0)
    made = plm(**SIZES).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
        parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return made


@pytest.fixture(scope="module")
def deploy(model: PLM) -> PLM:
    form = reparameterize(model, torch.zeros(1, 4, dtype=torch.int64)).model
    assert isinstance(form, PLM)
    return form


@pytest.fixture(scope="module")
def program(deploy: PLM) -> Program:
    return capture_decoder(deploy, caches_of(deploy, 64), STEPS)


def lowered(program: Program, precision: str, folder: Path, quant: QuantPlan | None = None, **asked: str) -> Artifact:
    target = targets.get("onnx")
    feeds = {"ids": np.array([[3]]), "position": np.array([2])}
    assert program.decoder is not None
    feeds |= {name: np.zeros((1, 4, width), np.float32) for name, width in program.decoder.rows}
    plan = LowerPlan(
        precision,
        [],
        {},
        options=target.settle(asked, None, precision),
        quant=quant or QuantPlan(precision),
        by_entry={"decode": [feeds]},
    )
    return target.lower(program, plan, folder)


def feeds(model: PLM, ids: list[int], position: int, cached: int, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(5)
    rows = {name: rng.standard_normal((1, cached, width)).astype(dtype) for name, width in model.cache_rows()}
    return {"ids": np.array([ids]), "position": np.array([position]), **rows}


def eager(deploy: PLM, given_: dict[str, Any]) -> dict[str, Any]:
    cache = [torch.from_numpy(given_[name].astype(np.float32)) for name, _ in deploy.cache_rows()]
    with torch.no_grad():
        logits, rows = deploy.step(torch.from_numpy(given_["ids"]), torch.from_numpy(given_["position"]), cache, None)
    return {"logits": logits.numpy(), **{f"new_{n}": r.numpy() for (n, _), r in zip(deploy.cache_rows(), rows)}}  # noqa: B905


def test_entries_are_one_file_and_one_session(program: Program, deploy: PLM, tmp_path: Path) -> None:
    artifact = lowered(program, "fp32", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
    assert {entry.file for entry in artifact.entries.values()} == {"model.onnx"}
    decode, prefill = artifact.entries["decode"], artifact.entries["prefill_8"]
    assert decode.inputs[0].shape == (1, 1)
    assert decode.inputs[0].dynamic == ()
    assert prefill.inputs[0].dynamic == ((1, 1, 8, 8),)
    assert decode.inputs[2].dynamic == ((1, 1, 64, 64),)
    assert decode.outputs[1].shape == (1, 1, 64)
    runtime = targets.get("onnx").open(artifact)
    for entry, ids, position, cached in (("decode", [7], 0, 1), ("decode", [7], 9, 9), ("prefill_8", [1, 2, 3], 5, 9)):
        given_ = feeds(deploy, ids, position, cached)
        wanted, found = eager(deploy, given_), runtime.run(entry, given_)
        assert set(found) == set(wanted)
        assert max(compare(wanted[name], found[name]).relative_l2 for name in wanted) < 1e-5
    assert len(runtime._sessions) == 1  # type: ignore[attr-defined]


def test_the_cache_is_read_and_never_copied(program: Program, tmp_path: Path) -> None:
    """What touches a tensor of the cache: a squeeze, which shares its memory, and the two matrix products."""
    lowered(program, "fp32", tmp_path)
    graph = ir.load(tmp_path / "model.onnx").graph
    for value in graph.inputs[2:]:
        readers = Counter(use.node.op_type for use in value.uses())
        assert set(readers) <= {"Squeeze", "Shape"}
        (squeezed,) = [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Squeeze"]
        assert {use.node.op_type for use in squeezed.uses()} == {"MatMul"}
    widths = {str(v.name): v.shape for v in graph.outputs[1:]}
    assert all(str(shape[1]) == str(graph.inputs[0].shape[1]) for shape in widths.values())  # as many as new tokens


def test_the_embedding_is_stored_once(program: Program, tmp_path: Path) -> None:
    for precision, bits in (("fp32", 32), ("w8", 8), ("w4", 4)):
        folder = tmp_path / precision
        folder.mkdir()
        lowered(program, precision, folder)
        graph = ir.load(folder / "model.onnx").graph
        largest = sorted((v.const_value.nbytes for v in graph.initializers.values() if v.const_value), reverse=True)
        whole = 160 * 64 * bits // 8
        assert largest.count(whole) == 1 or bits != 32
        total = sum(largest)
        weights = sum(p.numel() for p in program.entries["decode"].graph.parameters())
        # What is expanded among new tokens holds the two projections of a layer again, the angles are float32.
        assert total < weights * (bits + 16 / 32 * (bits < 32) * 2) / 8 * 1.35 + 2 * 64 * 8 * 4 + 4000


@pytest.mark.parametrize(("precision", "bound"), [("w8", 5e-2), ("w4", 3e-1)])
def test_every_matrix_is_in_blocks(program: Program, deploy: PLM, tmp_path: Path, precision: str, bound: float) -> None:
    artifact = lowered(program, precision, tmp_path)
    model = ir.load(tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["GatherBlockQuantized"] == 1
    # q, kv_a, o, up, down and two projections a layer, the logits, and a product for each head of the absorbed form.
    assert kinds["MatMulNBits"] == 2 * (7 + 2 * 2) + 1
    assert kinds["Gemm"] == 0
    assert {node.attributes.get_int("accuracy_level", 0) for node in model.graph if node.op_type == "MatMulNBits"} == {
        4
    }
    constants = [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape or ()) > 1
    ]
    assert {str(v.name) for v in constants if "scale" not in str(v.name)} == {"cos", "sin"}
    runtime = targets.get("onnx").open(artifact)
    given_ = feeds(deploy, [11], 20, 24)
    wanted, found = eager(deploy, given_), runtime.run("decode", given_)
    assert max(compare(wanted[name], found[name]).relative_l2 for name in wanted) < bound
    note = artifact.facts["entries"]["decode"]["quantized"]
    assert note["left_in_floats"] == []
    assert len(note["operations"]) == 2 * 9 + 2


def test_modules_that_are_kept_stay_in_floats(program: Program, tmp_path: Path) -> None:
    quant = QuantPlan("w4", keep=(Keep(modules=("model.layers.0.mlp",)),))
    artifact = lowered(program, "w4", tmp_path, quant)
    note = artifact.facts["entries"]["decode"]["quantized"]
    assert note["modules_in_floats"] == ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("precision", ["fp16", "fp32", "w4"])
def test_a_cache_in_float16(program: Program, deploy: PLM, tmp_path: Path, precision: str) -> None:
    asked = {} if precision == "fp16" else {"cache": "float16"}
    artifact = lowered(program, precision, tmp_path, **asked)
    entry = artifact.entries["prefill_8"]
    assert [t.dtype for t in entry.inputs[:2]] == ["int64", "int64"]
    assert {t.dtype for t in entry.inputs[2:]} == {"float16"}
    assert {t.dtype for t in entry.outputs[1:]} == {"float16"}
    assert entry.outputs[0].dtype == "float32"
    given_ = feeds(deploy, [1, 2, 3, 4], 20, 24, "float16")
    found = targets.get("onnx").open(artifact).run("prefill_8", given_)
    wanted = eager(deploy, given_)
    bound = {"fp16": 5e-3, "fp32": 1e-3, "w4": 3e-1}[precision]
    assert max(compare(wanted[name], found[name].astype(np.float32)).relative_l2 for name in wanted) < bound
    if precision == "fp16":  # nothing casts a whole cache
        graph = ir.load(tmp_path / "model.onnx").graph
        assert not any(use.node.op_type == "Cast" for value in graph.inputs[2:] for use in value.uses())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 100), st.integers(0, 1000))
def test_onnx_runtime_unpacks_what_was_packed(bits: int, count: int, width: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    integers, scales = packed(rows, bits, 32)
    tensors = [ir.tensor(integers, name="q"), ir.tensor(scales, name="s")]
    constants = [
        ir.Value(name=str(t.name), type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape), const_value=t) for t in tensors
    ]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([width, width]))
    attributes = {"K": width, "N": count, "bits": bits, "block_size": 32}
    node = ir.node("MatMulNBits", [x, *constants], attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], node.outputs, nodes=[node], initializers=constants, opset_imports={"": 21, "com.microsoft": 1}, name="g"
    )
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    (y,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": np.eye(width, dtype="f4")})
    assert np.allclose(y.T, rounded(rows, bits, 32), atol=1e-5)


def test_matrices_that_the_exporter_does_not_fold_are_in_blocks_too(tmp_path: Path) -> None:
    """It leaves the transpose of a constant of a megabyte or more in the graph."""
    large = {"num_attention_heads": 16, "kv_lora_rank": 256, "qk_nope_head_dim": 128, "v_head_dim": 128}
    wide = plm(**(SIZES | large | {"num_hidden_layers": 1})).eval()
    form = reparameterize(wide, torch.zeros(1, 4, dtype=torch.int64)).model
    lowered(capture_decoder(form, caches_of(wide, 64), STEPS), "w4", tmp_path)
    graph = ir.load(tmp_path / "model.onnx").graph
    assert Counter(node.op_type for node in graph)["MatMulNBits"] == 7 + 2 * 16 + 1
    floats = [v for v in graph.initializers.values() if v.dtype == ir.DataType.FLOAT and "scale" not in str(v.name)]
    assert max(v.const_value.nbytes for v in floats if v.const_value is not None) < 10_000
