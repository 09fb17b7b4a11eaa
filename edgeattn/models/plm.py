"""PLM: a decoder with multi-head latent attention and squared ReLU (arXiv 2503.12167).

Configuration, names and forward pass are those of the released checkpoints (PLM-Team/PLM-1.8B on Hugging Face) as
their own code and llama.cpp's have them. Released weights hold rotary dimensions interleaved, (2i, 2i + 1); this
module wants them half-split, (i, i + R / 2), and reorders the rows once when a checkpoint is loaded: exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError
from edgeattn.models.layers.mla import MLA, UNSEEN, AbsorbedAttention, Past, RMSNorm

#: What a ``config.json`` may say beside the sizes: the one value that this module implements.
_FIXED: dict[str, Any] = {
    "model_type": "plm",
    "hidden_act": "relu2",
    "q_lora_rank": None,
    "rope_scaling": None,
    "rope_interleave": True,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class PLMConfig:
    """Sizes under the names of ``config.json``; the defaults are PLM-1.8B's."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    intermediate_size: int = 8192
    max_position_embeddings: int = 4096
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (field.type == "float" and isinstance(value, float))) or value <= 0:
                raise UsageError("a size of PLM is no positive number", value=f"{field.name} = {value!r}")
        if self.qk_rope_head_dim % 2:
            raise UsageError("rotary dimensions come in pairs", value=f"qk_rope_head_dim = {self.qk_rope_head_dim}")


def config_of(content: Mapping[str, Any], where: str) -> PLMConfig:
    """The sizes that a ``config.json`` has.

    Raises:
        UsageError: it is of another kind of model, or asks for something that PLM's released models do not have.
    """
    for key, value in _FIXED.items():
        if key in content and content[key] != value:
            raise UsageError(
                "the checkpoint is of a model that PLM's code does not compute",
                value=f"{key} = {content[key]!r}",
                where=where,
                why=f"it computes {key} = {value!r} alone",
                fix="export it as a model of its own: package.module:factory",
            )
    names = [field.name for field in fields(PLMConfig)]
    heads = content.get("num_key_value_heads")
    if heads is not None and heads != content.get("num_attention_heads", PLMConfig.num_attention_heads):
        raise UsageError("latent attention has no groups of heads", value=f"num_key_value_heads = {heads}", where=where)
    return PLMConfig(**{name: content[name] for name in names if name in content})


class SquaredReLU(nn.Module):
    """max(0, x)²: what it makes zero costs the next matrix nothing, where that is made use of."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return torch.relu(x).square()


class MLP(nn.Module):
    """down(max(0, up(x))²), without a gate."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.act = SquaredReLU()
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        out: Tensor = self.down_proj(self.act(self.up_proj(x)))
        return out


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, config: PLMConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = MLA(
            hidden,
            config.num_attention_heads,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            eps,
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (T, D) behind the past -> (T, D), and the new rows (T, C) and (T, R)."""
        normed, attention = self.input_layernorm(x), self.self_attn
        rows = attention.rows(normed, cos, sin)
        absorbed = attention.kv_b_proj
        assert isinstance(absorbed, AbsorbedAttention), "steps are taken in the deploy form"
        x = x + attention.o_proj(absorbed.step(*attention.queries(normed, cos, sin), *rows, past))
        return x + self.mlp(self.post_attention_layernorm(x)), rows


class Body(nn.Module):
    """Embedding, layers and the last norm, under the names of the released checkpoints."""

    def __init__(self, config: PLMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def rope_tables(config: PLMConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (context, R / 2) of all positions; angles in float64, for float32 is off by 2e-4 at 4,096."""
    pairs = torch.arange(config.qk_rope_head_dim // 2, dtype=torch.float64, device="cpu")
    frequencies = config.rope_theta ** (-2 * pairs / config.qk_rope_head_dim)
    angles = torch.arange(config.max_position_embeddings, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


class PLM(nn.Module):
    """PLM, a ``models.decoder.Decoder``.

    Args:
        config: sizes. The weights are random: normal with a deviation of 0.02, as such models start from.
    """

    def __init__(self, config: PLMConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.vocabulary = config.max_position_embeddings, config.vocab_size
        self.model = Body(config)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def from_released(self, name: str, value: Tensor) -> Tensor:
        """A weight of a checkpoint as this module holds it, see ``reordered``."""
        return reordered(name, value, self.config, split=True)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (T,) -> cos and sin (T, R / 2)."""
        assert isinstance(self.cos, Tensor)
        assert isinstance(self.sin, Tensor)
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def _logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, vocabulary), every position computed anew."""
        x = self.model.embed_tokens(ids)
        cos, sin = self._angles(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self._logits(x)

    def cache_rows(self) -> list[tuple[str, int]]:
        """See ``Decoder``: a latent and a rope part for each layer, in tensors of their own."""
        widths = (("latent", self.config.kv_lora_rank), ("rope", self.config.qk_rope_head_dim))
        return [(f"{name}_{i}", width) for i in range(self.config.num_hidden_layers) for name, width in widths]

    def rows(self, ids: Tensor, at: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See ``Decoder``."""
        x = self.model.embed_tokens(ids)
        rows: list[Tensor] = []
        cos, sin = self._angles(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            rows += layer.self_attn.rows(layer.input_layernorm(x), cos, sin)
            x = layer(x, cos, sin)
        return self._logits(x[0, at]), [row[0] for row in rows]

    def step(
        self, ids: Tensor, position: Tensor, cache: Sequence[Tensor], last: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``Decoder``."""
        x = self.model.embed_tokens(ids[0])
        cos, sin = self._angles(position + torch.arange(ids.shape[1], device=ids.device))
        filled = torch.arange(cache[0].shape[1], device=ids.device) < position
        bias = (~filled).to(x.dtype) * UNSEEN
        new: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            assert isinstance(layer, Layer)
            x, rows = layer.step(x, cos, sin, Past(cache[2 * i].squeeze(0), cache[2 * i + 1].squeeze(0), bias))
            new += [row[None] for row in rows]
        wanted = x[-1:] if last is None else x.index_select(0, last)
        return self._logits(wanted), new


def _order(rope: int, split: bool) -> Tensor:
    """Indices that bring interleaved rotary rows into half-split order, or back."""
    order = torch.arange(rope)
    return torch.cat([order[0::2], order[1::2]]) if split else order.view(2, -1).t().reshape(-1)


def reordered(name: str, value: Tensor, config: PLMConfig, split: bool) -> Tensor:
    """A weight with its rotary rows in the other order; those of other weights as they are.

    Args:
        name: of the state dict. split: from interleaved, as released, to half-split; else back.
    """
    rope, heads = config.qk_rope_head_dim, config.num_attention_heads
    if name.endswith("self_attn.q_proj.weight"):
        by_head = value.view(heads, -1, value.shape[1])
        turned = by_head[:, -rope:][:, _order(rope, split)]
        return torch.cat([by_head[:, :-rope], turned], dim=1).reshape(value.shape)
    if name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
        return torch.cat([value[:-rope], value[-rope:][_order(rope, split)]])
    return value


def half_split(state: Mapping[str, Tensor], config: PLMConfig) -> dict[str, Tensor]:
    """A released state dict as ``PLM`` wants it."""
    return {name: reordered(name, value, config, split=True) for name, value in state.items()}


def interleaved(state: Mapping[str, Tensor], config: PLMConfig) -> dict[str, Tensor]:
    """The opposite: ``PLM``'s state dict as the released checkpoints and llama.cpp have it."""
    return {name: reordered(name, value, config, split=False) for name, value in state.items()}


def plm(**sizes: Any) -> PLM:
    """PLM with random weights; ``sizes`` by the names of ``PLMConfig``, by default PLM-1.8B's."""
    unknown = [name for name in sizes if name not in {field.name for field in fields(PLMConfig)}]
    if unknown:
        raise UsageError("PLM has no such size", value=", ".join(unknown))
    with torch.device("meta"):  # else every layer would draw its weights first in its own way
        model = PLM(PLMConfig(**sizes))
    for name, parameter in list(model.named_parameters()):
        value = torch.ones(parameter.shape) if name.endswith("norm.weight") else torch.empty(parameter.shape)
        if not name.endswith("norm.weight"):
            value.normal_(std=0.02)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value))
    return model


def _from_config(content: Mapping[str, Any], where: str) -> PLM:
    """PLM of the sizes of a ``config.json``, without weights (on the meta device): a checkpoint brings them."""
    with torch.device("meta"):
        return PLM(config_of(content, where))


plm.from_config = _from_config  # type: ignore[attr-defined]
