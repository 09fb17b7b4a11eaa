"""Shared convolutions against their definitions, and as the matrices that they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.core.errors import UsageError
from edgeattn.models.layers.shared_conv import SharedConv2d, SharedConvTranspose2d, SharedLinear, toeplitz

SMALL = st.integers(1, 4)


def biased(layer: SharedConv2d | SharedConvTranspose2d) -> SharedConv2d | SharedConvTranspose2d:
    """The layer with a bias that a test can see."""
    assert layer.bias is not None
    nn.init.normal_(layer.bias)
    return layer


def close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).norm()) <= 1e-5 * float(expected.norm())


@given(b=SMALL, t=SMALL, maps=SMALL, kernels=SMALL, n=st.integers(1, 6), more=st.integers(0, 4), same=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_meets_the_same_kernels(
    b: int, t: int, maps: int, kernels: int, n: int, more: int, same: bool
) -> None:
    n = n // 2 * 2 + 1 if same else n
    side = n + more
    layer = biased(SharedConv2d(maps, kernels, n, "same" if same else "valid"))
    x = torch.randn(b, t, maps, side, side)
    with torch.no_grad():
        y = layer(x)
        d = side if same else side - n + 1
        assert y.shape == (b, t, kernels, d, d)
        for token in range(t):
            alone = F.conv2d(x[:, token], layer.weight, layer.bias, padding=n // 2 if same else 0)
            torch.testing.assert_close(y[:, token], alone)


@given(t=SMALL, maps=SMALL, out=SMALL, n=st.integers(1, 6), d=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_transposed_is_the_adjoint_of_valid(t: int, maps: int, out: int, n: int, d: int) -> None:
    """<valid(x), y> = <x, transposed(y)> for the same weights: what defines a transposed convolution."""
    there = SharedConv2d(out, maps, n, bias=False)
    back = SharedConvTranspose2d(maps, out, n, bias=False)
    with torch.no_grad():
        back.weight.copy_(there.weight)
        x, y = torch.randn(2, t, out, d + n - 1, d + n - 1).double(), torch.randn(2, t, maps, d, d).double()
        there, back = there.double(), back.double()
        assert back(y).shape == x.shape
        torch.testing.assert_close((there(x) * y).sum(), (x * back(y)).sum())


@given(t=SMALL, maps=SMALL, side=st.integers(1, 9), width=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_kernels_as_large_as_the_maps_are_a_linear_layer(t: int, maps: int, side: int, width: int) -> None:
    """The anchor: v1 equals the dense layer y = W x + b to 1e-5 in float32, with as many parameters."""
    layer = biased(SharedConv2d(maps, width, side))
    dense = nn.Linear(maps * side * side, width)
    with torch.no_grad():
        dense.weight.copy_(layer.weight.flatten(1))
        dense.bias.copy_(layer.bias)
        x = torch.randn(2, t, maps, side, side)
        y = layer(x)
        assert y.shape == (2, t, width, 1, 1)
        assert close(y.flatten(2), dense(x.flatten(2)))
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in dense.parameters())


@given(
    kind=st.sampled_from(["valid", "same", "transposed"]),
    maps=SMALL,
    kernels=SMALL,
    n=st.integers(1, 5),
    more=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_the_matrix_gives_the_same_numbers(kind: str, maps: int, kernels: int, n: int, more: int) -> None:
    side = more + 1 if kind == "transposed" else n // 2 * 2 + 1 + more
    layer = (
        SharedConvTranspose2d(maps, kernels, n)
        if kind == "transposed"
        else SharedConv2d(maps, kernels, n // 2 * 2 + 1, kind)
    )
    x = torch.randn(2, 3, maps, side, side)
    with torch.no_grad():
        matrix = SharedLinear(biased(layer), side)
        assert matrix(x).shape == layer(x).shape
        assert close(matrix(x), layer(x))


def test_a_toeplitz_matrix_has_each_kernel_at_each_of_its_places() -> None:
    kernel = torch.arange(1.0, 5.0).reshape(1, 1, 2, 2)
    matrix = toeplitz(kernel, 3).reshape(4, 9)
    assert matrix.tolist() == [
        [1, 2, 0, 3, 4, 0, 0, 0, 0],
        [0, 1, 2, 0, 3, 4, 0, 0, 0],
        [0, 0, 0, 1, 2, 0, 3, 4, 0],
        [0, 0, 0, 0, 1, 2, 0, 3, 4],
    ]


def test_the_matrix_of_whole_maps_has_the_very_weights() -> None:
    layer = SharedConv2d(2, 5, 3)
    matrix = SharedLinear(layer, 3)
    assert torch.equal(matrix.weight, layer.weight.flatten(1))
    assert SharedLinear(SharedConv2d(2, 5, 3, bias=False), 3).bias is None


def test_kernels_are_drawn_by_the_weights_behind_an_output() -> None:
    torch.manual_seed(0)
    for layer in (SharedConv2d(4, 64, 5), SharedConvTranspose2d(4, 64, 5)):
        assert layer.weight.std().item() == pytest.approx(0.1, rel=0.05)
        assert layer.bias is not None
        assert not layer.bias.any()


def test_what_they_are_is_shown() -> None:
    assert str(SharedConv2d(1, 4, 3)) == "SharedConv2d(1, 4, size=3, padding='valid')"
    assert str(SharedConvTranspose2d(4, 1, 3)) == "SharedConvTranspose2d(4, 1, size=3)"
    assert str(SharedLinear(SharedConv2d(1, 4, 3), 3)) == "SharedLinear(9, 4)"


@pytest.mark.parametrize("name", ["in_maps", "kernels", "size"])
def test_counts_below_one_are_refused(name: str) -> None:
    counts = {"in_maps": 1, "kernels": 1, "size": 1, name: 0}
    with pytest.raises(UsageError, match=name):
        SharedConv2d(**counts)
    counts["out_maps"] = counts.pop("kernels")
    with pytest.raises(UsageError):
        SharedConvTranspose2d(**counts)


def test_bad_sizes_are_refused_with_advice() -> None:
    with pytest.raises(UsageError, match="odd side") as even:
        SharedConv2d(1, 1, 4, "same")
    assert "use 3 or 5" in str(even.value)
    with pytest.raises(UsageError, match="unknown padding") as unknown:
        SharedConv2d(1, 1, 3, "valide")
    assert "'valid'" in str(unknown.value)
    with pytest.raises(UsageError, match="fit into the map") as large:
        SharedConv2d(1, 1, 5)(torch.zeros(1, 2, 1, 4, 4))
    assert "kernel 5 x 5, maps 4 x 4" in str(large.value)
    with pytest.raises(UsageError, match="fit into the map"):
        SharedLinear(SharedConv2d(1, 1, 5), 4)


@pytest.mark.parametrize("layer", [SharedConv2d(2, 1, 3), SharedConvTranspose2d(2, 1, 3)])
@pytest.mark.parametrize("shape", [(1, 4, 1, 8, 8), (1, 2, 8, 8), (2, 8, 8)])
def test_other_shapes_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"takes \(B, T, 2, M, M\)") as caught:
        layer(torch.zeros(shape))
    assert str(shape) in str(caught.value)
