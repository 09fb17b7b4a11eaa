"""Parts of a vision transformer whose linear maps are given to it: linear layers, or convolutions shared by all tokens.

A token is a row of D numbers or a map of M x M: (B, T, D) or (B, T, M, M).

Source: ViT (arXiv 2010.11929); pre-norm blocks, as in timm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Attention(nn.Module):
    """Multi-head self-attention of a ViT; (B, T, ...) -> same. What is learned are the layers it is given.

    Queries, keys and values of all heads come from one layer, in this order. Softmax(scale Q Kᵀ) V is a ViT's: two
    products of activations, for which optics have no fixed mask.

    Args:
        qkv: of 3 * heads * d_head numbers a token. proj: from the heads' results to a token.
        heads: h. d_head: numbers of a head's query.
        inside, joined: shapes of a token (after B and T) that ``qkv`` and ``proj`` take.
    """

    def __init__(self, qkv: nn.Module, proj: nn.Module, heads: int, d_head: int, inside: Shape, joined: Shape) -> None:
        super().__init__()
        self.qkv, self.proj = qkv, proj
        self.heads, self.inside, self.joined = heads, inside, joined
        self.scale: float = float(d_head**-0.5)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, ...) -> A (B, h, T, T), rows sum to 1, and V (B, h, T, d_head)."""
        b, t = x.shape[:2]
        y = self.qkv(x.reshape(b, t, *self.inside)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = y.unbind(0)
        return torch.softmax((q * self.scale) @ k.transpose(-2, -1), dim=-1), v

    def maps(self, x: Tensor) -> Tensor:
        """x (B, T, ...) -> the attention of each token to every other, (B, h, T, T)."""
        return self._weights(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, ...) -> the same shape."""
        weights, v = self._weights(x)
        joined = (weights @ v).transpose(1, 2).reshape(*x.shape[:2], *self.joined)
        out: Tensor = self.proj(joined).reshape(x.shape)
        return out


class Mlp(nn.Module):
    """A layer, GELU, a layer back; (B, T, ...) -> same.

    Args:
        fc1, fc2: the layers. inside, hidden: shapes of a token (after B and T) that they take.
    """

    def __init__(self, fc1: nn.Module, fc2: nn.Module, inside: Shape, hidden: Shape) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = fc1, nn.GELU(), fc2
        self.inside, self.hidden = inside, hidden

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, ...) -> the same shape."""
        b, t = x.shape[:2]
        y = self.act(self.fc1(x.reshape(b, t, *self.inside)))
        out: Tensor = self.fc2(y.reshape(b, t, *self.hidden)).reshape(x.shape)
        return out


class Block(nn.Module):
    """x + Attention(LN(x)), then x + Mlp(LN(x)), as in ViT; the norms are over a whole token."""

    def __init__(self, token: Shape, attn: Attention, mlp: Mlp, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(token, eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(token, eps)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, *token) -> the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def patchify(x: Tensor, patch: int) -> Tensor:
    """x (B, C, H, W) -> its patches in rows, (B, T, C, P, P). No tensor on the way has more than five axes."""
    b, c, h, w = x.shape
    rows, columns = h // patch, w // patch
    tiles = x.reshape(b * c, rows, patch, columns, patch).transpose(2, 3)
    return tiles.reshape(b, c, rows * columns, patch, patch).transpose(1, 2)
