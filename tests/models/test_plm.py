"""PLM: the released sizes, names and forward; checkpoints as they are released, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgeattn import recipe as recipes
from edgeattn.core.errors import UsageError
from edgeattn.models.build import build
from edgeattn.models.decoder import Decoder
from edgeattn.models.layers.mla import AbsorbedAttention
from edgeattn.models.plm import PLM, PLMConfig, config_of, half_split, interleaved, plm
from edgeattn.reparam import reparameterize

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def small(seed: int = 0, **changes: Any) -> PLM:
    torch.manual_seed(seed)
    model = plm(**(SIZES | changes)).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.mul_(8)  # so that attention is not uniform
    return model


def test_plm_1_8b_has_the_released_tensors() -> None:
    with torch.device("meta"):
        model = PLM(PLMConfig())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layer = {
        "input_layernorm.weight": (2048,),
        "self_attn.q_proj.weight": (3072, 2048),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (4096, 512),
        "self_attn.o_proj.weight": (2048, 2048),
        "post_attention_layernorm.weight": (2048,),
        "mlp.up_proj.weight": (8192, 2048),
        "mlp.down_proj.weight": (2048, 8192),
    }
    wanted: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        **{f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in layer.items()},
    }
    assert shapes == wanted
    assert len(shapes) == 290
    assert sum(p.numel() for p in model.parameters()) == 1_825_458_176
    assert sum(width for _, width in model.cache_rows()) * 2 * 4096 == 144 * 2**20  # float16, 4,096 tokens


def by_hand(state: dict[str, torch.Tensor], config: PLMConfig, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) from released weights, token by token and head by head, rotary pairs as complex numbers."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    value, latent = config.v_head_dim, config.kv_lora_rank

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / torch.sqrt((x * x).mean() + config.rms_norm_eps)

    def turned(x: torch.Tensor, t: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(-1, 2).contiguous())
        angles = t * config.rope_theta ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(-1)

    xs = [state["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(config.num_hidden_layers):
        own = {k.removeprefix(f"model.layers.{layer}."): v for k, v in state.items() if f".{layer}." in k}
        up = own["self_attn.kv_b_proj.weight"].view(heads, nope + value, latent)
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        out = []
        for t, x in enumerate(xs):
            h = norm(x, own["input_layernorm.weight"])
            q = (own["self_attn.q_proj.weight"] @ h).view(heads, nope + rope)
            a = own["self_attn.kv_a_proj_with_mqa.weight"] @ h
            c, k_rope = norm(a[:latent], own["self_attn.kv_a_layernorm.weight"]), turned(a[latent:], t)
            keys.append(torch.stack([torch.cat([up[i, :nope] @ c, k_rope]) for i in range(heads)]))
            values.append(torch.stack([up[i, nope:] @ c for i in range(heads)]))
            mixed = []
            for i in range(heads):
                query = torch.cat([q[i, :nope], turned(q[i, nope:], t)])
                scores = torch.stack([query @ k[i] for k in keys]) / (nope + rope) ** 0.5
                mixed.append(torch.stack([v[i] for v in values]).t() @ scores.softmax(0))
            x = x + own["self_attn.o_proj.weight"] @ torch.cat(mixed)
            h = norm(x, own["post_attention_layernorm.weight"])
            out.append(x + own["mlp.down_proj.weight"] @ (own["mlp.up_proj.weight"] @ h).clamp(min=0) ** 2)
        xs = out
    return torch.stack([state["model.embed_tokens.weight"] @ norm(x, state["model.norm.weight"]) for x in xs])


def test_the_forward_is_that_of_the_sheet() -> None:
    model = small().double()
    released = interleaved(model.state_dict(), model.config)
    ids = torch.randint(0, 211, (1, 9), generator=torch.Generator().manual_seed(3))
    wanted = by_hand(released, model.config, ids[0].tolist())
    assert float((model(ids)[0] - wanted).norm() / wanted.norm()) < 1e-6  # the tables of angles are float32


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5).map(lambda n: 2 * n), st.integers(1, 9))
def test_reordering_and_back(heads: int, nope: int, rope: int, latent: int) -> None:
    sizes = {"num_attention_heads": heads, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "kv_lora_rank": latent}
    model = plm(**(SIZES | sizes))
    state = model.state_dict()
    back = half_split(interleaved(state, model.config), model.config)
    assert all(torch.equal(value, state[name]) for name, value in back.items())


def test_absorbing_is_proven_and_a_step_agrees_at_every_position() -> None:
    model = small()
    assert isinstance(model, Decoder)
    ids = torch.randint(0, 211, (1, 60), generator=torch.Generator().manual_seed(1))
    result = reparameterize(model, ids)
    assert {block.rule for block in result.proof.fused} == {"mla"}
    assert len(result.proof.fused) == 2
    assert max(max(b.errors.float64_real, b.errors.float64_random) for b in result.proof.fused) <= 1e-10
    assert all(isinstance(layer.self_attn.kv_b_proj, AbsorbedAttention) for layer in result.model.model.layers)
    whole = model(ids)[0]
    logits, rows = model.rows(ids, torch.arange(60))
    assert torch.equal(logits, whole)
    cache = [torch.zeros(1, 64, width) for _, width in model.cache_rows()]
    first, new = result.model.step(ids[:, :20], torch.tensor([0]), cache, torch.tensor([19]))
    for row, part, wanted in zip(cache, new, rows, strict=True):
        row[:, :20] = part
        assert float((part[0] - wanted[:20]).norm() / wanted[:20].norm()) < 1e-5
    steps = [first]
    for position in range(20, 60):
        logits, new = result.model.step(ids[:, position : position + 1], torch.tensor([position]), cache, None)
        for row, part in zip(cache, new, strict=True):
            row[:, position : position + 1] = part
        steps.append(logits)
    found = torch.cat(steps)
    assert float(((found - whole[19:]).norm(dim=-1) / whole[19:].norm(dim=-1)).max()) < 1e-5


def released(folder: Path, model: PLM, **config: Any) -> Path:
    """A checkpoint folder as it is released."""
    folder.mkdir()
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in interleaved(model.state_dict(), model.config).items()}
    save_file(state, folder / "model.safetensors")
    content = {**SIZES, "model_type": "plm", "hidden_act": "relu2", "q_lora_rank": None, "rope_interleave": True}
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    return folder


def resolved(folder: Path) -> recipes.Resolved:
    return recipes.resolve("edgeattn.models.plm:plm", inputs=["ids=1x8:int64:0..210"], checkpoint=folder)


def test_a_released_folder_is_read(tmp_path: Path) -> None:
    """Its sizes come from config.json, its rotary rows are put in order, and it computes what it did."""
    model = small()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    built = build(resolved(released(tmp_path / "plm", model)))
    ids = torch.arange(8)[None]
    assert torch.equal(built.model(ids), model(ids))
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_of_released_weights_is_put_in_order_as_a_folder_is(tmp_path: Path, kind: str) -> None:
    """Read as it stands it would be another model, and every export of that would hold."""
    model = small()
    state = {k: v.contiguous() for k, v in interleaved(model.state_dict(), model.config).items()}
    file = tmp_path / f"plm.{kind}"
    if kind == "pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    sizes = recipes.resolve("edgeattn.models.plm:plm", inputs=["ids=1x8:int64:0..210"], checkpoint=file, args=SIZES)
    assert torch.equal(build(sizes).model(torch.arange(8)[None]), model(torch.arange(8)[None]))


def test_sharded_folders_are_read_and_may_not_leave_themselves(tmp_path: Path) -> None:
    model = small()
    folder = released(tmp_path / "plm", model)
    whole = folder / "model.safetensors"
    state = {k: v.contiguous() for k, v in interleaved(model.state_dict(), model.config).items()}
    names = sorted(state)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == part}, folder / part)
    whole.unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    built = build(resolved(folder))
    assert torch.equal(built.model(torch.arange(8)[None]), model(torch.arange(8)[None]))
    index.write_text(json.dumps({"weight_map": {names[0]: "../outside.safetensors"}}))
    with pytest.raises(UsageError, match="a file of the checkpoint is missing"):
        build(resolved(folder))
    index.write_text("{")
    with pytest.raises(UsageError, match="index is damaged"):
        build(resolved(folder))


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    model = small()
    folder = released(tmp_path / "plm", model)
    state = {k: v.contiguous() for k, v in interleaved(model.state_dict(), model.config).items()}
    state["model.layers.0.mlp.up_proj.wieght"] = state.pop("model.layers.0.mlp.up_proj.weight")
    state["model.norm.weight"] = torch.ones(7)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        build(resolved(folder))
    text = "\n".join(caught.value.details)
    assert "missing: model.layers.0.mlp.up_proj.weight (64, 48)" in text
    assert "is it model.layers.0.mlp.up_proj.weight?" in text
    assert "shape: model.norm.weight is (7,), the model has (48,)" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"q_lora_rank": 64}, "q_lora_rank = 64"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"hidden_size": -4}, "hidden_size = -4"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
    ],
)
def test_a_configuration_that_is_not_plms_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = released(tmp_path / "plm", small(), **change)
    with pytest.raises(UsageError) as caught:
        build(resolved(folder))
    assert said in str(caught.value.value)
    assert config_of(SIZES, "here") == PLMConfig(**SIZES)


def test_a_damaged_configuration_and_an_empty_folder(tmp_path: Path) -> None:
    folder = released(tmp_path / "plm", small())
    (folder / "config.json").write_text("[1, 2")
    with pytest.raises(UsageError, match="configuration is damaged"):
        build(resolved(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="the folder holds no checkpoint"):
        resolved(tmp_path / "empty")


def test_a_size_that_there_is_none_of() -> None:
    with pytest.raises(UsageError, match="no such size"):
        plm(hidden=64)
