"""Blocks that hold on their own, in models that they do not fit: undone one by one, the others stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.reparam import Proof, Reparameterized, reparameterize

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def reparam(model: nn.Module, x: Tensor = X) -> Reparameterized:
    """Reparameterize, and hold that the result computes what the model does, which is unchanged."""
    settle(model)
    with torch.no_grad():
        expected = model(x)
        result = reparameterize(model, x)
        torch.testing.assert_close(result.model(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x), expected)
    assert result.proof.holds
    return result


def fused(proof: Proof) -> list[tuple[str, str]]:
    return [(block.rule, block.path) for block in proof.fused]


def reason(proof: Proof, path: str, rule: str) -> str:
    (entry,) = [entry for entry in proof.not_fused if (entry.path, entry.rule) == (path, rule)]
    return entry.reason


class Pairs(nn.Module):
    """Convolutions c0, c1, ... with batch norms b0, b1, ...; ``apply(model, index, x)`` runs one pair."""

    def __init__(self, count: int, apply: Callable[[Any, int, Tensor], Tensor]) -> None:
        super().__init__()
        self.count, self.apply_pair = count, apply
        for index in range(count):
            self.add_module(f"c{index}", nn.Conv2d(8, 8, 3, padding=1))
            self.add_module(f"b{index}", nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.count):
            x = self.apply_pair(self, index, x)
        return x


def plain(model: Any, index: int, x: Tensor) -> Tensor:
    y: Tensor = getattr(model, f"b{index}")(getattr(model, f"c{index}")(x))
    return y


READS: dict[str, Callable[[nn.BatchNorm2d, Tensor], Tensor]] = {
    "eps": lambda bn, y: y * (1 + bn.eps),
    "running_var": lambda bn, y: y / (1 + bn.running_var.mean()),
    "dtype": lambda bn, y: y.to(bn.weight.dtype),
    "statistics": lambda bn, y: F.batch_norm(y, bn.running_mean, bn.running_var),
}


@pytest.mark.parametrize("read", READS)
def test_a_forward_that_reads_more_of_a_replaced_module_keeps_only_that_block(read: str) -> None:
    def apply(model: Any, index: int, x: Tensor) -> Tensor:
        y = plain(model, index, x)
        return READS[read](getattr(model, f"b{index}"), y) if index in (1, 2) else y

    proof = reparam(Pairs(5, apply)).proof
    assert fused(proof) == [("conv_bn", "c0"), ("conv_bn", "c3"), ("conv_bn", "c4")]
    for path in ("c1", "c2"):
        assert "raises AttributeError" in reason(proof, path, "conv_bn")
    assert proof.after.batch_norms == 2


def test_layers_that_are_also_held_in_a_list_are_not_claimed() -> None:
    class Listed(Pairs):
        def __init__(self) -> None:
            super().__init__(3, plain)
            self.layers = [self.c0, self.b0]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return plain(self, 2, plain(self, 1, x))

    proof = reparam(Listed()).proof
    assert fused(proof) == [("conv_bn", "c1"), ("conv_bn", "c2")]
    assert "still calls the old c0, b0" in reason(proof, "c0", "conv_bn")
    assert proof.after.batch_norms == 1


def test_a_module_inside_a_replaced_one_is_not_claimed_twice() -> None:
    class Attention(nn.Module):
        """Attention over attention: the outer block's copy holds a copy of the inner one."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.scale, self.qkv, self.inner = 0.5, nn.Linear(8, 24), inner

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.inner(x)).chunk(3, -1)
            y: Tensor = ((q * self.scale) @ k.mT).softmax(-1) @ v
            return y

    result = reparam(nn.Sequential(Attention(Attention(nn.Identity()))), torch.randn(2, 5, 8))
    scales = [module.scale for module in result.model.modules() if isinstance(module, Attention)]
    assert len(fused(result.proof)) == scales.count(1.0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.qkv = 0.5, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        y: Tensor = ((q * self.scale) @ k.mT).softmax(-1) @ v
        return y


def test_a_projection_that_is_also_used_outside_its_attention_is_refused() -> None:
    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.conv, self.bn = Scaled(), nn.Conv1d(7, 7, 1), nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bn(self.conv(x)) + self.attn(x) + self.attn.qkv(x)[..., :16]
            return y

    proof = reparam(Leaking(), torch.randn(2, 7, 16)).proof
    assert fused(proof) == [("conv_bn", "conv")]
    assert "weight of attn.qkv is also read outside attn" in reason(proof, "attn", "softmax_scale")


def test_a_wiring_that_no_block_shows_rolls_back_the_rule_at_fault() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.conv, self.bn = Scaled(), nn.Conv1d(7, 7, 1), nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.bn(self.conv(x)) + self.attn(x) * self.attn.scale
            return y

    proof = reparam(Hidden(), torch.randn(2, 7, 16)).proof
    assert fused(proof) == [("conv_bn", "conv")]
    assert "with softmax_scale the outputs of the whole model differ" in reason(proof, "attn", "softmax_scale")


def test_a_model_that_looks_at_the_kind_of_its_modules_keeps_its_training_form() -> None:
    class Kinds(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + isinstance(self.b0, nn.BatchNorm2d)

    model = Kinds(2, plain)
    result = reparam(model)
    assert fused(result.proof) == []
    assert "the whole model differ" in reason(result.proof, "c0", "conv_bn")
    assert "the whole model differ" in reason(result.proof, "c1", "conv_bn")
    assert result.proof.after == result.proof.before
    assert torch.equal(result.model(X), model(X))


def test_a_deploy_form_that_fails_in_the_last_comparison_is_rolled_back() -> None:
    calls = itertools.count()

    class Counts(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.b0, nn.BatchNorm2d) and next(calls) > 0:
                raise KeyError("a cache that is gone")
            return super().forward(x)

    result = reparam(Counts(1, plain))
    assert fused(result.proof) == []
    assert "outputs of the whole model are missing" in reason(result.proof, "c0", "conv_bn")


def test_keyword_calls_of_a_layer_are_fused() -> None:
    result = reparam(Pairs(2, lambda m, i, x: getattr(m, f"b{i}")(input=getattr(m, f"c{i}")(input=x))))
    assert result.proof.after.batch_norms == 0


def test_a_child_with_the_name_of_a_method_is_no_guest() -> None:
    class Fuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fuse(x)
            return y

    assert reparam(nn.Sequential(Fuses(), nn.ReLU())).proof.not_fused == []


def test_a_guest_that_exits_is_reported_and_one_that_is_interrupted_is_not_held_up() -> None:
    class Leaves(nn.Conv2d):
        error: type[BaseException] = SystemExit

        def fuse(self) -> None:
            raise self.error(3)

    proof = reparam(nn.Sequential(Leaves(8, 8, 1))).proof
    assert "fuse() raised SystemExit: 3" in reason(proof, "0", "guest")
    model = nn.Sequential(Leaves(8, 8, 1)).eval()
    model[0].error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        reparameterize(model, X)
