"""The algebra, against the modules it replaces, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgeattn.models.layers.conv import MultiBranchConv2d
from edgeattn.models.layers.repmixer import RepMixer
from edgeattn.reparam import fold, multi_branch, residual

quick = settings(max_examples=30, deadline=None)
variances = st.sampled_from([1e-12, 1e-3, 1.0, 1e4])


def noise(model: nn.Module, variance: float = 1.0) -> nn.Module:
    """Random weights, and statistics that a forgotten mean or shift would show, in float64 and eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5).mul_(variance)
    return model.double().eval()


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).norm()) <= 1e-11 * float(b.norm())


@quick
@given(
    st.sampled_from([(8, 8), (8, 16), (16, 8), (24, 24)]),
    st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
    st.booleans(),
    variances,
)
def test_branches_are_one_convolution(
    channels: tuple[int, int], branches: list[tuple[int, int]], stride: int, identity: bool, variance: float
) -> None:
    identity = identity and channels[0] == channels[1] and stride == 1
    module = noise(MultiBranchConv2d(*channels, branches, stride, identity), variance)
    x = torch.randn(2, channels[0], 9, 7, dtype=torch.float64)
    expected = module(x)
    conv = multi_branch._fuse(module)
    assert isinstance(conv, nn.Conv2d)
    assert conv.groups == math.gcd(*(groups for _, groups in branches))
    assert conv.kernel_size == (max(kernel for kernel, _ in branches),) * 2
    close(conv(x), expected)


@quick
@given(st.sampled_from([1, 4, 6]), st.sampled_from([3, 5, 7]), st.floats(-2, 2), variances)
def test_residual_branch_is_one_depthwise_convolution(
    channels: int, kernel: int, layer_scale: float, variance: float
) -> None:
    module = noise(RepMixer(channels, kernel, layer_scale), variance)
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    expected = module(x)
    conv = residual._fuse(module)
    assert conv.groups == channels
    close(conv(x), expected)


@quick
@given(
    st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    variances,
)
def test_affine_behind_a_convolution(kind: type, groups: int, kernel: int, bias: bool, variance: float) -> None:
    layer = kind(4, 8, kernel, stride=2, padding=1, groups=groups, bias=bias)
    rank = len(layer.kernel_size)
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](8)
    model = noise(nn.Sequential(layer, bn), variance)
    x = torch.randn(2, 4, *[5] * rank, dtype=torch.float64)
    expected = model(x)
    fold.fold_output_affine(layer, *fold.batch_norm_affine(bn))
    close(layer(x), expected)


@quick
@given(st.sampled_from([nn.Conv1d, nn.Conv2d]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), variances)
def test_affine_in_front_of_a_convolution(kind: type, groups: int, kernel: int, variance: float) -> None:
    layer = kind(4, 8, kernel, groups=groups)
    rank = len(layer.kernel_size)
    bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[rank](4)
    model = noise(nn.Sequential(bn, layer), variance)
    x = torch.randn(2, 4, *[6] * rank, dtype=torch.float64)
    expected = model(x)
    fold.fold_input_affine(layer, *fold.batch_norm_affine(bn))
    close(layer(x), expected)


def test_linear_on_both_sides() -> None:
    model = noise(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3)))
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = model(x)
    fold.fold_output_affine(model[1], *fold.batch_norm_affine(model[2]))
    fold.fold_input_affine(model[1], *fold.batch_norm_affine(model[0]))
    close(model[1](x), expected)


def test_what_has_no_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="running statistics"):
        fold.batch_norm_affine(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="groups"):
        fold.regroup(torch.zeros(4, 1, 1, 1), 4, 3)


def test_batch_norm_without_affine() -> None:
    bn = nn.BatchNorm1d(3, affine=False).double().eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    scale, shift = fold.batch_norm_affine(bn)
    x = torch.randn(4, 3, dtype=torch.float64)
    close(x * scale + shift, bn(x))
