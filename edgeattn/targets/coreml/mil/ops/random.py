"""Random numbers, the same in every run.

Core ML draws from a stream of its own, which is not documented: only the distribution here is that of a device, never
the numbers. So a comparison of numbers means nothing where these operations are used.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from edgeattn.targets.coreml.mil.registry import Call, Ints, op


def _generator(seed: int, call: Call) -> torch.Generator:
    """A generator from the seed of an operation.

    The seed -1, the default, leaves the numbers to Core ML. Here they then depend on the operation's name, so that no
    two operations draw the same ones.
    """
    return torch.Generator().manual_seed(seed if seed >= 0 else zlib.crc32(call.name.encode()))


@op("random_normal")
def random_normal(shape: Ints, call: Call, mean: float = 0.0, stddev: float = 1.0, seed: int = -1) -> Tensor:
    """Numbers of a normal distribution; only the distribution is that of Core ML, see the head of this file."""
    return torch.normal(mean, stddev, shape, generator=_generator(seed, call))


@op("random_uniform")
def random_uniform(shape: Ints, call: Call, low: float = 0.0, high: float = 1.0, seed: int = -1) -> Tensor:
    """Numbers spread evenly over [low, high); only the distribution is that of Core ML, see the head of this file."""
    return torch.rand(shape, generator=_generator(seed, call)) * (high - low) + low


@op("random_bernoulli")
def random_bernoulli(shape: Ints, call: Call, prob: float = 0.5, seed: int = -1) -> Tensor:
    """1 with probability ``prob``, else 0; only the distribution is that of Core ML, see the head of this file."""
    return torch.rand(shape, generator=_generator(seed, call)) < prob


@op("random_categorical")
def random_categorical(x: Tensor, call: Call, mode: str = "logits", size: int = 1, seed: int = -1) -> Tensor:
    """Indices into the last dimension of ``x``, drawn with replacement.

    Only the distribution is that of Core ML, see the head of this file.

    Args:
        x: shape (..., n), finite. mode: ``logits``, or ``probs`` where ``x`` holds probabilities, of any sum.

    Returns:
        shape (..., size).

    Raises:
        RuntimeError: ``probs`` that are negative, or all zero.
    """
    probs = torch.softmax(x, -1) if mode == "logits" else x
    drawn = torch.multinomial(probs.reshape(-1, x.shape[-1]), size, replacement=True, generator=_generator(seed, call))
    return drawn.reshape(*x.shape[:-1], size)
