"""RLMHSA against attention written out over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeattn.models.init import randomize
from edgeattn.models.layers.conv import MultiBranchConv2d
from edgeattn.models.layers.rlmhsa import RLMHSA


def affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in eval mode."""
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return scale, bn.bias - bn.running_mean * scale


def project(layer: MultiBranchConv2d, tokens: Tensor) -> Tensor:
    """A gMLP on (B, N, Ci), group by group."""
    total = torch.zeros(*tokens.shape[:2], layer.cout, dtype=tokens.dtype)
    for branch in layer.branches:
        scale, shift = affine(branch.bn)
        groups = branch.conv.groups
        weights = branch.conv.weight[:, :, 0, 0].chunk(groups, 0)
        parts = [x @ w.T for x, w in zip(tokens.chunk(groups, -1), weights, strict=True)]
        total = total + torch.cat(parts, -1) * scale + shift
    if layer.identity is not None:
        scale, shift = affine(layer.identity)
        total = total + tokens * scale + shift
    return total


def reference(layer: RLMHSA, x: Tensor, sr: int, head_dim: int) -> Tensor:
    b, c, h, w = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    pooled = tokens
    if sr > 1:
        rows = []
        for i in range(h // sr):
            for j in range(w // sr):
                rows.append(x[:, :, i * sr : (i + 1) * sr, j * sr : (j + 1) * sr].mean((2, 3)))
        scale, shift = affine(layer.pool[1])
        pooled = torch.stack(rows, 1) * scale + shift
    q, k, v = project(layer.q, tokens), project(layer.k, pooled), project(layer.v, pooled)
    out = torch.zeros(b, h * w, c, dtype=x.dtype)
    for head in range(c // head_dim):
        qk, wide = (
            slice(head * head_dim // 2, (head + 1) * head_dim // 2),
            slice(head * head_dim, (head + 1) * head_dim),
        )
        scores = torch.einsum("bnd,bsd->bns", q[..., qk], k[..., qk]) / (head_dim / 2) ** 0.5
        out[..., wide] = scores.softmax(-1) @ v[..., wide]
    return project(layer.proj, out).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize(
    ("channels", "sr", "size", "head_dim"),
    [(32, 1, (2, 2), 32), (64, 2, (4, 8), 32), (96, 4, (8, 8), 32), (64, 2, (5, 7), 16), (64, 1, (1, 1), 32)],
)
@torch.no_grad()
def test_equals_attention_over_tokens(channels: int, sr: int, size: tuple[int, int], head_dim: int) -> None:
    torch.manual_seed(0)
    layer = RLMHSA(channels, sr, head_dim).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    randomize(layer, x, 1)
    torch.testing.assert_close(layer(x), reference(layer, x, sr, head_dim), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_scale_is_an_attribute_that_deploy_may_set_to_one() -> None:
    torch.manual_seed(0)
    layer = RLMHSA(64).eval()
    assert layer.scale == 16**-0.5
    x = torch.randn(1, 64, 4, 4)
    before = layer(x)
    for bn in (*(branch.bn for branch in layer.q.branches),):
        bn.weight.mul_(layer.scale)
        bn.bias.mul_(layer.scale)
    layer.scale = 1.0
    torch.testing.assert_close(layer(x), before)


def test_only_the_two_transposes_that_a_matmul_takes() -> None:
    graph = torch.export.export(RLMHSA(64, 2).eval(), (torch.randn(1, 64, 4, 4),)).graph
    moved = [node for node in graph.nodes if node.op == "call_function" and "transpose" in str(node.target)]
    moved += [node for node in graph.nodes if node.op == "call_function" and "permute" in str(node.target)]
    assert len(moved) == 2
    assert all("matmul" in str(user.target) for node in moved for user in node.users)


@pytest.mark.parametrize(("channels", "head_dim"), [(48, 32), (66, 33)])
def test_widths_that_do_not_divide_are_refused(channels: int, head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        RLMHSA(channels, 1, head_dim)
