"""Activations. ``alpha`` and ``beta`` are numbers, or one number a channel, which is the second dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import op

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,  # log(1 + e^x) is x to the last bit of float32 where torch takes x, above 20
    "softsign": F.softsign,
}


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


for _name, _function in _PLAIN.items():
    op(_name)(_plain(_function))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """``values``, one a channel, in a shape that broadcasts with ``x``."""
    return values.reshape(-1, *(1 for _ in range(x.dim() - 2)))


@op("relu6")
def relu6(x: Tensor) -> Tensor:
    """``x``, but at least 0 and at most 6."""
    return torch.clamp(x, 0, 6)


@op("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """``x`` times the Gaussian distribution function of x: exact, or by way of a tanh or of a sigmoid.

    Args:
        mode: ``EXACT``, ``TANH_APPROXIMATION``, or ``SIGMOID_APPROXIMATION``, which is x sigmoid(1.702 x).
    """
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@op("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Exponentials along ``axis``, divided by their sum."""
    return torch.softmax(x, axis)


@op("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    """``x``; where that is negative, ``alpha * (e^x - 1)``."""
    return F.elu(x, alpha)


@op("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    """``x``; where that is negative, ``alpha * x``."""
    return F.leaky_relu(x, alpha)


@op("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``x``, or ``alpha * x`` where that is negative; at most ``beta``."""
    return F.leaky_relu(x, alpha).clamp_max(beta)


@op("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """``x``, or 0 where it is less than ``alpha``; torch's threshold would give 0 at ``alpha`` too."""
    return x.masked_fill(x < alpha, 0)


@op("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta``."""
    return x * alpha + beta


@op("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta``, but at least 0 and at most 1."""
    return (x * alpha + beta).clamp(0, 1)


@op("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha * tanh(beta * x)``."""
    return torch.tanh(x * beta) * alpha


@op("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """``x``; where that is negative, x times its channel's ``alpha``.

    Args:
        x: shape (B, C, ...), of rank 3 to 5. alpha: shape (C,); since iOS17 its dtype may differ from that of ``x``.
    """
    return F.prelu(x, alpha.to(x.dtype))


@op("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``alpha * log(1 + e^(beta * x))`` with the numbers of each channel.

    Args:
        x: shape (B, C, ...), of rank 3 or more. alpha, beta: shape (C,).
    """
    return F.softplus(x * _channels(beta, x)) * _channels(alpha, x)
