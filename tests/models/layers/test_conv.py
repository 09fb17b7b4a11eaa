"""The training form of the multi-branch convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeattn.models.layers.conv import MultiBranchConv2d, gmlp


def test_gmlp_takes_the_groups_that_divide_both_widths() -> None:
    assert [b.conv.groups for b in gmlp(16, 24).branches] == [1, 2, 4, 8]
    assert [b.conv.groups for b in gmlp(12, 24).branches] == [1, 2, 4]
    assert [b.conv.groups for b in gmlp(9, 24).branches] == [1]
    assert gmlp(16, 16).identity is not None
    assert gmlp(16, 24).identity is None
    assert gmlp(16, 16, identity=False).identity is None


@torch.no_grad()
def test_sum_of_the_branches() -> None:
    torch.manual_seed(0)
    layer = MultiBranchConv2d(4, 4, [(3, 2), (1, 1)], identity=True).eval()
    x = torch.randn(2, 4, 5, 6)
    expected = layer.branches[0](x) + layer.branches[1](x) + layer.identity(x)
    torch.testing.assert_close(layer(x), expected)
    assert MultiBranchConv2d(4, 8, [(3, 2)], stride=2)(x).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("gain", [1.0, 0.25])
@torch.no_grad()
def test_gain_is_the_deviation_of_a_fresh_output(gain: float) -> None:
    torch.manual_seed(0)
    layer = gmlp(64, 64, gain=gain)
    for conv in layer.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.trunc_normal_(conv.weight, std=0.02)
    assert layer(torch.randn(8, 64, 16, 16)).std().item() == pytest.approx(gain, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 4, []), "at least one"),
        ((4, 4, [(2, 1)]), "odd"),
        ((4, 8, [(1, 1)], 1, True), "identity"),
        ((4, 4, [(1, 1)], 2, True), "identity"),
    ],
)
def test_impossible_branches_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiBranchConv2d(*arguments)
