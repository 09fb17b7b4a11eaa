"""Latent attention that is not ours: a module of transformers, served like any other model."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeattn

GUEST = '''
import torch
from torch import nn

SIZES = dict(
    vocab_size=128, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=64,
    intermediate_size=64, attn_implementation="eager",
)


class Guest(nn.Module):
    def __init__(self, attention, rotary):
        super().__init__()
        self.attention, self.rotary = attention, rotary

    def forward(self, x):
        tokens = x.shape[1]
        mask = torch.full((tokens, tokens), -1e4).triu(1)[None, None]
        angles = self.rotary(x, torch.arange(tokens)[None])
        return self.attention(x, position_embeddings=angles, attention_mask=mask)[0]


def v2():
    """Rotates with complex numbers."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as of

    config = of.DeepseekV2Config(**SIZES)
    return Guest(of.DeepseekV2Attention(config, 0), of.DeepseekV2RotaryEmbedding(config))


def v3():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as of

    config = of.DeepseekV3Config(**SIZES)
    return Guest(of.DeepseekV3Attention(config, 0), of.DeepseekV3RotaryEmbedding(config))
'''


@pytest.mark.parametrize(("factory", "target"), [("v2", "onnx"), ("v2", "tflite"), ("v2", "coreml"), ("v3", "onnx")])
def test_a_module_of_transformers_is_exported(tmp_path: Path, factory: str, target: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "guest.py").write_text(GUEST)
    bundle = edgeattn.export(f"{tmp_path}/guest.py:{factory}", target, inputs=["x=1x12x96"], output=tmp_path)
    assert bundle.verify().worst.relative_l2 <= 1e-5
