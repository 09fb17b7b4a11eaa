"""Convolutions that are shared by all tokens: what ConvShareViT has in the place of linear layers.

A token is a stack of square maps, (B, T, F, M, M), and every token meets the identical kernels. On a free-space optical
correlator (4f) one kernel is one mask; see docs/convsharevit.md. "Convolution" is the cross-correlation of torch.

Source: ConvShareViT (arXiv 2504.11517, abstract) for the idea; the layers as they stand here are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.core.errors import UsageError, unknown

PADDINGS = ("valid", "same")


class SharedConv2d(nn.Module):
    """The same K kernels on the F maps of every token: (B, T, F, M, M) -> (B, T, K, d, d).

    d = M - N + 1 with ``valid`` padding, d = M with ``same``. With valid padding and N = M each kernel gives one
    number, its inner product with the token: together they are a linear layer with the weight (K, F * M * M).

    Args:
        in_maps: F, maps of a token that are summed over. kernels: K. size: N, the side of a kernel.
        padding: ``valid`` or ``same`` (N odd).
        bias: a number a kernel.

    Attributes:
        weight: (K, F, N, N), drawn from a truncated normal of variance 1 / (F N²). bias: (K,), zeros, or None.

    Raises:
        UsageError: a count below 1, an unknown padding, or an even kernel with ``same``.
    """

    def __init__(self, in_maps: int, kernels: int, size: int, padding: str = "valid", bias: bool = True) -> None:
        super().__init__()
        counted("SharedConv2d", {"in_maps": in_maps, "kernels": kernels, "size": size})
        if padding not in PADDINGS:
            raise unknown("padding", padding, PADDINGS, where="SharedConv2d.padding")
        if padding == "same" and size % 2 == 0:
            raise UsageError(
                "a kernel with same padding needs an odd side",
                value=size,
                where="SharedConv2d.size",
                why="an even kernel has no middle: its output would be shifted by half a pixel",
                fix=f"use {size - 1 or 1} or {size + 1}",
            )
        self.in_maps, self.kernels, self.size, self.padding = in_maps, kernels, size, padding
        self.weight = nn.Parameter(torch.empty(kernels, in_maps, size, size))
        self.bias = nn.Parameter(torch.zeros(kernels)) if bias else None
        nn.init.trunc_normal_(self.weight, std=(in_maps * size * size) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, F, M, M) -> (B, T, K, d, d).

        Raises:
            UsageError: another shape, or with valid padding a map that is smaller than the kernel.
        """
        _check_tokens(x, self.in_maps)
        if self.padding == "valid" and min(x.shape[-2:]) < self.size:
            raise _too_large(self.size, tuple(x.shape[-2:]))
        padding = self.size // 2 if self.padding == "same" else 0
        y = F.conv2d(x.flatten(0, 1), self.weight, self.bias, padding=padding)
        return y.reshape(x.shape[0], x.shape[1], *y.shape[1:])

    def extra_repr(self) -> str:
        """Maps, kernels, side and padding."""
        return f"{self.in_maps}, {self.kernels}, size={self.size}, padding={self.padding!r}"


class SharedConvTranspose2d(nn.Module):
    """A transposed convolution of stride 1 shared by all tokens: (B, T, K, d, d) -> (B, T, O, d + N - 1, d + N - 1).

    Each of the K maps is spread by its kernels (a full convolution) and the results are summed over K. It takes the
    maps of a valid ``SharedConv2d`` back to the size they came from.

    Args:
        in_maps: K. out_maps: O. size: N, the side of a kernel. bias: a number an output map.

    Attributes:
        weight: (K, O, N, N), drawn from a truncated normal of variance 1 / (K N²). bias: (O,), zeros, or None.

    Raises:
        UsageError: a count below 1.
    """

    def __init__(self, in_maps: int, out_maps: int, size: int, bias: bool = True) -> None:
        super().__init__()
        counted("SharedConvTranspose2d", {"in_maps": in_maps, "out_maps": out_maps, "size": size})
        self.in_maps, self.out_maps, self.size = in_maps, out_maps, size
        self.weight = nn.Parameter(torch.empty(in_maps, out_maps, size, size))
        self.bias = nn.Parameter(torch.zeros(out_maps)) if bias else None
        nn.init.trunc_normal_(self.weight, std=(in_maps * size * size) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, K, d, d) -> (B, T, O, d + N - 1, d + N - 1).

        Raises:
            UsageError: another shape.
        """
        _check_tokens(x, self.in_maps)
        y = F.conv_transpose2d(x.flatten(0, 1), self.weight, self.bias)
        return y.reshape(x.shape[0], x.shape[1], *y.shape[1:])

    def extra_repr(self) -> str:
        """Maps in and out, and side."""
        return f"{self.in_maps}, {self.out_maps}, size={self.size}"


class SharedLinear(nn.Module):
    """A shared convolution on maps of one size as the matrix that it is: (B, T, F, M, M) -> (B, T, K, d, d).

    The same numbers as ``of`` gives, from one matrix product over all tokens. With valid padding and kernels as large
    as the maps the matrix is ``of``'s weight, laid out anew; else it is doubly block Toeplitz: each kernel at each of
    its places, among zeros.

    Args:
        of: the convolution, which is not changed. side: M, of the maps that it will meet.

    Attributes:
        weight: (K * d * d, F * M * M). bias: (K * d * d,), or None. shape: (K, d, d).

    Raises:
        UsageError: the maps are smaller than the kernel.
    """

    def __init__(self, of: SharedConv2d | SharedConvTranspose2d, side: int) -> None:
        super().__init__()
        weight = of.weight.detach()
        if isinstance(of, SharedConvTranspose2d):  # by definition the transpose of what leads from its outputs back
            matrix = toeplitz(weight, side + of.size - 1).permute(3, 4, 5, 0, 1, 2)
        else:
            matrix = toeplitz(weight, side, of.size // 2 if of.padding == "same" else 0)
        kernels, d = matrix.shape[:2]
        self.shape = (kernels, d, d)
        self.weight = nn.Parameter(matrix.reshape(kernels * d * d, -1), requires_grad=False)
        bias = None if of.bias is None else of.bias.detach().repeat_interleave(d * d)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, F, M, M) -> (B, T, K, d, d)."""
        return F.linear(x.flatten(2), self.weight, self.bias).reshape(x.shape[0], x.shape[1], *self.shape)

    def extra_repr(self) -> str:
        """Numbers of a token that come in and go out."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def toeplitz(weight: Tensor, side: int, padding: int = 0) -> Tensor:
    """The cross-correlation with ``weight`` (K, F, N, N) on maps of ``side`` = M as a matrix, (K, d, d, F, M, M).

    d = M + 2 padding - N + 1. Element [k, i, j, f, y, x] is what input (f, y, x) adds to output (k, i, j).

    Raises:
        UsageError: the maps are smaller than the kernel.
    """
    kernels, maps, n, _ = weight.shape
    padded = side + 2 * padding
    d = padded - n + 1
    if d < 1:
        raise _too_large(n, (side, side))
    matrix = weight.new_zeros(kernels, d, d, maps, padded, padded)
    for i in range(d):
        for j in range(d):
            matrix[:, i, j, :, i : i + n, j : j + n] = weight
    return matrix[..., padding : padding + side, padding : padding + side]


def _too_large(size: int, maps: tuple[int, ...]) -> UsageError:
    return UsageError(
        "a kernel with valid padding must fit into the map",
        value=f"kernel {size} x {size}, maps {maps[0]} x {maps[1]}",
        why="there is no place where the whole kernel meets data",
        fix="use a smaller kernel, larger maps, or same padding",
    )


def counted(where: str, counts: Mapping[str, int]) -> None:
    """Refuse a count below 1.

    Raises:
        UsageError: names the first of them.
    """
    for name, value in counts.items():
        if value < 1:
            raise UsageError(
                f"{name} must be at least 1",
                value=value,
                where=f"{where}.{name}",
                why="it is a count",
                fix="use 1 or more",
            )


def _check_tokens(x: Tensor, maps: int) -> None:
    if x.ndim != 5 or x.shape[2] != maps:
        raise UsageError(
            f"a shared convolution of {maps} maps a token takes (B, T, {maps}, M, M)",
            value=tuple(x.shape),
            why="axes are batch, tokens, maps of a token, height, width",
            fix=f"reshape the tokens to {maps} map{'s' * (maps != 1)} each",
        )
