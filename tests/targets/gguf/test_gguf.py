"""The gguf target on a small PLM: blocks, names, tokenizer, and the numbers under our runtime and under llama.cpp."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from gguf.tensor_mapping import get_tensor_name_map
from tokenizers import Tokenizer
from torch import nn

from edgeattn.capture import capture
from edgeattn.core import tools
from edgeattn.core.errors import ConversionFailed, ToolchainMissing, UsageError
from edgeattn.core.numerics import compare
from edgeattn.models.plm import PLM, PLMConfig, interleaved
from edgeattn.quant.rounding import round_rows
from edgeattn.recipe import Keep
from edgeattn.targets.base import Artifact
from edgeattn.targets.gguf.blocks import F16, F32, Q4_0, Q4_K, Q8_0, decode, encode, fitting
from edgeattn.targets.gguf.file import read_gguf, write_gguf
from edgeattn.targets.gguf.layout import names, shape
from edgeattn.targets.gguf.llama import LlamaRuntime
from edgeattn.targets.gguf.vocabulary import Vocabulary
from tests.targets.gguf.small import QWEN2, SMALL, TARGET, deploy, lowered, random_plm, rng

#: Largest relative L2 of the logits: a third more than rounding the weights of a random model was measured to cost.
LOGITS_OFF = {"fp32": 1e-6, "fp16": 7.5e-4, "w8": 0.02, "w4": 0.31, "q4_k": 0.27}
TEXTS = [
    "Hello, world! 12345",
    "def f(x):\n    return x ** 2  # naïve café\n\n\n\tdone",
    "日本語 😀👩‍👩‍👧 ümlaut",
    "<|im_start|>user\nHi<|im_end|>\n",
    "don't CAN'T  two  spaces   \n \n",
    "\u00a0x\u2003y ",
]


def fields(path: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


# Blocks


def far(rows, kind) -> float:
    return compare(rows, decode(encode(rows, kind), kind)).relative_l2


def test_blocks_lose_what_their_bits_cost() -> None:
    rows = rng().normal(0, 0.02, (64, 512)).astype(np.float32)
    assert far(rows, F32) == 0
    assert 1e-4 < far(rows, F16) < 3e-4
    assert 4e-3 < far(rows, Q8_0) < 6e-3
    assert 0.08 < far(rows, Q4_0) < 0.087
    # Offsets are worth 15 % on normal weights; a plain range without a search gives 0.0755.
    assert 0.07 < far(rows, Q4_K) < 0.0725


def test_offsets_pay_where_weights_lie_on_one_side() -> None:
    rows = rng().uniform(-0.3, -0.1, (8, 256)).astype(np.float32)
    assert far(rows, Q4_K) < far(rows, Q4_0) / 2
    assert far(-rows, Q4_K) < 0.1  # an offset cannot be positive: these are stored from zero on


def test_q4_0_has_the_integers_of_every_other_target() -> None:
    rows = rng().normal(0, 1, (4, 64)).astype(np.float32)
    integers, scales = round_rows(rows, 4, 32)
    expected = integers.reshape(4, 2, 32) * scales.astype(np.float16).astype(np.float32)[..., None]
    assert np.array_equal(decode(encode(rows, Q4_0), Q4_0), expected.reshape(4, 64))


def test_q4_k_gives_back_what_lies_on_its_grid() -> None:
    generator = rng()
    steps = generator.integers(1, 64, (16, 8, 1)) * np.float32(2**-10)
    offsets = generator.integers(0, 64, (16, 8, 1)) * np.float32(2**-9)
    steps[:, 0], offsets[:, 0] = 63 * 2**-10, 63 * 2**-9  # the largest ones make the units
    integers = generator.integers(0, 16, (16, 8, 32))
    integers[:, :, :2] = 0, 15
    rows = (steps * integers - offsets).astype(np.float32)
    rows = rows[(rows.min(axis=(1, 2)) < 0)].reshape(-1, 256)
    assert len(rows) == 16
    back = decode(encode(rows, Q4_K), Q4_K)
    # Ranges that begin above 0 are not on it: offsets are not negative.
    assert np.abs(back - rows).max() < 1e-6


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_K])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-8])
def test_blocks_of_one_number_are_finite_and_near_it(kind, value) -> None:
    back = decode(encode(np.full((2, 256), value, np.float32), kind), kind)
    assert np.isfinite(back).all()
    assert np.abs(back - value).max() <= max(1e-3 * abs(value), 1e-8)


def test_rows_are_encoded_the_same_in_pieces() -> None:
    rows = rng().normal(0, 1, (700, 256)).astype(np.float32)  # more than what is rounded at a time
    for kind in (Q8_0, Q4_0, Q4_K):
        assert np.array_equal(encode(rows, kind)[600:], encode(rows[600:], kind))


def test_a_kind_fits_where_its_blocks_cut_the_rows() -> None:
    assert [fitting(Q4_K, width) for width in (512, 288, 48)] == [Q4_K, Q4_0, F16]
    assert [fitting(Q8_0, width) for width in (64, 48)] == [Q8_0, F16]


# Names, sizes, file


def test_names_are_those_of_the_gguf_package() -> None:
    table = get_tensor_name_map(gguf.MODEL_ARCH.PLM, 32)
    found = names(PLMConfig())
    assert len(found) == 290
    assert {f"{table.get_name(module)}.weight" for module in found} == set(found.values())
    assert all(f"{table.get_name(module)}.weight" == name for module, name in found.items())


def test_shapes_are_those_of_the_model() -> None:
    with torch.device("meta"):
        state = PLM(PLMConfig()).state_dict()
    assert {f"{module}.weight": shape(module, PLMConfig()) for module in names(PLMConfig())} == {
        name: tuple(value.shape) for name, value in state.items()
    }


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_a_file_holds_the_released_tensors(tmp_path, form) -> None:
    model = random_plm()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    held = (deploy(model) if form == "deploy" else model).state_dict()
    out = tmp_path / "a.gguf"
    write_gguf(held, SMALL, None, lambda _: F32, out, {})
    config, weights = read_gguf(out)
    assert config == SMALL
    released = interleaved(state, SMALL)
    assert set(weights) == set(released)
    assert all(np.array_equal(weights[name], released[name].numpy()) for name in weights)
    # The rotary rows do move.
    assert not np.array_equal(
        weights["model.layers.0.self_attn.q_proj.weight"], state["model.layers.0.self_attn.q_proj.weight"]
    )


def test_metadata_and_shapes_are_what_llama_cpp_reads(program, tmp_path, tokenizer) -> None:
    artifact = lowered(program, tmp_path, "w8", tokenizer=tokenizer)
    found = fields(artifact.folder / "model.gguf")
    expected = {
        "general.architecture": "plm",
        "general.name": "tiny",
        "general.author": "Ada",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "edgeattn.precision": "w8",
        "plm.block_count": 2,
        "plm.context_length": 512,
        "plm.embedding_length": 256,
        "plm.feed_forward_length": 512,
        "plm.attention.head_count": 4,
        "plm.attention.head_count_kv": 4,
        "plm.rope.freq_base": 100000.0,
        "plm.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "plm.vocab_size": 300,
        "plm.attention.kv_lora_rank": 64,
        "plm.attention.key_length": 64,
        "plm.attention.value_length": 32,
        "plm.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: found[key] for key in expected} == expected
    tensors = {
        t.name: ([int(n) for n in t.shape], t.tensor_type)
        for t in gguf.GGUFReader(artifact.folder / "model.gguf").tensors
    }
    assert tensors["token_embd.weight"] == ([256, 300], Q8_0)
    assert tensors["blk.1.attn_kv_a_mqa.weight"] == ([256, 96], Q8_0)
    assert tensors["blk.1.attn_kv_b.weight"] == ([64, 256], Q8_0)
    assert tensors["blk.1.ffn_down.weight"] == ([512, 256], Q8_0)
    assert tensors["blk.0.attn_kv_a_norm.weight"] == ([64], F32)
    assert "output.weight" not in tensors
    assert artifact.facts["notes"] == [
        "llama.cpp does not apply NFC: text with decomposed accents becomes other tokens"
    ]


def test_a_tokenizer_keeps_its_tokens_and_unused_rows_are_said(program, tmp_path, tokenizer) -> None:
    found = fields(lowered(program, tmp_path, "fp16", tokenizer=tokenizer).folder / "model.gguf")
    own = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300
    assert tokens[:290] == [own.id_to_token(i) for i in range(290)]
    assert tokens[290:] == [f"[PAD{i}]" for i in range(290, 300)]
    kinds = gguf.TokenType
    assert list(types) == [kinds.CONTROL] * 3 + [kinds.NORMAL] * 287 + [kinds.UNUSED] * 10
    merges = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


# The target


@pytest.mark.parametrize(
    ("precision", "blocks"), [("fp32", ""), ("fp16", ""), ("w8", ""), ("w4", "q4_0"), ("w4", "q4_k")]
)
def test_entries_run_to_the_models_numbers(program, model, tmp_path, precision, blocks) -> None:
    artifact = lowered(program, tmp_path, precision, **({"blocks": blocks} if blocks else {}))
    runtime, bound = TARGET.open(artifact), LOGITS_OFF.get(blocks, LOGITS_OFF[precision])
    ids, rows = rng().integers(0, 300, (1, 20)), dict.fromkeys((n for n, _ in model.cache_rows()), None)
    with torch.no_grad():
        whole = model(torch.from_numpy(ids)).numpy()
    assert compare(whole, runtime.logits(ids)).relative_l2 < bound
    # 12 tokens at once, then one by one behind a growing cache.
    cache = {name: np.zeros((1, 1, width), np.float32) for name, width in model.cache_rows()}
    outputs = runtime.run("prefill_16", {"ids": ids[:, :12], "position": np.array([0]), **cache})
    cache = {name: outputs[f"new_{name}"] for name in rows}
    assert compare(whole[:, 11], outputs["logits"]).relative_l2 < bound
    for i in range(12, 20):
        outputs = runtime.run("decode", {"ids": ids[:, i : i + 1], "position": np.array([i]), **cache})
        cache = {name: np.concatenate([cache[name], outputs[f"new_{name}"]], axis=1) for name in rows}
    assert compare(whole[:, 19], outputs["logits"]).relative_l2 < bound


def test_entries_say_how_they_vary(program, tmp_path) -> None:
    artifact = lowered(program, tmp_path, "fp16")
    entry = artifact.entries["prefill_16"]
    inputs = {t.name: t for t in entry.inputs}
    assert (inputs["ids"].shape, inputs["ids"].dtype, inputs["ids"].dynamic) == ((1, 16), "int64", ((1, 1, 16, 16),))
    assert (inputs["latent_1"].shape, inputs["latent_1"].dynamic) == ((1, 64, 64), ((1, 1, 64, 64),))
    outputs = {t.name: t for t in entry.outputs}
    assert outputs["logits"].shape == (1, 300)
    assert (outputs["new_rope_0"].shape, outputs["new_rope_0"].dynamic) == ((1, 16, 32), ((1, 1, 16, 16),))
    decode = {t.name: t for t in (*artifact.entries["decode"].inputs, *artifact.entries["decode"].outputs)}
    assert (decode["ids"].shape, decode["ids"].dynamic) == ((1, 1), ())
    assert (decode["new_latent_0"].shape, decode["new_latent_0"].dynamic) == ((1, 1, 64), ())
    with pytest.raises(UsageError, match="another shape"):
        TARGET.open(artifact).run(
            "decode", {t.name: np.zeros((2, *t.shape[1:]), t.dtype) for t in artifact.entries["decode"].inputs}
        )


def test_files_take_the_bytes_of_their_kind(program, tmp_path) -> None:
    facts = {p: lowered(program, tmp_path / p, p).facts for p in ("fp16", "w8", "w4")}
    matrices = sum(int(np.prod(shape(m, SMALL))) for m in names(SMALL) if len(shape(m, SMALL)) > 1)
    sizes = {"fp16": 2 * matrices, "w8": matrices * 34 / 32, "w4": matrices * 18 / 32}
    kinds = {"fp16": "F16", "w8": "Q8_0", "w4": "Q4_0"}
    for precision, size in sizes.items():
        assert facts[precision]["weight_bytes"][kinds[precision]] == size
        assert facts[precision]["tensors"] == {kinds[precision]: 13, "F32": 7}
        assert facts[precision]["fallbacks"] == []


def test_rows_that_q4_k_cannot_cut_are_q4_0_and_said(program, tmp_path) -> None:
    facts = lowered(program, tmp_path, "w4", blocks="q4_k").facts
    assert facts["tensors"] == {"Q4_K": 9, "Q4_0": 4, "F32": 7}
    assert {f["tensor"] for f in facts["fallbacks"]} == {
        f"blk.{i}.{n}.weight" for i in (0, 1) for n in ("attn_kv_b", "attn_output")
    }
    assert facts["fallbacks"][0] == {
        "tensor": "blk.0.attn_kv_b.weight",
        "kind": "Q4_0",
        "wanted": "Q4_K",
        "why": "rows of 64 numbers are not cut into blocks of Q4_K",
    }


def test_a_recipe_keeps_modules_in_more_bits(program, tmp_path) -> None:
    keep = (Keep(modules=("model.embed_tokens",), at="w8"), Keep(modules=("model.layers.*.mlp.down_proj",), at="float"))
    artifact = lowered(program, tmp_path, "w4", keep)
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == Q8_0
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.1.ffn_down.weight"] == F16
    assert kinds["blk.0.ffn_up.weight"] == Q4_0
    assert artifact.facts["tensors"] == {"Q4_0": 10, "Q8_0": 1, "F16": 2, "F32": 7}


def test_a_file_made_elsewhere_is_one_forward(program, model, tmp_path) -> None:
    lowered(program, tmp_path, "fp16")
    artifact = TARGET.adopt(tmp_path / "model.gguf")
    assert artifact is not None
    assert artifact.precision == "fp16"
    ids = rng().integers(0, 300, (1, 9))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).numpy()
    assert compare(expected, TARGET.open(artifact).run("main", {"ids": ids})["logits"]).relative_l2 < LOGITS_OFF["fp16"]
    assert TARGET.adopt(tmp_path / "model.onnx") is None


def test_what_no_file_can_hold_is_refused(tmp_path, program, model) -> None:
    linear = capture(nn.Linear(4, 3), {"x": torch.zeros(2, 4)}, ("y",))
    with pytest.raises(ConversionFailed, match="cannot hold this model") as caught:
        lowered(linear, tmp_path / "a", "fp16")
    assert "plm alone" in str(caught.value)
    state = model.state_dict()

    def write(changed):
        write_gguf(
            {k: v for k, v in (state | changed).items() if v is not None},
            SMALL,
            None,
            lambda _: Q8_0,
            tmp_path / "b",
            {},
        )

    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConversionFailed, match="missing") as caught:
        write({name: None})
    assert caught.value.value == name
    with pytest.raises(ConversionFailed, match="another shape"):
        write({name: state[name][:-1]})
    for wrong in (torch.nan, torch.inf, 7e4):
        with pytest.raises(ConversionFailed, match="cannot be stored"):
            write({name: state[name].clone().index_fill_(0, torch.tensor(3), wrong)})


def test_damaged_and_foreign_files_are_refused(tmp_path, program) -> None:
    lowered(program, tmp_path, "fp16")
    whole = (tmp_path / "model.gguf").read_bytes()
    for end in (0, 3, 100, 2000):
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(UsageError, match="cannot be read"):
            TARGET.adopt(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole[:-5000])
    with pytest.raises(UsageError, match="cannot be read"):
        read_gguf(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UsageError, match="another model"):
        TARGET.adopt(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"model": {"type": "Unigram", "vocab": {"a": 0}}},
    ],
)
def test_tokenizers_that_llama_cpp_does_not_know_are_refused(tmp_path, tokenizer, change) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(ConversionFailed, match="other tokens"):
        Vocabulary.of(tmp_path)


def test_other_regular_expressions_are_refused_and_gpt2s_own_is_known(tmp_path, tokenizer) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": plain, "normalizer": None}))
    assert (Vocabulary.of(tmp_path).split, Vocabulary.of(tmp_path).notes) == ("gpt-2", ())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConversionFailed):
        Vocabulary.of(tmp_path)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path, program, tokenizer) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Vocabulary.of(tmp_path)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"more{i}": 290 + i for i in range(11)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConversionFailed, match="more tokens than the model"):
        lowered(program, tmp_path / "a", "fp16", tokenizer=tmp_path)


def test_a_missing_package_is_said(program, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tools, "version", lambda name: None)
    assert TARGET.availability().fix == "pip install 'edgeattn[gguf]'"
    with pytest.raises(ToolchainMissing):
        lowered(program, tmp_path, "fp16")
    assert TARGET.others(Artifact(tmp_path, "fp16", {})) == {}


# llama.cpp


class StandIn:
    """What ``LlamaRuntime`` uses of llama_cpp.Llama; logits of a token are its number."""

    made: list[dict[str, object]] = []  # noqa: RUF012

    def __init__(self, path: str, **options: object) -> None:
        self.made.append({"path": path, **options})
        self.scores = np.full((options["n_ctx"], 300), -1.0, np.float32)

    def eval(self, tokens: list[int]) -> None:
        self.scores[: len(tokens)] = np.array(tokens)[:, None]

    def close(self) -> None: ...


def test_llama_cpp_is_asked_where_nothing_is_cached(program, model, tmp_path, monkeypatch) -> None:
    module = ModuleType("llama_cpp")
    module.Llama = StandIn
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(tools, "version", lambda name: "0.3.36")
    artifact = lowered(program, tmp_path, "fp32")
    (runtime,) = TARGET.others(artifact).values()
    cache = {name: np.zeros((1, 1, width), np.float32) for name, width in model.cache_rows()}
    ids = np.arange(7)[None]
    (name, logits), *more = runtime.run("prefill_16", {"ids": ids, "position": np.array([0]), **cache}).items()
    assert (name, logits.shape, logits[0, 0], more) == ("logits", (1, 300), 6, [])
    assert runtime.run("decode", {"ids": ids[:, :1], "position": np.array([1]), **cache}) == {}
    assert StandIn.made[-1]["flash_attn"] is False
    assert (StandIn.made[-1]["type_k"], StandIn.made[-1]["n_ctx"]) == (0, 7)
    assert runtime.logits(ids).shape == (1, 7, 300)
    LlamaRuntime(lowered(program, tmp_path, "w8")).logits(ids)
    assert "type_k" not in StandIn.made[-1]
