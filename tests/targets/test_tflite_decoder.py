"""Target tflite's decoders: signatures that share their weights, and a cache that is written and read in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import nn

import edgeattn
from edgeattn.bundle.decoding import entry_info
from edgeattn.bundle.runner_generate import Session
from edgeattn.capture import Program, capture
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.numerics import TOLERANCES, Array, compare
from edgeattn.core.specs import StepShape
from edgeattn.models.layers.mla import AbsorbedAttention
from edgeattn.models.plm import PLM, Layer, plm
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.feeds import own_feeds
from edgeattn.targets.tflite import TFLiteTarget, flatbuffer, lower
from edgeattn.targets.tflite.litert import interpreter
from edgeattn.targets.tflite.lookups import lookups
from edgeattn.targets.tflite.modules import modules
from edgeattn.targets.tflite.runtime import LiteRuntime
from edgeattn.targets.tflite.xnnpack import falls_off

TARGET = TFLiteTarget()
VOCABULARY, HIDDEN, CONTEXT = 320, 64, 64
#: Tokens and rows of the cache by entry.
SHAPES = {"decode_16": (1, 16), "decode_64": (1, CONTEXT), "prefill_8_64": (8, CONTEXT)}


def deploy_form() -> PLM:
    """A small PLM whose attention tells tokens apart, absorbed."""
    torch.manual_seed(0)
    model = plm(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else torch.rand(parameter.shape) + 0.5)
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        layer.self_attn.kv_b_proj = AbsorbedAttention(layer.self_attn.kv_b_proj)  # type: ignore[arg-type]
    return model.eval()


class Lowered:
    """The decoder in a precision."""

    def __init__(self, model: PLM, artifact: Artifact) -> None:
        self.model, self.artifact = model, artifact
        self.runtime = TARGET.open(artifact)
        assert isinstance(self.runtime, LiteRuntime)
        self.data = (artifact.folder / "model.tflite").read_bytes()
        self.flat = flatbuffer.read(self.data)

    def graph(self, entry: str) -> Any:
        return self.flat.subgraphs[flatbuffer.signature(self.flat, entry).subgraphIndex]

    def operators(self, entry: str, kind: str) -> list[Any]:
        found = self.graph(entry).operators
        return [operator for operator in found if flatbuffer.operator_name(self.flat, operator) == kind]

    def weights(self, entry: str) -> dict[tuple[str, str], str]:
        """What is stored how, by operator and module."""
        stored = self.artifact.facts["entries"][entry]["quantized"]["operations"]
        return {(item["op"], item["module"]): item["weights"] for item in stored}

    def compared(self, entry: str, position: int) -> dict[str, float]:
        """Relative L2 of each output; rows that must not be seen are large."""
        tokens, cached = SHAPES[entry]
        chance = torch.Generator().manual_seed(position)
        rows = self.model.cache_rows()
        cache = [torch.randn(1, cached, width, generator=chance) for _, width in rows]
        for each in cache:
            each[:, position:] *= 1e4
        ids = torch.randint(0, VOCABULARY, (1, tokens), generator=chance)
        given = {"ids": ids, "position": torch.tensor([position])}
        last = torch.tensor([tokens - 3]) if tokens > 1 else None
        given |= {} if last is None else {"last": last}
        given |= {name: value for (name, _), value in zip(rows, cache, strict=True)}
        with torch.no_grad():
            logits, new = self.model.step(ids, given["position"], cache, last)
        wanted = {"logits": logits, **{f"new_{name}": value for (name, _), value in zip(rows, new, strict=True)}}
        feeds = own_feeds(self.artifact.entries[entry].inputs, {name: value.numpy() for name, value in given.items()})
        outputs = self.runtime.run(entry, feeds)
        assert set(outputs) == set(wanted)
        return {name: compare(value.numpy(), outputs[name]).relative_l2 for name, value in wanted.items()}


Lower = Callable[..., Lowered]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """Captured and converted once; lowered in every precision that is asked for."""
    model = deploy_form()
    shapes = [StepShape(name, *sizes) for name, sizes in SHAPES.items()]
    program = capture_decoder(model, caches_of(model, CONTEXT), shapes)
    convert = lower._convert
    converted: list[bytes] = []
    kept: dict[tuple[str, tuple[Keep, ...]], Lowered] = {}

    def once(*args: Any) -> bytes:
        if not converted:
            converted.append(convert(*args))
        return converted[0]

    def make(precision: str, *keep: Keep) -> Lowered:
        if (precision, keep) not in kept:
            plan = LowerPlan(precision, [], {}, quant=QuantPlan(precision, keep=keep))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lower, "_convert", once)
                artifact = lower.lower(program, plan, tmp_path_factory.mktemp(precision))
            kept[precision, keep] = Lowered(model, artifact)
        return kept[precision, keep]

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w4"])
@pytest.mark.parametrize(
    ("entry", "position"),
    [
        ("decode_16", 0),
        ("decode_16", 1),
        ("decode_16", 15),
        ("decode_64", 40),
        ("prefill_8_64", 0),
        ("prefill_8_64", 56),
    ],
)
def test_a_step_is_pytorch_s(decoder: Lower, precision: str, entry: str, position: int) -> None:
    found = decoder(precision).compared(entry, position)
    assert max(found.values()) <= TOLERANCES[precision]
    assert (min(found.values()) > 0) or precision == "fp32"


def test_entries_are_signatures_of_one_file(decoder: Lower) -> None:
    lowered = decoder("fp32")
    assert [p.name for p in lowered.artifact.folder.iterdir()] == ["model.tflite"]
    assert {flatbuffer.text(item.signatureKey) for item in lowered.flat.signatureDefs} == set(SHAPES)
    inputs = {t.name: (t.shape, t.dtype) for t in lowered.artifact.entries["prefill_8_64"].inputs}
    assert inputs == {
        "ids": ((1, 8), "int32"),
        "position": ((1,), "int32"),
        "last": ((1,), "int32"),
        "latent_0": ((1, CONTEXT, 32), "float32"),
        "rope_0": ((1, CONTEXT, 32), "float32"),
    }
    outputs = {t.name: t.shape for t in lowered.artifact.entries["prefill_8_64"].outputs}
    assert outputs == {"logits": (1, VOCABULARY), "new_latent_0": (1, 8, 32), "new_rope_0": (1, 8, 32)}


def test_weights_are_in_the_file_once(decoder: Lower) -> None:
    model = decoder("fp32").model
    weights, tables = sum(p.numel() for p in model.parameters()), 2 * CONTEXT * 16
    part = 2 * 32 * 32  # what makes values of latents, or keys, of all heads
    largest = {
        # One token is multiplied with the first transposed, which is folded; several among themselves are not.
        "fp32": (weights + part) * 4 + tables * 4,
        "fp16": (weights + part) * 2 + tables * 4,
        # In int8 neither has its scales along the same axis in both.
        "w8": weights + 2 * part + tables * 4,
        "w4": (weights + weights / 8) / 2 + 2 * part + tables * 4,
    }
    for precision, size in largest.items():
        stored = decoder(precision).artifact.facts["entries"]["decode_16"]["weight_bytes"]
        assert 0.97 * size < stored < size + 3000, precision  # and shapes, positions, biases


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("w8", "int8"), ("w4", "int4")])
def test_the_embedding_is_looked_up_in_and_multiplied_with_as_it_is_stored(
    decoder: Lower, precision: str, dtype: str
) -> None:
    lowered = decoder(precision)
    tables = set()
    for entry in SHAPES:
        graph = lowered.graph(entry)
        for kind in ("EMBEDDING_LOOKUP", "FULLY_CONNECTED"):
            read = [graph.tensors[operator.inputs[1]] for operator in lowered.operators(entry, kind)]
            (table,) = [t for t in read if list(t.shape) == [VOCABULARY, HIDDEN]]
            assert flatbuffer._DTYPES[table.type] == dtype
            tables.add(table.buffer)
    assert len(tables) == 1
    sizes = Counter(len(b.data) for b in lowered.flat.buffers if b.data is not None)
    assert precision == "fp32" or VOCABULARY * HIDDEN * 4 not in sizes


@pytest.mark.parametrize("precision", ["fp16", "w8", "w4"])
def test_angles_keep_their_digits(decoder: Lower, precision: str) -> None:
    lowered = decoder(precision)
    for entry in SHAPES:
        graph = lowered.graph(entry)
        read = [graph.tensors[o.inputs[1]] for o in lowered.operators(entry, "EMBEDDING_LOOKUP")]
        assert [t.type for t in read if list(t.shape) == [CONTEXT, 16]] == [schema.TensorType.FLOAT32] * 2


def test_what_is_stored_how(decoder: Lower) -> None:
    eight, four = decoder("w8").weights("decode_64"), decoder("w4").weights("decode_64")
    linear = {
        f"model.layers.0.{name}"
        for name in (
            "self_attn.q_proj",
            "self_attn.kv_a_proj_with_mqa",
            "self_attn.o_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    names = {
        *(("FULLY_CONNECTED", module) for module in (*linear, "model.embed_tokens")),
        ("EMBEDDING_LOOKUP", "model.embed_tokens"),
        ("BATCH_MATMUL", "model.layers.0.self_attn.kv_b_proj"),
    }
    assert set(eight) == set(four) == names
    assert set(eight.values()) == {"int8"}
    assert {key for key, words in four.items() if words == "int8"} == {
        ("BATCH_MATMUL", "model.layers.0.self_attn.kv_b_proj")
    }
    assert set(four.values()) == {"int8", "int4 in blocks of 32"}
    # Several tokens are expanded among themselves by the same projections as linear layers.
    assert ("FULLY_CONNECTED", "model.layers.0.self_attn.kv_b_proj") in decoder("w4").weights("prefill_8_64")


def test_kept_modules_are_found_by_whose_weights_they_are(decoder: Lower) -> None:
    kept = decoder("w4", Keep(modules=("model.embed_tokens",), at="w8"), Keep(modules=("*.kv_b_proj",)))
    stored = kept.weights("decode_64")
    assert {stored[kind, "model.embed_tokens"] for kind in ("EMBEDDING_LOOKUP", "FULLY_CONNECTED")} == {"int8"}
    assert not [key for key in stored if key[0] == "BATCH_MATMUL"]
    assert kept.artifact.facts["entries"]["decode_64"]["quantized"]["modules_in_floats"] == [
        "model.layers.0.self_attn.kv_b_proj"
    ]
    assert max(kept.compared("decode_64", 30).values()) < 0.8 * max(decoder("w4").compared("decode_64", 30).values())


@pytest.mark.parametrize("precision", ["fp32", "w8", "w4"])
def test_nothing_but_products_reads_the_cache(decoder: Lower, precision: str) -> None:
    lowered = decoder(precision)
    for entry in SHAPES:
        graph = lowered.graph(entry)
        inputs = {
            flatbuffer.text(one.name): one.tensorIndex for one in flatbuffer.signature(lowered.flat, entry).inputs
        }
        for name, times in (("latent_0", 2), ("rope_0", 1)):
            readers = [o for o in graph.operators if inputs[name] in o.inputs]
            assert [flatbuffer.operator_name(lowered.flat, o) for o in readers] == ["BATCH_MATMUL"] * times
        slow = {kind for _, kind in falls_off(lowered.flat, entry, lowered.data)}
        assert slow <= {"EMBEDDING_LOOKUP", "RESHAPE", "ADD", "LESS", "LOGICAL_NOT", "CAST"}


def test_the_cache_is_written_in_place_and_left_as_it_is(decoder: Lower) -> None:
    lowered = decoder("fp32")
    assert isinstance(lowered.runtime, LiteRuntime)
    steps = lowered.runtime.opened("decode_64")
    assert {name: view.shape for name, view in steps.views.items()} == {
        "latent_0": (1, CONTEXT, 32),
        "rope_0": (1, CONTEXT, 32),
    }
    assert not any(view.any() for view in steps.views.values())
    chance = np.random.default_rng(0)
    rows = {name: chance.normal(size=view.shape).astype(np.float32) for name, view in steps.views.items()}
    for name, view in steps.views.items():
        view[:, :7] = rows[name][:, :7]
    feeds = {"ids": np.array([[5]], np.int32), "position": np.array([7], np.int32)}
    first = steps(feeds)
    for name, view in steps.views.items():
        assert np.array_equal(view[:, :7], rows[name][:, :7])
        assert not view[:, 7:].any()
        view[:, 7] = first[f"new_{name}"][:, 0]
    held = {name: view.copy() for name, view in steps.views.items()}
    second = steps({**feeds, "position": np.array([8], np.int32)})
    again = lowered.runtime.run("decode_64", {**feeds, "position": np.array([8], np.int32), **held})
    assert all(np.array_equal(second[name], again[name]) for name in again)
    assert not np.array_equal(first["logits"], second["logits"])


@pytest.mark.parametrize("precision", ["fp32", "w8"])
def test_a_sequence_over_several_lengths_of_the_cache(decoder: Lower, precision: str) -> None:
    lowered = decoder(precision)
    ids = torch.randint(0, VOCABULARY, (1, CONTEXT), generator=torch.Generator().manual_seed(3))
    rows = [{"name": name, "width": width} for name, width in lowered.model.cache_rows()]
    made = {"context": CONTEXT, "vocabulary": VOCABULARY, "cache": rows}
    assert isinstance(lowered.runtime, LiteRuntime)
    session = Session(made, entry_info(lowered.artifact), lowered.runtime.opened)
    with torch.no_grad():
        wanted, cache = lowered.model.rows(ids, torch.arange(CONTEXT))
    numbers = ids[0].numpy()
    for turn in range(2):  # a second sequence sees nothing of the first
        begin = 0
        for end in (11, 12, 13, 16, 17, 18, 30, *range(31, CONTEXT + 1)):
            logits = session.feed(numbers[begin:end])
            assert compare(wanted[end - 1].numpy(), logits).relative_l2 < TOLERANCES[precision], (turn, end)
            begin = end
        for (name, _), value in zip(lowered.model.cache_rows(), cache, strict=True):
            assert compare(value.numpy(), session.rows[name][0]).relative_l2 < TOLERANCES[precision]
        session.reset()


def test_modules_have_their_own_paths(decoder: Lower) -> None:
    found = set(modules(decoder("fp32").flat, "decode_64"))
    assert {"model.embed_tokens", "model.layers.0.mlp.down_proj", "model.norm"} <= found
    assert not [path for path in found if ">" in path]


def test_buffers_that_several_tensors_have_are_shared_as_well() -> None:
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.subgraphs, model.buffers, graph.tensors = [graph], [schema.BufferT()], []
    for data in (b"12345678", b"12345678", b"other"):
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        model.buffers.append(buffer)
    for number in (1, 2, 2, 3):
        tensor = schema.TensorT()
        tensor.buffer = number
        graph.tensors.append(tensor)
    assert flatbuffer.share_weights(model) == 8
    assert [tensor.buffer for tensor in graph.tensors] == [1, 1, 1, 3]


class Picks(nn.Module):
    """Rows by number, of a table and of what was computed; and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(40, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, numbers: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        return self.table.index_select(0, numbers + 1), y.index_select(0, numbers), y.index_select(1, numbers)


def test_rows_are_looked_up_by_one_operation(tmp_path: Path) -> None:
    model = Picks().eval()
    feeds = {"numbers": torch.tensor([3, 0, 5]), "x": torch.randn(6, 8)}
    program = capture(model, feeds, ("a", "b", "c"))
    module = program.entries["main"].graph.module()
    assert isinstance(module, torch.fx.GraphModule)
    assert lookups(module) == 2
    artifact = TARGET.lower(program, LowerPlan("fp32", [], {}), tmp_path)
    assert artifact.facts["entries"]["main"]["nodes"]["EMBEDDING_LOOKUP"] == 2
    given = own_feeds(artifact.entries["main"].inputs, {name: value.numpy() for name, value in feeds.items()})
    outputs = TARGET.open(artifact).run("main", given)
    with torch.no_grad():
        for name, value in zip("abc", model(**feeds), strict=True):
            assert np.allclose(outputs[name], value.numpy(), atol=1e-6)
    # Beyond the table there is an error, not numbers that are none.
    opened = interpreter(tmp_path / "model.tflite").get_signature_runner("main")
    with pytest.raises(RuntimeError, match="out of bounds"):
        opened(**{**given, "numbers": np.array([3, 39, 5], np.int32)})


class Tied(nn.Module):
    """A table that is looked up in, and multiplied with under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.table(ids)))
        return y


@pytest.mark.parametrize(
    ("precision", "keep", "wanted"),
    [
        ("w4", Keep(modules=("head",), at="w8"), {"table": "int4 in blocks of 32", "head": "int8"}),
        ("w4", Keep(modules=("table",), at="w8"), {"table": "int8", "head": "int4 in blocks of 32"}),
        ("w4", Keep(modules=("head",)), {"table": "int4 in blocks of 32"}),
        ("w8", Keep(modules=("table",)), {"head": "int8"}),
    ],
)
def test_a_shared_table_may_be_stored_in_two_ways(
    tmp_path: Path, precision: str, keep: Keep, wanted: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.tensor([3, 95, 0])
    program: Program = capture(model, {"ids": ids}, ("y",))
    plan = LowerPlan(precision, [], {}, quant=QuantPlan(precision, keep=(keep,)))
    artifact = TARGET.lower(program, plan, tmp_path)
    stored = artifact.facts["entries"]["main"]["quantized"]["operations"]
    assert {item["module"]: item["weights"] for item in stored} == wanted
    out: Array = TARGET.open(artifact).run("main", {"ids": ids.numpy().astype(np.int32)})["y"]
    assert 0 < compare(model(ids).detach().numpy(), out).relative_l2 < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w8"])  # the others go on to an emulated Cortex-A76, tests/profile
def test_the_trained_plm_holds(precision: str, tmp_path: Path) -> None:
    bundle = edgeattn.export("plm-tiny", target="tflite", precision=precision, output=tmp_path)
    assert set(bundle.manifest.entries) == {
        f"{name}_{rows}" for name in ("decode", "prefill_32", "prefill_128") for rows in (512, 4096)
    }
    assert 0 < bundle.verify().worst.relative_l2 <= TOLERANCES[precision]
