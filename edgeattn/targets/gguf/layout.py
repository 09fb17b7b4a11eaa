"""Names and shapes of PLM's tensors in a GGUF file: llama.cpp's arch ``plm`` (PR 12457)."""

from __future__ import annotations

from edgeattn.models.plm import PLMConfig

ARCH = "plm"
#: Modules of a layer and llama.cpp's names for them, in the order in which they are computed with.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def names(config: PLMConfig) -> dict[str, str]:
    """llama.cpp's names of all tensors, by the path of the module whose weight they are."""
    found = {"model.embed_tokens": "token_embd"}
    for i in range(config.num_hidden_layers):
        found |= {f"model.layers.{i}.{module}": f"blk.{i}.{name}" for module, name in _LAYER.items()}
    found["model.norm"] = "output_norm"
    return {module: f"{name}.weight" for module, name in found.items()}


def shape(module: str, config: PLMConfig) -> tuple[int, ...]:
    """Of a module's weight in the training form: (out, in), or (width,) of norms."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shapes = {
        "embed_tokens": (config.vocab_size, hidden),
        "q_proj": (heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + value), latent),
        "o_proj": (hidden, heads * value),
        "up_proj": (config.intermediate_size, hidden),
        "down_proj": (hidden, config.intermediate_size),
    }
    return shapes.get(module.rsplit(".", 1)[-1], (hidden,))
