"""RLMHSA: FMViT's lightweight multi-head self-attention, reparameterizable, on (B, C, H, W) maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeattn.models.layers.conv import RESIDUAL_GAIN, gmlp


class RLMHSA(nn.Module):
    """Self-attention with half-width queries and keys, and keys and values from a pooled map: (B, C, H, W) -> same.

    Every projection is a :func:`gmlp`, that is one 1x1 convolution at deploy. Keys and values come from
    ``BN(AvgPool_sr(x))``, a linear map that the deploy form merges into ``k`` and ``v``.

    The paper names the block (arXiv 2311.05707, abstract); the wiring here is a reconstruction, see docs/fmvit.md.

    Args:
        channels: C, a multiple of ``head_dim``.
        sr: side of the pooling window for keys and values; 1 means neither pooling nor its batch norm.
        head_dim: value width of a head, even; queries and keys have ``head_dim / 2``.

    Attributes:
        scale: factor on the queries, ``(head_dim / 2) ** -0.5``. Reparameterization
            folds it into ``q`` and sets it to 1.

    Raises:
        ValueError: ``channels`` is not a multiple of ``head_dim``, or ``head_dim`` is odd.
    """

    def __init__(self, channels: int, sr: int = 1, head_dim: int = 32) -> None:
        super().__init__()
        if head_dim % 2 or channels % head_dim:
            raise ValueError(f"RLMHSA needs an even head_dim that divides the channels, got {head_dim} and {channels}")
        self.heads = channels // head_dim
        self.scale: float = (head_dim // 2) ** -0.5
        self.q = gmlp(channels, channels // 2)
        self.k = gmlp(channels, channels // 2)
        self.v = gmlp(channels, channels)
        self.proj = gmlp(channels, channels, gain=RESIDUAL_GAIN)
        self.pool = nn.Sequential(nn.AvgPool2d(sr), nn.BatchNorm2d(channels)) if sr > 1 else nn.Identity()

    def _split(self, x: Tensor) -> Tensor:
        """(B, heads * d, H, W) -> (B, heads, d, H * W), a view."""
        return x.reshape(x.shape[0], self.heads, x.shape[1] // self.heads, x.shape[2] * x.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), H and W at least ``sr`` -> (B, C, H, W)."""
        q = self.q(x)
        if self.scale != 1.0:
            q = q * self.scale
        pooled = self.pool(x)
        q, k, v = self._split(q), self._split(self.k(pooled)), self._split(self.v(pooled))
        # Channels stay in front of tokens throughout, so that the map needs no transpose on its way in or out: the only
        # two transposes swap the last axes of a matmul operand, which runtimes take as a flag of the matmul. The
        # softmax is on the last axis, the only one that every target has.
        weights = torch.softmax(q.transpose(-2, -1) @ k, dim=-1)
        out: Tensor = self.proj((v @ weights.transpose(-2, -1)).reshape(x.shape))
        return out
