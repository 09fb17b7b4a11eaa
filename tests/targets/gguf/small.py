"""A small PLM as a GGUF file, for the tests of the target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeattn.capture import Program
from edgeattn.models.layers.mla import AbsorbedAttention
from edgeattn.models.plm import PLM, PLMConfig, plm
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.base import Artifact, LowerPlan
from edgeattn.targets.gguf import GgufTarget

TARGET = GgufTarget()
ROOT = Path(__file__).resolve().parents[3]
SMALL = PLMConfig(300, 256, 2, 4, 64, 32, 32, 32, 512, max_position_embeddings=512)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def deploy(model: PLM) -> PLM:
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = AbsorbedAttention(layer.self_attn.kv_b_proj)
    return model.eval()


def random_plm(config: PLMConfig = SMALL) -> PLM:
    torch.manual_seed(1)
    model = plm(**vars(config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # random ones, or exchanging two of them would not be seen
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def lowered(program: Program, folder: Path, precision: str, keep=(), tokenizer=None, **options: str) -> Artifact:
    folder.mkdir(exist_ok=True)
    plan = LowerPlan(
        precision,
        [],
        {"recipe": "tiny", "author": "Ada"},
        options=TARGET.settle(options, None, precision),
        quant=QuantPlan(precision, keep=tuple(keep)),
        tokenizer=tokenizer,
    )
    return TARGET.lower(program, plan, folder)
