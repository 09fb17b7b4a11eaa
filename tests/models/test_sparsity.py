"""Zeros counted against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.models.plm import SquaredReLU, plm
from edgeattn.models.sparsity import Site, measure

#: Three of eight are positive; one is above 6.
X = torch.tensor([[-1.0, 2.0, -3.0, 8.0], [-1.0, -2.0, -0.0, 1.0]])


class Call(nn.Module):
    """A function as a block that has a child, so that it is not an activation itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "max_position_embeddings": 64}
    heads = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    return plm(vocab_size=64, num_hidden_layers=2, **sizes, **heads).eval()


def sites(model: nn.Module, x: Tensor = X, by_token: bool = True) -> list[Site]:
    return measure(model, [(x.clone(),)], by_token).sites


@pytest.mark.parametrize("model", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), SquaredReLU()], ids=repr)
def test_modules(model: nn.Module) -> None:
    (site,) = sites(nn.Sequential(model))
    assert site == Site("0", zeros=0.625, low=0.5, high=0.75, elements=8, rows=2, units=4, never=2)
    (whole,) = sites(nn.Sequential(model), by_token=False)
    assert (whole.zeros, whole.rows, whole.units, whole.never) == (0.625, 1, None, None)


@pytest.mark.parametrize(
    ("function", "zeros"),
    [
        (F.relu, [0.625]),
        (lambda x: F.relu(F.relu(x) - 1.5), [0.625, 0.75]),
        (lambda x: x.clamp(min=0), [0.625]),
        (lambda x: torch.clamp(x, 0.0, 6.0), [0.625]),
        (lambda x: x.clamp_min(0), [0.625]),
        (lambda x: F.hardtanh(x, 0.0, 1.0), [0.625]),
        (lambda x: x.clamp(min=-1), []),
        (lambda x: x.clamp(max=0), []),
        (F.hardtanh, []),
        (F.gelu, []),
    ],
)
def test_operations_in_code(function: Callable[[Tensor], Tensor], zeros: list[float]) -> None:
    found = sites(nn.Sequential(Call(function)))
    assert [site.zeros for site in found] == zeros
    assert [site.path for site in found] == ["0", "0 (2)"][: len(zeros)]


def test_what_follows_a_relu_in_an_activation_counts() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) - 2

    (site,) = sites(nn.Sequential(Shifted()))
    assert site.zeros == 0.125  # the 2, and none of those that were zero before


def test_a_module_that_is_run_twice_has_two_rows_in_every_forward() -> None:
    act = nn.ReLU()
    model = nn.Sequential(act, nn.Linear(4, 4), act)
    found = measure(model, [(X,), (X + 100,)], by_token=True).sites
    assert [(site.path, site.rows) for site in found] == [("0", 4), ("0 (2)", 4)]
    assert found[0].zeros == 0.3125
    assert found[0].never == 0


def test_linear_layers_that_meet_zeros_and_what_is_multiplied() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0, 1.0]))
    found = measure(model, [(X + 100,)], by_token=True)
    (reader,) = found.readers
    assert (reader.path, reader.weights, reader.zeros) == ("2", 18, 0.5)
    assert found.weights == 24 + 18 + 6  # neither biases nor the norm
    assert found.idle == 9


def test_a_decoder_reads_all_matrices_once_though_the_embedding_is_shared() -> None:
    model = tiny()
    ids = torch.arange(20)[None]
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    given: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        logits = model(ids)
    handle.remove()
    found = measure(model, [(ids,)], by_token=True)
    assert found.weights == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert [site.path for site in found.sites] == [f"model.layers.{i}.mlp.act" for i in range(2)]
    assert [reader.path for reader in found.readers] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    zero = given[0][0] == 0
    for share in (found.sites[1].zeros, found.readers[1].zeros):
        assert share == pytest.approx(zero.float().mean().item())
    assert found.sites[1].never == int(zero.all(0).sum())
    assert found.sites[1].low == pytest.approx(zero.float().mean(1).min().item())
    with torch.inference_mode():
        assert measure(model, [(ids,)], by_token=True) == found
    with torch.no_grad():
        assert torch.equal(model(ids), logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_taken_off_when_the_model_fails() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(5, 1))
    with pytest.raises(RuntimeError):
        measure(model, [(X,)], by_token=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fused_encoders_are_looked_into() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = measure(model, [(torch.randn(1, 5, 8),)], by_token=True)
    assert [site.rows for site in found.sites] == [5]
    assert [reader.path for reader in found.readers] == ["linear2"]
