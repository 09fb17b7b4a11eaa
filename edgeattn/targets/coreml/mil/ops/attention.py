"""Attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import op


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """``softmax(query @ key.T / sqrt(E) + mask) @ value``; query [B, *?, L, E], key [.., S, E], value [.., S, EV].

    The mask broadcasts to [B, *?, L, S]: where a bool is False, or a float is -inf, an element takes no part. A row
    without any that does gives NaN, by the formula that MIL's text has and by coremltools' own inference; PyTorch
    gives zeros there.
    """
    if attn_mask is None:
        return F.scaled_dot_product_attention(query, key, value)
    if attn_mask.dim() < 2:
        attn_mask = attn_mask.unsqueeze(0)
    if attn_mask.dtype == torch.bool:
        dead = ~attn_mask.any(-1, keepdim=True)
    else:
        attn_mask = attn_mask.to(query.dtype)
        dead = attn_mask.amax(-1, keepdim=True) == -math.inf
    made = F.scaled_dot_product_attention(query, key, value, attn_mask)
    return made.masked_fill(dead, math.nan) if dead.any() else made
