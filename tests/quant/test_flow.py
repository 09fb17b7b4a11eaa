"""Which modules read what another gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from edgeattn.capture import Program, capture
from edgeattn.quant.flow import read_from_kept
from edgeattn.quant.plan import QuantPlan
from edgeattn.recipe import Keep


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = y + torch.relu(self.second(y))
        out: Tensor = self.head(self.norm(self.third(y).mean((2, 3))))
        return out


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net().eval(), {"x": torch.randn(1, 3, 8, 8)}, ("y",))


@pytest.mark.parametrize(
    ("kept", "readers"),
    [
        (["first"], {"second", "third"}),  # through the sum too
        (["second"], {"third"}),
        (["third"], set()),  # a norm gives its own range to what follows
        (["first", "third"], {"second"}),  # a module in floats rounds nothing itself
        ([], set()),
    ],
)
def test_readers_of_a_kept_module(program: Program, kept: Sequence[str], readers: set[str]) -> None:
    keep = (Keep(modules=tuple(kept)),) if kept else ()
    assert read_from_kept(program, QuantPlan("w8a8", keep=keep)) == readers


def test_eight_bits_instead_of_four_is_no_reason() -> None:
    program = capture(Net().eval(), {"x": torch.randn(1, 3, 8, 8)}, ("y",))
    assert not read_from_kept(program, QuantPlan("w4", keep=(Keep(modules=("first",), at="w8"),)))
