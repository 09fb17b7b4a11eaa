"""Every rule on own layers and on hand-made guests, with the traps that a fusion by name or by order falls into."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeattn.models.layers.conv import ConvBN, MultiBranchConv2d
from edgeattn.models.layers.repmixer import RepMixer
from edgeattn.reparam import Proof, reparameterize

X = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module) -> nn.Module:
    """Random weights and statistics, eval mode; the same for the same model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for tensor in (module.running_mean, module.bias):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                for tensor in (module.running_var, module.weight):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def reparam(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, Proof]:
    """Reparameterize, and hold what every result must: same outputs, every block within tolerance."""
    inputs = inputs or (X,)
    settle(model)
    result = reparameterize(model, inputs)
    with torch.no_grad():
        expected, got = model(*inputs), result.model(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(block.errors.holds for block in result.proof.fused)
    assert result.proof.holds
    return result.model, result.proof


def reason(proof: Proof, path: str, rule: str) -> str:
    (entry,) = [entry for entry in proof.not_fused if (entry.path, entry.rule) == (path, rule)]
    return entry.reason


class Guest(nn.Module):
    """Children by name, and a forward as a function of (self, x)."""

    def __init__(self, forward, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.function = forward

    def forward(self, *inputs: Tensor):
        return self.function(self, *inputs)


# --- multi_branch, residual ---------------------------------------------------------------------------------------


def test_multi_branch_becomes_one_plain_convolution() -> None:
    model, proof = reparam(nn.Sequential(MultiBranchConv2d(8, 8, [(3, 2), (1, 4)], identity=True), nn.ReLU()))
    assert type(model[0]) is nn.Conv2d
    assert (model[0].groups, model[0].kernel_size, model[0].padding) == (2, (3, 3), (1, 1))
    (block,) = proof.fused
    assert (block.path, block.rule) == ("0", "multi_branch")
    assert block.parameters_after < block.parameters_before
    assert (proof.before.batch_norms, proof.after.batch_norms) == (3, 0)


def test_the_model_itself_may_be_the_block() -> None:
    model, proof = reparam(MultiBranchConv2d(8, 16, [(1, 1), (1, 8)], stride=2))
    assert isinstance(model, nn.Conv2d)
    assert proof.fused[0].path == "(model)"


def test_repmixer_becomes_one_depthwise_convolution() -> None:
    model, proof = reparam(nn.Sequential(RepMixer(8, 7, layer_scale=0.5)))
    assert isinstance(model[0], nn.Conv2d)
    assert (model[0].groups, model[0].kernel_size) == (8, (7, 7))
    assert [block.rule for block in proof.fused] == ["residual"]


def test_a_branch_module_called_twice_is_fused_and_one_never_called_is_not() -> None:
    def twice(self: Guest, x: Tensor) -> Tensor:
        return self.used(self.used(x))

    branches = MultiBranchConv2d(8, 8, [(3, 1), (1, 1)])
    model, proof = reparam(Guest(twice, used=branches, unused=MultiBranchConv2d(8, 8, [(1, 1)])))
    assert isinstance(model.used, nn.Conv2d)
    assert "not called" in reason(proof, "unused", "multi_branch")


# --- conv_bn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "bn", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    ],
    ids=["conv1d", "conv2d", "conv3d", "transposed", "linear"],
)
def test_conv_bn(layer: nn.Module, bn: nn.Module, shape: tuple[int, ...]) -> None:
    if bn.affine:
        model, _ = reparam(nn.Sequential(layer, bn), torch.randn(shape))
    else:
        bn.running_mean += 0.3
        model = reparameterize(nn.Sequential(layer, bn).eval(), torch.randn(shape)).model
    assert isinstance(model[1], nn.Identity)
    assert type(model[0]) is type(layer)


def test_linear_then_bn_over_flattened_tokens() -> None:
    model, _ = reparam(
        Guest(
            lambda self, x: self.bn(self.fc(x).flatten(0, 1)).reshape(2, 5, 6), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)
        ),
        torch.randn(2, 5, 4),
    )
    assert norms(model) == []


def test_bn_over_another_axis_than_the_features_stays() -> None:
    model, proof = reparam(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), torch.randn(2, 5, 4))
    assert norms(model) == ["1"]
    assert "axis" in reason(proof, "1", "conv_bn")


def branch(**more: nn.Module) -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(8, 8, 3, padding=1), "bn": nn.BatchNorm2d(8), **more}


def inplace(self: Guest, x: Tensor) -> Tensor:
    return self.bn(F.relu_(self.conv(x)))


def inplace_later(self: Guest, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.bn(y)
    return z + y.view(-1).mul_(2).sum()


def kept(self: Guest, x: Tensor) -> Tensor:
    self.feature = self.conv(x)
    return self.bn(self.feature)


def weight_elsewhere(self: Guest, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)), "other readers"),
        (lambda self, x: (lambda y: (self.bn(y), y))(self.conv(x)), "returned by the model"),
        (lambda self, x: self.bn(self.conv(x) * 2), "aten.mul"),
        (lambda self, x: self.bn(F.relu(self.conv(x))), "aten.relu"),
        (inplace, "aten.relu_"),
        (inplace_later, "in place"),
        (kept, "kept in an attribute"),
        (lambda self, x: self.bn(self.bn(self.conv(x))), "called 2 times"),
        (lambda self, x: self.bn(self.conv(self.conv(x))), "called 2 times"),
        (lambda self, x: self.bn(x) + self.conv(x), "model's input"),
        (weight_elsewhere, "read outside"),
    ],
)
def test_conv_bn_traps(forward, why: str) -> None:
    model, proof = reparam(Guest(forward, **branch()))
    assert norms(model) == ["bn"]
    assert why in reason(proof, "bn", "conv_bn")


def test_shared_weights_stay() -> None:
    def forward(self: Guest, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.other(x)

    guest = Guest(forward, **branch(other=nn.Conv2d(8, 8, 3, padding=1)))
    guest.other.weight = guest.conv.weight
    model, proof = reparam(guest)
    assert "shared: conv.weight, other.weight" in reason(proof, "bn", "conv_bn")
    assert norms(model) == ["bn"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_computed_weights_stay(norm) -> None:
    guest = Guest(lambda self, x: self.bn(self.conv(x)), **branch())
    norm(guest.conv)
    model, _ = reparam(guest)
    assert norms(model) == ["bn"]


def test_bn_by_batch_statistics_stays() -> None:
    model, proof = reparam(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)))
    assert norms(model) == ["1"]
    assert "running statistics" in reason(proof, "1", "conv_bn")


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class BatchNormSquared(nn.BatchNorm2d):
    """A subclass that cannot be taken apart."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


def test_bn_with_an_activation_leaves_the_activation() -> None:
    model, _ = reparam(nn.Sequential(nn.Conv2d(8, 8, 3), BatchNormAct(8)))
    assert norms(model) == []
    assert isinstance(model[1], nn.ReLU)


def test_bn_subclass_of_unknown_behaviour_stays() -> None:
    model, proof = reparam(nn.Sequential(nn.Conv2d(8, 8, 3), BatchNormSquared(8)))
    assert norms(model) == ["1"]
    assert "cannot be separated" in reason(proof, "1", "conv_bn")


class Standardized(nn.Conv2d):
    """A convolution subclass whose weight is not what it multiplies by."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias)


def test_convolution_subclass_is_judged_by_measurement() -> None:
    model, proof = reparam(nn.Sequential(Standardized(8, 8, 1), nn.BatchNorm2d(8)))
    assert norms(model) == ["1"]
    (entry,) = [entry for entry in proof.not_fused if entry.rule == "conv_bn"]
    assert entry.errors is not None
    assert entry.errors.float64_real > 1e-3
    assert "rolled back" in entry.reason


# --- pre_bn -------------------------------------------------------------------------------------------------------


def attention_like(self: Guest, x: Tensor) -> Tensor:
    y = self.bn1(x)
    pooled = self.bn2(F.avg_pool2d(y, 2))
    return self.q(y).mean() + self.k(pooled) * self.v(pooled)


def test_one_bn_goes_into_all_its_readers_through_a_pool_and_a_second_bn() -> None:
    layers = {name: nn.Conv2d(8, 8, 1) for name in "qkv"}
    model, proof = reparam(Guest(attention_like, bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8), **layers))
    assert norms(model) == []
    (block,) = proof.fused
    assert (block.rule, block.path, set(block.modules)) == ("pre_bn", "bn1", {"bn1", "bn2", "q", "k", "v"})


def test_branches_then_batch_norm_in_front() -> None:
    model, proof = reparam(nn.Sequential(nn.BatchNorm2d(8), MultiBranchConv2d(8, 8, [(1, 1), (1, 2)], identity=True)))
    assert norms(model) == []
    assert [block.rule for block in proof.fused] == ["multi_branch", "pre_bn"]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, (3, 2)).flatten(2).transpose(1, 2),
        lambda x: x.mean((2, 3)),
        lambda x: x.mean((-1, -2), keepdim=True)[:, :, 0, 0],
        lambda x: x.flatten(2).transpose(1, 2)[:, 0],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: F.avg_pool2d(x, 5, ceil_mode=True).permute(0, 2, 3, 1).contiguous(),
        lambda x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False).permute(0, 2, 3, 1),
    ],
)
def test_ways_through_which_an_affine_map_passes(between) -> None:
    model, _ = reparam(Guest(lambda self, x: self.fc(between(self.bn(x))), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 5)))
    assert norms(model) == []


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda x: F.avg_pool2d(x, 3, padding=1).permute(0, 2, 3, 1), "padding"),
        (lambda x: F.avg_pool2d(x, 3, divisor_override=2).permute(0, 2, 3, 1), "padding"),
        (lambda x: F.max_pool2d(x, 3).permute(0, 2, 3, 1), "max_pool"),
        (lambda x: F.relu(x).permute(0, 2, 3, 1), "relu"),
        (lambda x: x.permute(0, 2, 3, 1) + 0 * x.permute(0, 2, 3, 1), "aten.add in (model)"),
        (lambda x: F.relu_(x).permute(0, 2, 3, 1), "in place"),
        (lambda x: x[:, :, :8, 0], "another axis"),
        (lambda x: torch.cat([x, x]).permute(0, 2, 3, 1), "cat"),
    ],
)
def test_ways_through_which_it_does_not(between, why: str) -> None:
    model, proof = reparam(
        Guest(lambda self, x: self.fc(between(self.bn(x))), bn=nn.BatchNorm2d(8), fc=nn.Linear(8, 5))
    )
    assert norms(model) == ["bn"]
    assert why in reason(proof, "bn", "pre_bn")


def test_padding_behind_the_batch_norm_is_refused_and_without_it_any_kernel_folds() -> None:
    model, proof = reparam(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)))
    assert norms(model) == ["0"]
    assert "pads its input" in reason(proof, "0", "pre_bn")
    assert norms(reparam(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)))[0]) == []


def test_all_readers_or_none() -> None:
    def forward(self: Guest, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.a(y) + self.b(y)

    a, b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
    model, proof = reparam(Guest(forward, bn=nn.BatchNorm2d(8), a=a, b=b))
    assert norms(model) == ["bn"]
    assert torch.equal(model.a.weight, a.weight)
    assert proof.fused == []


def test_residual_around_the_layer_keeps_the_batch_norm() -> None:
    def forward(self: Guest, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y + self.conv(y)

    model, proof = reparam(Guest(forward, bn=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 8, 1)))
    assert norms(model) == ["bn"]
    assert "aten.add" in reason(proof, "bn", "pre_bn")


def test_input_changed_in_place_behind_the_batch_norm() -> None:
    def forward(self: Guest, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn(x)
        x += 1  # without the batch norm, y would be x
        return self.conv(y) + x

    model, proof = reparam(Guest(forward, bn=nn.BatchNorm2d(8), conv=nn.Conv2d(8, 8, 1)))
    assert norms(model) == ["bn"]
    assert "in place later" in reason(proof, "bn", "pre_bn")


def test_inner_bn_folds_alone_where_the_outer_cannot() -> None:
    def forward(self: Guest, x: Tensor) -> Tensor:
        y = self.outer(x)
        return y.relu().mean() + self.conv(self.inner(y))

    outer, inner = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    model, _ = reparam(Guest(forward, outer=outer, inner=inner, conv=nn.Conv2d(8, 8, 1)))
    assert norms(model) == ["outer"]


def test_a_batch_norm_between_two_layers_goes_backwards() -> None:
    model, proof = reparam(nn.Sequential(ConvBN(8, 8, 3), nn.Conv2d(8, 8, 1)))
    assert norms(model) == []
    assert [block.rule for block in proof.fused] == ["conv_bn"]


# --- softmax_scale ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Separate or packed projections, and a scale that is used, unused, or used twice."""

    def __init__(self, packed: bool, use: str, bias: bool = True) -> None:
        super().__init__()
        self.scale, self.packed, self.use = 0.5, packed, use
        if packed:
            self.qkv = nn.Linear(8, 24, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        if self.use == "none":
            return F.scaled_dot_product_attention(q, k, v)
        if self.use == "twice":
            return (q * self.scale @ (k * self.scale).mT).softmax(-1) @ v
        if self.use == "inside":
            return (q.tanh() * self.scale @ k.mT).softmax(-1) @ v
        return (q * self.scale @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_scale_goes_into_the_queries(packed: bool, bias: bool) -> None:
    tokens = torch.randn(2, 5, 8)
    guest = nn.Sequential(Attention(packed, "logits", bias))
    model, proof = reparam(guest, tokens)
    assert model[0].scale == 1.0
    assert guest[0].scale == 0.5
    assert [block.rule for block in proof.fused] == ["softmax_scale"]
    assert proof.before.parameters == proof.after.parameters


@pytest.mark.parametrize("use", ["none", "twice", "inside"])
def test_other_uses_of_scale_are_rolled_back(use: str) -> None:
    model, proof = reparam(nn.Sequential(Attention(True, use)), torch.randn(2, 5, 8))
    assert model[0].scale == 0.5
    assert "does not hold" in reason(proof, "0", "softmax_scale")
    assert proof.fused == []
