"""The engine's promises: the argument is untouched, nothing is hidden, everything is repeatable."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError
from edgeattn.models.fmvit import fmvit, fmvit_digits
from edgeattn.models.init import randomize
from edgeattn.models.layers.conv import MultiBranchConv2d
from edgeattn.reparam import RULES, NotFused, Proof, reparameterize
from edgeattn.reparam.proof import Errors

X = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))


def digits() -> nn.Module:
    torch.manual_seed(0)
    model = fmvit_digits()
    randomize(model, X, 0)
    return model.eval()


@pytest.fixture(scope="module")
def fused() -> Any:
    return reparameterize(digits(), X)


def test_no_batch_norm_and_no_branches_are_left(fused) -> None:
    kinds = {type(module) for module in fused.model.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.BatchNorm1d, MultiBranchConv2d}
    assert fused.proof.after.batch_norms == 0
    assert fused.proof.not_fused == []
    scales = [module.scale for module in fused.model.modules() if hasattr(module, "scale")]
    assert scales
    assert set(scales) == {1.0}
    assert {block.rule for block in fused.proof.fused} == {"multi_branch", "conv_bn", "pre_bn", "softmax_scale"}


def test_outputs_are_those_of_the_training_form(fused) -> None:
    model = digits()
    for seed in range(3):
        x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(fused.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert fused.proof.float32 < 1e-5


@pytest.mark.parametrize("variant", ["t"])
def test_fmvit_at_224(variant: str) -> None:
    x = torch.randn(1, 3, 224, 224)
    model = fmvit(variant)
    randomize(model, x, 0)
    result = reparameterize(model.eval(), x)
    assert result.proof.after.batch_norms == 0
    assert result.proof.not_fused == []
    assert result.proof.float32 < 1e-5


def test_the_argument_is_not_changed() -> None:
    model = digits()
    hook = model.stem.register_forward_hook(lambda *_: None)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [(path, id(module), type(module)) for path, module in model.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    scales = [m.scale for m in model.modules() if hasattr(m, "scale")]
    random = torch.random.get_rng_state()
    reparameterize(model, X)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert [(path, id(module), type(module)) for path, module in model.named_modules()] == kinds
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [m.scale for m in model.modules() if hasattr(m, "scale")] == scales
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.get_default_dtype() == torch.float32
    hook.remove()


def test_the_result_has_no_hooks_and_is_its_own(fused) -> None:
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fused.model.modules())
    assert not any(m.training for m in fused.model.modules())
    assert {p.dtype for p in fused.model.parameters()} == {torch.float32}
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    result = reparameterize(model, torch.randn(1, 2))
    assert result.model is not model
    assert result.model[0].weight is not model[0].weight


def test_repeatable(fused) -> None:
    again = reparameterize(digits(), X)
    assert again.proof == fused.proof
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), fused.model.parameters(), strict=True))
    assert reparameterize(digits(), X, seed=1).proof != fused.proof


def test_nothing_fused_is_said() -> None:
    result = reparameterize(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), torch.randn(1, 2))
    assert result.proof.fused == []
    assert result.proof.summary().startswith("Nothing was fused")
    assert result.proof.holds


@pytest.mark.parametrize("child", [nn.BatchNorm2d(3), nn.Dropout(0.5)])
def test_training_mode_is_refused(child: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), child).eval()
    child.train()
    with pytest.raises(UsageError, match=r"(?s)eval mode.*where: 1.*model\.eval\(\)"):
        reparameterize(model, torch.randn(1, 3, 4, 4))


def test_a_training_flag_without_effect_is_no_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    model[0].train()  # as after a guest's own reparameterization, which makes a new convolution
    result = reparameterize(model, torch.randn(1, 3, 4, 4))
    assert len(result.proof.fused) == 1
    assert not any(m.training for m in result.model.modules())
    assert model[0].training


def test_unknown_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="multi_branch"):
        reparameterize(digits(), X, rules=["multi_brunch"])


def test_chosen_rules_and_progress() -> None:
    said: list[str] = []
    result = reparameterize(digits(), X, rules=["multi_branch"], progress=said.append)
    assert {block.rule for block in result.proof.fused} == {"multi_branch"}
    assert result.proof.after.batch_norms > 0
    assert any("multi_branch" in line for line in said)
    assert len({rule.name for rule in RULES}) == 8


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, *, image: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        y = self.bn(self.conv(image))
        return {"maps": (y, [y.mean((2, 3))]), "mask": mask}


def test_keyword_inputs_and_nested_outputs() -> None:
    model = Nested().eval()
    model.bn.running_mean.normal_()
    result = reparameterize(model, {"image": torch.randn(1, 3, 8, 8), "mask": torch.ones(1, dtype=torch.bool)})
    # The batch norm's output is returned, the convolution's is not: foldable.
    assert len(result.proof.fused) == 1


def test_random_models_and_states() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.bn(self.conv(x)) + torch.rand(1) + self.calls

    result = reparameterize(Noisy().eval(), torch.randn(1, 3, 8, 8))
    assert len(result.proof.fused) == 1
    assert result.model.calls.item() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_with_a_reason(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval().to(dtype)
    proof = reparameterize(model, torch.randn(1, 3, 8, 8, dtype=dtype)).proof
    assert proof.fused == []
    assert any("only float32" in entry.reason for entry in proof.not_fused)


def test_a_model_that_amplifies_rounding_is_judged_in_float64() -> None:
    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x)).sigmoid()
            for _ in range(20):
                y = 3.99 * y * (1 - y)
            return y

    model = Chaotic().eval()
    model.bn.running_mean.normal_()
    proof = reparameterize(model, torch.randn(1, 3, 8, 8)).proof
    assert proof.float32 > 1e-4
    assert proof.float64 < 1e-8
    assert len(proof.fused) == 1
    assert "amplifies rounding" in proof.summary()


def test_json_round_trip(fused) -> None:
    text = json.dumps(fused.proof.to_dict(), allow_nan=False)
    assert Proof.from_dict(json.loads(text)) == fused.proof


def test_json_round_trip_of_what_is_not_finite(fused) -> None:
    bad = NotFused("a.b", "guest", "why", Errors(math.inf, 0.0, math.inf, 1e-3))
    proof = copy.deepcopy(fused.proof)
    proof.not_fused.append(bad)
    text = json.dumps(proof.to_dict(), allow_nan=False)
    assert Proof.from_dict(json.loads(text)) == proof


def test_range_growth_is_measured_against_the_training_kernels() -> None:
    model = nn.Sequential(MultiBranchConv2d(16, 16, [(3, 1)], identity=True)).eval()
    for bn in (model[0].branches[0].bn, model[0].identity):
        nn.init.ones_(bn.weight)
    nn.init.uniform_(model[0].branches[0].conv.weight, -0.01, 0.01)
    with torch.no_grad():
        model[0].branches[0].conv.weight[0, 0, 0, 0] = 0.01
    (block,) = reparameterize(model, torch.randn(1, 16, 8, 8)).proof.fused
    assert block.range_growth == pytest.approx(100, rel=0.02)  # the identity puts 1 beside weights of 0.01
    assert block.ptq_risk
    scaled = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    nn.init.constant_(scaled[1].weight, 10.0)
    (block,) = reparameterize(scaled, torch.randn(1, 4, 8, 8)).proof.fused
    assert block.range_growth == pytest.approx(10, rel=1e-3)
    assert block.ptq_risk
    assert block.crest_growth == pytest.approx(1, rel=1e-3)  # which says that it is a rescaling
    nn.init.constant_(scaled[1].weight, 3.9)
    (block,) = reparameterize(scaled, torch.randn(1, 4, 8, 8)).proof.fused
    assert not block.ptq_risk


def test_a_model_in_training_mode_is_refused_whatever_it_is_made_of() -> None:
    with pytest.raises(UsageError, match="training"):
        reparameterize(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 8, 8))


def test_inputs_that_the_forward_changes_in_place_are_left_alone() -> None:
    class Normalizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(x.sub_(0.5).mul_(2)))

    x = torch.randn(1, 3, 8, 8)
    before = x.clone()
    assert len(reparameterize(Normalizing().eval(), x).proof.fused) == 1
    assert torch.equal(x, before)
