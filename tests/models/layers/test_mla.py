"""Latent attention: both forms are one function, and it is the one that others compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.models.layers.mla import MLA, UNSEEN, AbsorbedAttention, LatentAttention, Past, RMSNorm, rotate
from edgeattn.models.plm import PLMConfig, reordered


def attention(heads: int, latent: int, nope: int, rope: int, value: int, seed: int = 0) -> LatentAttention:
    torch.manual_seed(seed)
    module = LatentAttention(heads, latent, nope, rope, value).double()
    module.weight.data.normal_(std=0.3)
    return module


def inputs(module: LatentAttention, tokens: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    shapes = [(module.heads, module.nope), (module.heads, module.rope), (module.latent,), (module.rope,)]
    return tuple(torch.randn(batch, tokens, *shape, dtype=torch.float64) for shape in shapes)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


SIZES = st.tuples(
    st.integers(1, 5), st.integers(1, 24), st.integers(1, 12), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 9)
)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 20), st.integers(1, 3))
def test_expanded_and_absorbed_are_one_function(sizes: tuple[int, ...], tokens: int, batch: int) -> None:
    module = attention(*sizes)
    given_ = inputs(module, tokens, batch)
    with torch.no_grad():
        assert apart(module(*given_), AbsorbedAttention(module)(*given_)) <= 1e-10


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 12), st.integers(1, 9), st.integers(0, 5))
def test_a_step_behind_a_cache_is_the_end_of_the_whole(
    sizes: tuple[int, ...], before: int, tokens: int, spare: int
) -> None:
    """Rows that are not filled may hold anything finite: they are not seen."""
    module = attention(*sizes)
    q_nope, q_rope, latent, k_rope = inputs(module, before + tokens)
    cached = max(1, before + spare)
    past = [torch.full((cached, width), 7.0, dtype=torch.float64) for width in (module.latent, module.rope)]
    past[0][:before], past[1][:before] = latent[0, :before], k_rope[0, :before]
    bias = (torch.arange(cached) >= before).double() * UNSEEN
    with torch.no_grad():
        whole = module(q_nope, q_rope, latent, k_rope)[0, before:]
        new = [x[0, before:] for x in (q_nope, q_rope, latent, k_rope)]
        step = AbsorbedAttention(module).step(*new, Past(*past, bias))
    assert apart(whole, step) <= 1e-10


def test_the_absorbed_form_has_the_same_number_of_parameters() -> None:
    module = attention(4, 64, 32, 16, 24)
    absorbed = AbsorbedAttention(module)
    assert sum(p.numel() for p in absorbed.parameters()) == module.weight.numel()
    assert absorbed.up_k.shape == (4, 32, 64)
    assert absorbed.up_v.shape == (4, 24, 64)


def test_rms_norm_is_torchs() -> None:
    norm, theirs = RMSNorm(48, 1e-6), torch.nn.RMSNorm(48, eps=1e-6)
    norm.weight.data.uniform_(0.5, 2.0)
    theirs.weight.data.copy_(norm.weight.data)
    x = torch.randn(3, 48) * 10
    assert apart(theirs(x), norm(x)) < 1e-6


def test_statistics_of_the_norm_are_float32() -> None:
    """Squares of 1,000 do not fit in float16."""
    assert RMSNorm(8, 1e-6).half()(torch.full((1, 8), 1000.0, dtype=torch.float16)).isfinite().all()


def test_rotation_is_that_of_complex_numbers() -> None:
    x, angle = torch.randn(5, 3, 16, dtype=torch.float64), torch.randn(5, 1, 8, dtype=torch.float64)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    assert apart(torch.cat([turned.real, turned.imag], -1), rotate(x, angle.cos(), angle.sin())) < 1e-12


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_it_is_the_attention_of_transformers(tokens: int) -> None:
    """The released names and the interleaved order, against an implementation that is not ours."""
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = deepseek.DeepseekV3Config(
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=40,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=20,
        rope_interleave=True,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        attn_implementation="eager",
    )
    torch.manual_seed(1)
    theirs = deepseek.DeepseekV3Attention(config, 0).eval().double()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.2)
    ours = MLA(96, 4, 40, 24, 16, 20, 1e-6).eval().double()
    sizes = PLMConfig(
        hidden_size=96,
        num_attention_heads=4,
        kv_lora_rank=40,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=20,
    )
    state = theirs.state_dict()
    assert set(state) == set(ours.state_dict())
    ours.load_state_dict({k: reordered(f"self_attn.{k}", v, sizes, split=True) for k, v in state.items()})
    x = torch.randn(2, tokens, 96, dtype=torch.float64)
    frequencies = 100000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    both = torch.cat([angles, angles], -1)[None]
    mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        wanted, _ = theirs(x, (both.cos(), both.sin()), mask)
        assert apart(wanted, ours(x, angles.cos(), angles.sin())) < 1e-6  # their norms round to float32
