"""Rule ``shared_conv``: what becomes a matrix, with what proof, and what stays a convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeattn.models.convsharevit import DIGITS, ConvShareViT, convsharevit_digits, vit_digits
from edgeattn.models.cost import count
from edgeattn.models.layers.shared_conv import SharedConv2d, SharedConvTranspose2d, SharedLinear
from edgeattn.reparam import Proof, reparameterize
from edgeattn.reparam.shared_conv import FEWEST_TOKENS, LANES, MOST_MACS, MOST_WEIGHTS

Layer = SharedConv2d | SharedConvTranspose2d


def applied(model: nn.Module, x: Tensor) -> tuple[nn.Module, Proof]:
    """The rule alone, and what every result must hold: the same outputs, every block within tolerance."""
    for module in model.modules():
        if isinstance(module, Layer) and module.bias is not None:
            nn.init.normal_(module.bias)
    result = reparameterize(model.eval(), x, rules=["shared_conv"])
    with torch.no_grad():
        expected, got = model(x), result.model(x)
    assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())
    assert all(block.errors.holds for block in result.proof.fused)
    assert result.proof.holds
    return result.model, result.proof


def reason(proof: Proof, path: str = "(model)") -> str:
    (entry,) = [entry for entry in proof.not_fused if entry.path == path]
    assert entry.rule == "shared_conv"
    return entry.reason


def test_kernels_as_large_as_the_map_become_the_same_weights_as_a_matrix() -> None:
    layer = SharedConv2d(2, 5, 6)
    model, proof = applied(nn.Sequential(layer, nn.GELU()), torch.randn(2, 3, 2, 6, 6))
    assert isinstance(model[0], SharedLinear)
    assert torch.equal(model[0].weight, layer.weight.flatten(1))
    (block,) = proof.fused
    assert (block.path, block.rule, block.parameters_before, block.parameters_after) == ("0", "shared_conv", 365, 365)
    assert (block.range_growth, block.crest_growth) == (1.0, 1.0)  # the numbers are the same: no risk for int8
    assert not proof.ptq_risks


def test_the_model_itself_may_be_the_layer() -> None:
    model, _ = applied(SharedConv2d(1, 4, 4, bias=False), torch.randn(1, 2, 1, 4, 4))
    assert isinstance(model, SharedLinear)
    assert model.bias is None


@given(
    kind=st.sampled_from(["valid", "same", "transposed"]),
    maps=st.integers(1, 3),
    out=st.integers(1, 20),
    n=st.integers(1, 5),
    more=st.integers(0, 3),
    tokens=st.sampled_from([1, FEWEST_TOKENS - 1, FEWEST_TOKENS, 20]),
)
@settings(max_examples=40, deadline=None)
def test_the_criterion_is_the_documented_one(kind: str, maps: int, out: int, n: int, more: int, tokens: int) -> None:
    """MACs as they are counted from the running layers, not as the rule computes them."""
    layer: Layer
    if kind == "transposed":
        layer, side = SharedConvTranspose2d(maps, out, n), more + 1
    else:
        n = n // 2 * 2 + 1
        layer, side = SharedConv2d(maps, out, n, kind), n + more
    x = torch.randn(1, tokens, maps, side, side)
    _, proof = applied(layer, x)
    matrix = SharedLinear(layer, side)
    rounded = -(-out // LANES) * LANES / out
    cheaper = count(matrix, x).macs <= MOST_MACS * rounded * count(layer, x).macs
    pays = cheaper and matrix.weight.numel() <= MOST_WEIGHTS and tokens >= FEWEST_TOKENS
    same_size = matrix.weight.numel() == layer.weight.numel()
    assert bool(proof.fused) == (pays or same_size)
    assert len(proof.fused) + len(proof.not_fused) == 1


@pytest.mark.parametrize(
    ("build", "shape", "said"),
    [
        (lambda: SharedConv2d(1, 24, 9), (1, 64, 1, 16, 16), "3.2 times the MACs, and with 24 output maps up to 2.7"),
        (lambda: SharedConv2d(1, 16, 3, "same"), (1, 64, 1, 8, 8), "7.1 times the MACs, and with 16 output maps up to"),
        (lambda: SharedConv2d(1, 64, 13), (1, 64, 1, 16, 16), "262,144 weights instead of 10,816"),
        (lambda: SharedConv2d(16, 1, 5), (1, 1, 16, 8, 8), "1 token of at least 16 would share a matrix of 16,384"),
        (lambda: SharedConv2d(1, 1, 3), (1, 20, 1, 8, 6), "other than one square size: (1, 20, 1, 8, 6)"),
    ],
)
def test_what_stays_a_convolution_is_said_with_the_reason(
    build: Callable[[], Layer], shape: tuple[int, ...], said: str
) -> None:
    layer = build()
    model, proof = applied(layer, torch.randn(shape))
    assert isinstance(model, SharedConv2d)
    assert proof.fused == []
    assert said in reason(proof)


def test_a_layer_that_meets_maps_of_two_sizes_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SharedConv2d(1, 1, 4)
            self.idle = SharedConv2d(1, 1, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.layer(x[..., :4, :4])

    _, proof = applied(Twice(), torch.randn(1, 20, 1, 5, 5))
    assert "one square size" in reason(proof, "layer")
    assert "not called" in reason(proof, "idle")


def test_a_layer_that_is_called_twice_with_one_size_becomes_one_matrix() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SharedConv2d(1, 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).reshape(1, 20, 1, 4, 4))

    model, proof = applied(Twice(), torch.randn(1, 20, 1, 4, 4))
    assert isinstance(model.layer, SharedLinear)
    assert len(proof.fused) == 1


@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_whole_models_hold_with_all_rules(variant: str) -> None:
    torch.manual_seed(0)
    model, x = convsharevit_digits(variant).eval(), torch.randn(1, 1, 32, 32)
    result = reparameterize(model, x)
    assert result.proof.holds
    assert result.proof.float32 <= 1e-5
    fused = {block.path.removeprefix("blocks.0.") for block in result.proof.fused if block.path.startswith("blocks.0")}
    everywhere = {"mlp.fc1", "mlp.fc2"}
    assert (
        fused
        == {"v1": {"attn.qkv", "attn.proj"}, "v2": {"attn.qkv", "attn.proj"}, "v3": {"attn.proj"}}[variant] | everywhere
    )
    assert {block.path for block in result.proof.fused} & {"patch_embed.proj", "head"} == {"patch_embed.proj"}
    x = torch.randn(3, 1, 32, 32)  # the deploy form takes other batches, too
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-4)


def test_v1_is_left_with_no_convolution_and_no_weight_more_in_its_blocks() -> None:
    torch.manual_seed(0)
    model = ConvShareViT(DIGITS["v1"]).eval()
    x = torch.randn(1, 1, 32, 32)
    deploy = reparameterize(model, x).model
    assert not any(isinstance(module, SharedConv2d) for module in deploy.blocks.modules())
    before, after = (sum(p.numel() for p in m.blocks.parameters()) for m in (model, deploy))
    assert before == after
    assert count(deploy.blocks, torch.randn(1, 64, 8, 8)).macs == count(model.blocks, torch.randn(1, 64, 8, 8)).macs


def test_the_dense_control_gets_its_attention_scale_folded() -> None:
    torch.manual_seed(0)
    proof = reparameterize(vit_digits().eval(), torch.randn(1, 1, 32, 32)).proof
    assert {(b.rule, b.path) for b in proof.fused if b.path.startswith("blocks.0")} == {
        ("softmax_scale", "blocks.0.attn")
    }
