"""Decoders for TensorRT: entries with a cache of fixed length, and what the builder makes of them without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import edgeattn
from edgeattn.bundle.decoding import session
from edgeattn.bundle.runner_generate import Session
from edgeattn.capture import Program
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.numerics import Array, compare
from edgeattn.core.specs import StepShape
from edgeattn.models.layers.mla import AbsorbedAttention, LatentAttention
from edgeattn.models.plm import PLM, plm
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.tensorrt import TensorRTTarget
from tests.targets.tensorrt.plans import kernels

trt = pytest.importorskip("tensorrt_rtx")

TARGET = TensorRTTarget()
CONTEXT, VOCABULARY = 96, 256
SHAPES = (StepShape("decode", 1, CONTEXT), StepShape("prefill_8", 8, CONTEXT))
ROWS = {"latent_0": 64, "rope_0": 32, "latent_1": 64, "rope_1": 32}
#: Largest relative L2 of logits; weights are random and large, which amplifies their rounding.
BOUND = {"fp32": 1e-5, "fp16": 5e-3, "w8": 0.1, "w4": 0.9}


@dataclass(frozen=True)
class Reference:
    """Logits (T, V) of all tokens ids (T,), computed anew by the training form, and the rows (T, width) by name."""

    ids: Array
    logits: Array
    rows: dict[str, Array]

    def feeds(self, shape: StepShape, begin: int) -> dict[str, Array]:
        """Of an entry, behind ``begin`` tokens."""
        found = {"ids": self.ids[None, begin : begin + shape.tokens], "position": np.array([begin])}
        if shape.tokens > 1:
            found["last"] = np.array([shape.tokens - 1])
        for name, rows in self.rows.items():
            found[name] = np.zeros((1, CONTEXT, rows.shape[1]), np.float32)
            found[name][0, :begin] = rows[:begin]
        return found


@pytest.fixture(scope="module")
def made() -> tuple[Program, Reference]:
    torch.manual_seed(0)
    model: PLM = plm(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, intermediate_size=256,
    ).eval()  # fmt: skip
    with torch.no_grad():  # large enough for attention to tell tokens apart
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
        ids = torch.randint(0, VOCABULARY, (1, CONTEXT))
        logits, rows = model.rows(ids, torch.arange(CONTEXT))
    names = [name for name, _ in model.cache_rows()]
    reference = Reference(ids[0].numpy(), logits.numpy(), {n: r.numpy() for n, r in zip(names, rows, strict=True)})
    for layer in model.model.layers:
        assert isinstance(layer.self_attn.kv_b_proj, LatentAttention)
        layer.self_attn.kv_b_proj = AbsorbedAttention(layer.self_attn.kv_b_proj)
    return capture_decoder(model, caches_of(model, CONTEXT), SHAPES), reference


def lower(made: tuple[Program, Reference], precision: str, folder: Path, **options: str) -> Artifact:
    program, reference = made
    samples = {shape.name: [reference.feeds(shape, begin) for begin in (0, 40)] for shape in SHAPES}
    plan = LowerPlan(
        precision,
        [],
        {"edgeattn": "1", "recipe": "r"},
        options=TARGET.settle(options, None, precision),
        quant=QuantPlan(precision),
        by_entry=samples,
    )
    return TARGET.lower(program, plan, folder)


@pytest.fixture(scope="module")
def lowering(made: tuple[Program, Reference], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """Lowers to a precision once."""
    return functools.cache(lambda precision: lower(made, precision, tmp_path_factory.mktemp(precision)))


@pytest.fixture(params=list(BOUND))
def lowered(lowering: Callable[[str], Artifact], request: pytest.FixtureRequest) -> Artifact:
    return lowering(request.param)


def opened(artifact: Artifact) -> Session:
    decoder = {"context": CONTEXT, "cache": [{"name": name, "width": width} for name, width in ROWS.items()]}
    return session(TARGET.open(artifact), artifact, decoder)


def test_entries_take_the_whole_cache_in_the_graphs_own_floats(lowered: Artifact) -> None:
    dtype = "float32" if lowered.precision == "fp32" else "float16"
    assert [(name, entry.file) for name, entry in lowered.entries.items()] == [
        ("decode", "decode.onnx"),
        ("prefill_8", "prefill_8.onnx"),
    ]
    for shape in SHAPES:
        entry, network = lowered.entries[shape.name], lowered.facts["entries"][shape.name]["network"]
        inputs = {t.name: (t.shape, t.dtype) for t in entry.inputs}
        assert list(inputs) == ["ids", "position", *(["last"] if shape.tokens > 1 else []), *ROWS]
        assert inputs["ids"] == ((1, shape.tokens), "int64")
        for name, width in ROWS.items():
            assert inputs[name] == ((1, CONTEXT, width), dtype)
        assert {t.name: (t.shape, t.dtype) for t in entry.outputs} == {
            "logits": ((1, VOCABULARY), "float32"),
            **{f"new_{name}": ((1, shape.tokens, width), dtype) for name, width in ROWS.items()},
        }
        kinds = {t["name"]: t["dtype"] for t in network["inputs"]}
        assert kinds["latent_0"] == ("float" if dtype == "float32" else "half")
        assert not any(t.dynamic for t in (*entry.inputs, *entry.outputs))


def test_steps_behind_a_cache_give_what_all_positions_anew_give(
    made: tuple[Program, Reference], lowered: Artifact
) -> None:
    reference, one = made[1], opened(lowered)
    found, at = [], []
    for size in (1, 20, *[1] * 10, 11, *[1] * 54):
        found.append(one.feed(reference.ids[one.position : one.position + size]))
        at.append(one.position - 1)
    assert one.position == CONTEXT
    off = compare(reference.logits[at], np.stack(found)).relative_l2
    assert 0 < off < BOUND[lowered.precision]
    one.reset()
    again = one.feed(reference.ids[: at[1] + 1])
    assert compare(found[1], again).relative_l2 < BOUND[lowered.precision]


def test_all_weights_are_small(lowered: Artifact) -> None:
    if lowered.precision not in ("w8", "w4"):
        pytest.skip("of small weights")
    for name, count in (("decode", 16), ("prefill_8", 20)):
        quantized = lowered.facts["entries"][name]["quantized"]
        assert quantized["left_in_floats"] == []
        ops = [item["op"] for item in quantized["operations"]]
        assert (len(ops), ops.count("Gather"), ops.count("MatMul")) == (count, 1, 4)
    size = {name: lowered.facts["entries"][name]["weight_bytes"] for name in lowered.entries}
    numbers = 2 * (128 * 4 * 64 + 128 * 96 + 4 * 64 * 64 + 128 * 128 + 2 * 128 * 256) + VOCABULARY * 128
    tables = 2 * 4096 * 16 * 2  # cosines and sines in float16
    share = {"w8": 1.05, "w4": 0.65}[lowered.precision]
    assert size["decode"] - tables < share * numbers


def test_an_engine_for_each_entry_reads_the_cache_where_it_lies(lowered: Artifact) -> None:
    """Kernels that read it multiply with it; that of others, as of a cast or a copy, would be read and written."""
    script = (lowered.folder / "build.sh").read_text()
    for name in lowered.entries:
        (engine,) = lowered.facts["entries"][name]["engines"]
        assert engine["file"] == f"{name}.portable.engine"
        assert f"--onnx={name}.onnx" in script
        plan = (lowered.folder / engine["file"]).read_bytes()
        assert kernels(plan)
        assert [k for k in kernels(plan) if {f"{row}.1" for row in ROWS} & set(k.inputs) and not k.multiplies] == []


def test_tensorrts_own_layer_for_caches_would_copy_them(lowering: Callable[[str], Artifact]) -> None:
    """Why new rows leave the engine; when this fails IKVCacheUpdateLayer can put them in their place."""
    artifact = lowering("fp16")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(artifact.folder / "decode.onnx"))
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    where = network.add_cast(inputs["position"], trt.int32).get_output(0)
    for row, width in ROWS.items():
        readers = [
            (layer, i)
            for layer in layers
            for i in range(layer.num_inputs)
            if layer.get_input(i) is not None and layer.get_input(i).name == row
        ]
        inputs[row].shape = (1, 1, CONTEXT, width)
        new = network.add_shuffle(outputs[f"new_{row}"])
        new.reshape_dims = (1, 1, 1, width)
        written = network.add_kv_cache_update(inputs[row], new.get_output(0), where, trt.KVCacheMode.LINEAR)
        written.get_output(0).name = f"{row}_written"
        flat = network.add_shuffle(written.get_output(0))
        flat.reshape_dims = (1, CONTEXT, width)
        for layer, i in readers:
            layer.set_input(i, flat.get_output(0))
        network.unmark_output(outputs[f"new_{row}"])
        network.mark_output(written.get_output(0))
    plan = bytes(builder.build_serialized_network(network, builder.create_builder_config()))
    copies = [k for k in kernels(plan) if k.inputs in [(f"{row}_written.1",) for row in ROWS] and not k.multiplies]
    assert len(copies) == len(ROWS)


def test_older_tensorrt_gets_weights_in_two_dimensions(made: tuple[Program, Reference], tmp_path: Path) -> None:
    import onnx

    artifact = lower(made, "w4", tmp_path, flavour="full")
    graph = onnx.load(artifact.folder / "decode.onnx").graph
    shapes = {i.name: i.dims for i in graph.initializer}
    assert {len(shapes[n.input[1]]) for n in graph.node if n.op_type == "DequantizeLinear"} == {2}
    assert "engines" in artifact.facts["entries"]["decode"]
    assert not list(artifact.folder.glob("*.engine"))
    one, reference = opened(artifact), made[1]
    one.feed(reference.ids[:30])
    assert compare(reference.logits[30], one.feed(reference.ids[30:31])).relative_l2 < BOUND["w4"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "ratio"), [("fp32", 1.0005), ("fp16", 1.005), ("w8", 1.02), ("w4", 1.10)])
def test_the_trained_plm(precision: str, ratio: float, tmp_path: Path) -> None:
    bundle = edgeattn.export("plm-tiny", target="tensorrt", precision=precision, output=tmp_path)
    decoding = bundle.manifest.decoding
    assert decoding is not None
    assert 0.99 < decoding["perplexity_ratio"] <= ratio
    assert decoding["steps"] >= 1900
    assert "stand-in for the driver" in bundle.manifest.unproven
    assert decoding["cache_bytes"] == 5 * 96 * 4096 * (4 if precision == "fp32" else 2)
    for entry in bundle.manifest.entries:
        assert (bundle.path / f"{entry}.portable.engine").is_file()
    assert (bundle.path / "run_cache.py").is_file()
