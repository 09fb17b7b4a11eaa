"""Convolutions in their training form: several linear branches whose sum is one convolution at deploy time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class ConvBN(nn.Sequential):
    """Convolution without bias, then batch norm, as children ``conv`` and ``bn``: (B, Ci, H, W) -> (B, Co, H', W')."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)


class MultiBranchConv2d(nn.Module):
    """Sum of parallel conv-BN branches, and of a BN of the input itself where the shape allows an identity.

    (B, Ci, H, W) -> (B, Co, H', W') with "same" padding of odd kernels. In eval mode the sum is linear in x, hence
    equal to one convolution with bias; ``edgeattn.reparam.multi_branch`` computes it.

    Two uses in FMViT (both reconstructions, see docs/fmvit.md): the *multi-group* form, 1x1 branches with groups
    {1, 2, 4, 8} restricted to divisors of gcd(Ci, Co); and the *multi-kernel* form of MobileOne, a grouped k x k
    branch, a grouped 1x1 branch and the identity.

    Args:
        cin, cout: channels.
        branches: (kernel, groups) of each convolution branch; kernels odd, groups dividing both channel counts.
        stride: common stride of the branches.
        identity: add BN(x); needs cin == cout and stride 1.
        gain: standard deviation of a fresh output; the weights of the n batch norms start at ``gain / sqrt(n)``, so
            that their sum does not grow with the number of branches.

    Raises:
        ValueError: an identity that the shapes do not allow, an even kernel, or no branch.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        branches: Sequence[tuple[int, int]],
        stride: int = 1,
        identity: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        if not branches:
            raise ValueError("MultiBranchConv2d needs at least one (kernel, groups) branch")
        if any(kernel % 2 == 0 for kernel, _ in branches):
            raise ValueError(f"kernels must be odd, got {[kernel for kernel, _ in branches]}")
        if identity and (cin != cout or stride != 1):
            raise ValueError(f"an identity branch needs cin == cout and stride 1, got {cin}, {cout}, stride {stride}")
        self.cin, self.cout, self.stride = cin, cout, stride
        self.branches = nn.ModuleList(ConvBN(cin, cout, kernel, stride, groups) for kernel, groups in branches)
        self.identity = nn.BatchNorm2d(cin) if identity else None
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.constant_(norm.weight, gain / math.sqrt(len(norms)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, Ci, H, W) -> (B, Co, ceil(H / stride), ceil(W / stride))."""
        outputs = [branch(x) for branch in self.branches]
        if self.identity is not None:
            outputs.append(self.identity(x))
        total: Tensor = sum(outputs[1:], outputs[0])
        return total


RESIDUAL_GAIN = 0.1
"""Gain of a convolution that ends a residual branch. With 1, a fresh FMViT-L amplifies a small change of its input, and
the rounding of any format with it, about a hundredfold: float32 itself is then 1e-5 off. With this, hardly at all."""


def gmlp(
    cin: int,
    cout: int,
    groups: Sequence[int] = (1, 2, 4, 8),
    identity: bool | None = None,
    gain: float = 1.0,
) -> MultiBranchConv2d:
    """FMViT's convolutional multi-group reparameterization: parallel grouped 1x1 convolutions, one dense 1x1 at deploy.

    Args:
        groups: tried group counts; those that do not divide gcd(cin, cout) are left out.
        identity: BN(x) branch; by default wherever cin == cout.
        gain: standard deviation of a fresh output.

    The kernel size and the group set are a reconstruction (the paper's body was not available).
    """
    common = math.gcd(cin, cout)
    return MultiBranchConv2d(
        cin,
        cout,
        [(1, g) for g in groups if common % g == 0],
        identity=cin == cout if identity is None else identity,
        gain=gain,
    )
