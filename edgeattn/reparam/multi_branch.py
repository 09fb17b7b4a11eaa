"""Rule ``multi_branch``: parallel convolutions and an identity, each with its batch norm, become one convolution."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from edgeattn.models.layers.conv import MultiBranchConv2d
from edgeattn.reparam.block import Block, Rule, Site
from edgeattn.reparam.fold import batch_norm_affine, bias_of, fold_output_affine, set_kernel, sum_kernels


def kernel_of(module: MultiBranchConv2d) -> tuple[Tensor, Tensor, int]:
    """(weight, bias, groups) of the one convolution that equals ``module`` in eval mode; folds the branches in place.

    Source: the sum of conv-BN branches is linear in x (RepVGG, arXiv 2101.03697, section 3.3).
    """
    parts = []
    for branch in module.branches:
        conv, bn = branch.conv, branch.bn
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        fold_output_affine(conv, *batch_norm_affine(bn))
        parts.append((conv.weight, bias_of(conv), conv.groups))
    identity = (None, None) if module.identity is None else batch_norm_affine(module.identity)
    return sum_kernels(parts, *identity)


def convolution(weight: Tensor, bias: Tensor, groups: int, stride: int) -> nn.Conv2d:
    """An nn.Conv2d with these parameters and "same" padding of its odd kernel."""
    kernel = tuple(weight.shape[2:])
    conv = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        kernel,  # type: ignore[arg-type]
        stride,
        tuple(side // 2 for side in kernel),  # type: ignore[arg-type]
        groups=groups,
        device="meta",
    )
    set_kernel(conv, weight, bias)
    return conv


def _fuse(module: nn.Module) -> nn.Module:
    assert isinstance(module, MultiBranchConv2d)
    return convolution(*kernel_of(module), module.stride)


def propose(site: Site) -> Iterator[Block]:
    """Every MultiBranchConv2d of the model.

    Given:
        y = sum_i BN_i(conv_i(x)) + BN(x)
    Result:
        y = conv(x), one nn.Conv2d with bias. Its groups are the finest grouping that all branches share (dense if one
        branch is dense), its kernel the largest; smaller kernels and the identity sit at the centre tap.
    """
    for module, path in site.paths.items():
        if isinstance(module, MultiBranchConv2d):
            yield Block(
                path=path,
                rule="multi_branch",
                modules=(path,),
                entry=module,
                before=module,
                fuse=_fuse,
                pairs=lambda fused, old=module: [(old, fused)],  # type: ignore[misc]
                crop=lambda x: x.ndim - 3,
            )


RULE = Rule("multi_branch", propose)
