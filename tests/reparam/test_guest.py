"""A guest's own method: used, proved, and rolled back where it lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgeattn.reparam import reparameterize

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))


class TwoConvs(nn.Module):
    """conv(x) + scale(x); ``reparameterize`` changes it in place, as timm's and MobileOne's do."""

    error = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.fused: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if self.fused is None else self.fused(x)

    def reparameterize(self) -> None:
        if self.fused is not None:
            return
        self.fused = nn.Conv2d(4, 4, 3, padding=1)
        self.fused.weight.data = self.a.weight.data + nn.functional.pad(self.b.weight.data, [1] * 4) + self.error
        self.fused.bias.data = self.a.bias.data + self.b.bias.data
        del self.a, self.b


class Wrong(TwoConvs):
    """A planted error, far below what an eye or a loose tolerance would see in float32."""

    error = 1e-7


class Raises(TwoConvs):
    def reparameterize(self) -> None:
        raise RuntimeError("not today")


class ConvNorm(nn.Sequential):
    """As RepViT's: ``fuse`` returns a new module, made in the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(4, 4, 1, bias=False))
        self.add_module("bn", nn.BatchNorm2d(4))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps) ** 0.5
        conv = nn.Conv2d(4, 4, 1)
        conv.weight.data.copy_(self.c.weight * scale[:, None, None, None])
        conv.bias.data.copy_(self.bn.bias - self.bn.running_mean * scale)
        return conv


class Outer(nn.Module):
    """Its method needs the children in their training form, as RepViT's RepVggDw does."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.left, self.right, self.fails = ConvNorm(), ConvNorm(), fails

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)

    def fuse(self) -> nn.Module:
        left, right = self.left.fuse(), self.right.fuse()
        left.weight.data += right.weight.data
        left.bias.data += right.bias.data if not self.fails else 0.01
        return left


class Model(nn.Sequential):
    """As RepVit: its own ``fuse`` only drives those inside."""

    def fuse(self) -> nn.Module:
        raise AssertionError("a driver is not called")


def settle(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def test_in_place_method() -> None:
    result = reparameterize(settle(nn.Sequential(TwoConvs(), nn.ReLU())), X)
    assert result.model[0].fused is not None
    (block,) = result.proof.fused
    assert (block.path, block.rule) == ("0", "guest")
    assert result.proof.not_fused == []


def test_returned_module_and_outermost_first() -> None:
    result = reparameterize(settle(Model(Outer(), ConvNorm())), X)
    assert [type(module) for module in result.model] == [nn.Conv2d, nn.Conv2d]
    assert [block.path for block in result.proof.fused] == ["0", "1"]


def test_planted_error_is_rolled_back_and_named() -> None:
    model = settle(nn.Sequential(TwoConvs(), Wrong()))
    result = reparameterize(model, X)
    assert [block.path for block in result.proof.fused] == ["0"]
    (entry,) = result.proof.not_fused
    assert (entry.path, entry.rule) == ("1", "guest")
    assert 1e-10 < entry.errors.float64_real < 1e-5
    assert entry.errors.float32_real < 1e-5  # float32 alone would have let it pass
    assert "rolled back" in entry.reason
    assert result.model[1].fused is None
    assert torch.equal(result.model[1].a.weight, model[1].a.weight)


def test_inside_a_block_that_does_not_hold_the_inner_ones_are_tried() -> None:
    result = reparameterize(settle(nn.Sequential(Outer(fails=True))), X)
    assert [block.path for block in result.proof.fused] == ["0.left", "0.right"]
    assert [(entry.path, entry.rule) for entry in result.proof.not_fused] == [("0", "guest")]
    assert result.proof.after.batch_norms == 0


def test_a_method_that_raises_is_reported_with_its_message() -> None:
    result = reparameterize(settle(nn.Sequential(Raises())), X)
    (entry,) = result.proof.not_fused
    assert "reparameterize() raised RuntimeError: not today" in entry.reason


def test_a_method_that_needs_arguments_is_not_guessed() -> None:
    class Fusion(nn.Conv2d):
        def fuse(self, other: Tensor) -> Tensor:
            return other

    result = reparameterize(nn.Sequential(Fusion(4, 4, 1)).eval(), X)
    assert "needs arguments" in result.proof.not_fused[0].reason


def test_a_guest_that_is_already_fused_is_not_mentioned() -> None:
    guest = nn.Sequential(TwoConvs()).eval()
    guest[0].reparameterize()
    result = reparameterize(guest, X)
    assert result.proof.fused == result.proof.not_fused == []


def test_a_guest_that_refuses_a_crop_runs_on_the_whole() -> None:
    class Fixed(TwoConvs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(1, 4, 40, 40)

    assert len(reparameterize(nn.Sequential(Fixed()).eval(), torch.randn(1, 4, 40, 40)).proof.fused) == 1


@pytest.mark.parametrize("change", ["shape", "nan"])
def test_a_fused_form_of_another_kind_does_not_hold(change: str) -> None:
    class Bad(TwoConvs):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.fused is None:
                return y
            return y[:, :1] if change == "shape" else y * float("nan")

    result = reparameterize(nn.Sequential(Bad()).eval(), X)
    assert result.proof.fused == []
    assert result.proof.not_fused[0].errors.float64_real == float("inf")
