"""The counter against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.models.cost import count
from edgeattn.models.layers.rlmhsa import RLMHSA


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 12), 2 * 8 * 10 * 12 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (1, 3, 11, 11), 8 * 5 * 5 * 3 * 9),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (1, 8, 6, 6), 16 * 36 * 2 * 9),
        (nn.Conv1d(4, 6, 5, padding="same"), (1, 4, 20), 6 * 20 * 4 * 5),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Linear(7, 5), (2, 3, 7), 2 * 3 * 7 * 5),
        (nn.Linear(7, 5, bias=False), (2, 3, 4, 7), 24 * 7 * 5),
        (nn.Linear(7, 5), (7,), 7 * 5),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (1, 3, 4, 4), 0),
    ],
)
def test_layers(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    cost = count(module, torch.randn(shape))
    assert cost.macs == macs
    assert cost.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("function", "shapes", "macs"),
    [
        (torch.matmul, [(4, 5), (5, 6)], 120),
        (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)], 6 * 120),
        (torch.matmul, [(2, 4, 5), (5, 6)], 2 * 120),
        (torch.matmul, [(4, 5), (5,)], 20),
        (torch.matmul, [(5,), (5,)], 5),
        (torch.baddbmm, [(2, 4, 6), (2, 4, 5), (2, 5, 6)], 2 * 120),
        (lambda a, b: torch.einsum("bnd,bmd->bnm", a, b), [(2, 4, 5), (2, 6, 5)], 2 * 120),
    ],
)
def test_matrix_products(function: object, shapes: list[tuple[int, ...]], macs: int) -> None:
    inputs = [torch.randn(shape) for shape in shapes]
    assert count(Call(function), inputs).macs == macs
    with torch.inference_mode():
        assert count(Call(function), inputs).macs == macs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scaled_dot_product_attention(masked: bool, device: str) -> None:
    # 2 x 3 heads, 10 queries, 7 keys: D = 8 for the scores and 8 for the values
    q, k, v = (torch.randn(2, 3, n, 8, device=device) for n in (10, 7, 7))
    mask = torch.ones(10, 7, dtype=torch.bool, device=device) if masked else None
    call = Call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert count(call, (q, k, v)).macs == 6 * 10 * 7 * 16


def test_multihead_attention_is_not_hidden_by_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    macs = 2 * (10 * 16 * 48 + 10 * 16 * 16 + 2 * 10 * 16 * 32) + 2 * 10 * 10 * 32
    assert count(layer, torch.randn(2, 10, 16)).macs == macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_rlmhsa_by_module() -> None:
    c, n, pooled = 64, 8 * 8, 4 * 4
    cost = count(RLMHSA(c, sr=2), torch.randn(1, c, 8, 8))
    dense = sum(1 / g for g in (1, 2, 4, 8))
    by_child = {
        name: sum(macs for path, macs in cost.by_module.items() if path.startswith(f"{name}."))
        for name in ("q", "k", "v", "proj")
    }
    assert by_child == {
        "q": n * c * c // 2 * dense,
        "k": pooled * c * c // 2 * dense,
        "v": pooled * c * c * dense,
        "proj": n * c * c * dense,
    }
    assert cost.by_module[""] == n * pooled * (c // 2 + c)  # scores at half width, then values
    assert cost.macs == sum(cost.by_module.values())


def test_shared_parameters_count_once_and_shared_modules_each_time_they_run() -> None:
    shared = nn.Linear(4, 4)
    cost = count(nn.Sequential(shared, shared), torch.randn(1, 4))
    assert (cost.parameters, cost.macs, cost.by_module) == (20, 32, {"0": 32})


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count(model, torch.randn(2, 1, 3, 3))
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failing_forward_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4)).train()
    with pytest.raises(RuntimeError):
        count(model, torch.randn(1, 3))
    assert model[0].training
    assert not model[0]._forward_hooks
