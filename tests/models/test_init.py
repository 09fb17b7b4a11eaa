"""Batch-norm statistics for models without a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from edgeattn.models.fmvit import fmvit
from edgeattn.models.init import randomize


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_same_seed_same_numbers_whatever_the_global_generator() -> None:
    torch.manual_seed(0)
    first = fmvit("t")
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    x = torch.zeros(1, 3, 32, 32)
    randomize(first, x, 7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    randomize(second, (x + 1.0,), 7)
    assert torch.equal(state, torch.get_rng_state())
    randomize(third, x, 8)
    a, b, c = first.state_dict(), second.state_dict(), third.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_only_batch_norms_change_and_none_stays_trivial() -> None:
    torch.manual_seed(0)
    model = fmvit("t").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    randomize(model, torch.randn(1, 3, 64, 64), 0)
    owned = {id(t) for norm in norms(model) for t in (*norm.parameters(), *norm.buffers())}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) not in owned:
            assert torch.equal(before[key], value), key
    assert not any(module.training for module in model.modules())
    for norm in norms(model):
        assert norm.weight.std() > 0
        assert norm.bias.std() > 0
        assert norm.running_mean.abs().max() > 0
        assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))
        assert norm.momentum == 0.1
        assert not norm._forward_pre_hooks


@pytest.mark.parametrize(("variant", "size"), [("s", 224), ("m", 32), ("b", 64)])
@torch.no_grad()
def test_deep_nets_keep_a_sane_scale_and_do_not_amplify_rounding(variant: str, size: int) -> None:
    torch.manual_seed(0)
    model = fmvit(variant)
    randomize(model, torch.zeros(1, 3, size, size), 0)
    x = torch.randn(1, 3, size, size)
    y = model(x)
    assert 0.1 < y.std() < 100.0
    change = model(x + 1e-3 * torch.randn_like(x)) - y
    assert change.norm() / y.norm() < 1e-2


@torch.no_grad()
def test_settled_statistics_are_those_of_what_arrives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5))
    randomize(model, torch.zeros(4000, 3), 0)
    torch.testing.assert_close(model[0].running_mean, torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(model[0].running_var, torch.ones(3), rtol=0.1, atol=0)
    arriving = model[1](model[0](torch.randn(20000, 3)))
    torch.testing.assert_close(model[2].running_mean, arriving.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(model[2].running_var, arriving.var(0), rtol=0.15, atol=0)
    assert model[0].weight.min() >= 0.5
    assert model[0].weight.max() <= 1.5


def test_a_dead_channel_is_not_amplified_without_limit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    with torch.no_grad():
        model[0].weight[0].zero_()
    randomize(model, torch.randn(1, 2, 8, 8), 0)
    variance = model[1].running_var
    assert variance[0] == pytest.approx(0.1 * variance[1:].sum().item() / 3, rel=1e-4)


def test_a_zero_gamma_is_not_left_zero() -> None:
    model = nn.BatchNorm2d(4)
    nn.init.zeros_(model.weight)
    randomize(model, torch.randn(1, 4, 2, 2), 0)
    assert model.weight.min() >= 0.5


def test_without_batch_norm_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    randomize(model, torch.randn(1, 3), 0)
    assert not model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Picky(nn.Module):
    """Takes a batch of one, an integer and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=None)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y: Tensor = self.norm(100.0 * x)  # settled, the variance would be 10,000
        if x.shape[0] != 1:
            raise RuntimeError("one at a time")
        return y[:, index]


def test_a_model_that_refuses_the_batch_keeps_statistics_as_drawn() -> None:
    model = Picky()
    randomize(model, (torch.randn(1, 3), torch.tensor([1])), 0)
    assert 0.5 <= model.norm.running_var.min() <= model.norm.running_var.max() <= 1.5
    assert model.norm.running_mean.abs().max() < 0.5
    assert not model.norm._forward_pre_hooks


def test_integer_inputs_are_kept_and_repeated() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(0, 1), nn.BatchNorm1d(4))
    model[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    randomize(model, torch.tensor([[1, 4]]), 0)
    assert seen[0].shape == (16, 2)
    assert torch.equal(seen[0].unique(), torch.tensor([1, 4]))


def test_batch_norms_without_affine_or_statistics_are_taken_too() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, track_running_stats=False))
    randomize(model, torch.randn(1, 2, 4, 4), 0)
    assert model[0].running_mean is not None
    assert model[0].running_mean.abs().max() > 0
    assert model[1].weight.std() > 0
