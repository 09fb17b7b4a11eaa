"""Batch-norm statistics for models without a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LEAST_VARIANCE = 0.1
"""Smallest settled variance of a channel over the mean of its layer: a channel that is dead or constant on the settling
batch would otherwise be amplified up to 1 / sqrt(eps), some 300 times, on the next input."""


def settled(model: nn.Module) -> bool:
    """Whether a batch norm of the model already has statistics, as where a factory loads its weights by itself."""
    return any(
        norm.running_mean is not None
        and norm.running_var is not None
        and bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())
        for norm in model.modules()
        if isinstance(norm, _BatchNorm)
    )


def randomize(model: nn.Module, inputs: Tensor | Sequence[Any], seed: int) -> None:
    """Give every batch norm a random affine and statistics settled on a random batch, in place; leave eval mode.

    A fresh batch norm is the identity: a fusion that forgot its mean or its shift would still pass every comparison,
    and a deep net whose activations are not normalised overflows. Here gamma is multiplied by U(0.5, 1.5) (a gamma of
    0, as of a zero-initialised residual branch, counts as 1), beta ~ N(0, 0.1), and mean and variance are those of one
    eval-mode pass in which each batch norm sees what the ones before it now let through. No other module is changed;
    without a batch norm nothing is.

    If that pass fails, or its statistics are not finite, all are as drawn: mean ~ N(0, 0.1), variance ~ U(0.5, 1.5).

    Args:
        model: any module, with the weights it should keep.
        inputs: its positional arguments, or the only one, for shapes: floating tensors are replaced by noise, others
            repeated as they are, both along axis 0 up to a batch of 4 for photographs and 16 for small images.
        seed: the same model, inputs and seed give the same numbers; torch's global generator is not used.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with torch.no_grad():
        for norm in norms:
            _draw(norm, generator)
        _settle(model, norms, [_noise(arg, generator) for arg in args])


def _draw(norm: _BatchNorm, generator: torch.Generator) -> None:
    """Random affine and, for the case that nothing better follows, random statistics; all drawn on the CPU."""

    def scale(like: Tensor) -> Tensor:
        return (torch.rand(like.shape, generator=generator) + 0.5).to(like)

    def shift(like: Tensor) -> Tensor:
        return (0.1 * torch.randn(like.shape, generator=generator)).to(like)

    if norm.affine:
        norm.weight.copy_(torch.where(norm.weight == 0, 1.0, norm.weight) * scale(norm.weight))
        norm.bias.copy_(shift(norm.bias))
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean.copy_(shift(norm.running_mean))
        norm.running_var.copy_(scale(norm.running_var))


def _noise(value: Any, generator: torch.Generator) -> Any:
    """The argument of the settling pass in the place of ``value``."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    # How much samples differ in a deep layer is estimated from the batch, ever worse the fewer: on batches of 2 a fresh
    # image leaves the 29 blocks of FMViT-L a thousandfold too large. Small inputs can afford, and need, more.
    batch = min(16, max(4, 600_000 // max(1, value[0].numel())))
    value = torch.cat([value] * -(-batch // value.shape[0]))
    if not value.is_floating_point():
        return value
    # White noise alone looks alike to deep layers; an offset for each sample and channel makes the samples differ.
    offsets = value.shape[:2] + (1,) * (value.ndim - 2)
    noise = torch.randn(value.shape, generator=generator) + torch.randn(offsets, generator=generator)
    return (noise * 0.5**0.5).to(value)


def _settle(model: nn.Module, norms: Sequence[_BatchNorm], args: Sequence[Any]) -> None:
    """Take the statistics of one pass, or none."""
    tracked = [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]
    drawn = [[buffer.clone() for buffer in norm.buffers()] for norm in tracked]
    handles = [norm.register_forward_pre_hook(_take_statistics) for norm in tracked]
    try:
        model(*args)
        settled = all(bool(buffer.isfinite().all()) for norm in tracked for buffer in norm.buffers())
    except Exception:  # any model may come here; one that cannot run on this batch keeps what was drawn
        settled = False
    finally:
        for handle in handles:
            handle.remove()
    if not settled:
        for norm, before in zip(tracked, drawn, strict=True):
            for buffer, value in zip(norm.buffers(), before, strict=True):
                buffer.copy_(value)


def _take_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-forward hook: the running statistics become those of the input (B, C, ...)."""
    x: Tensor = args[0]
    variance, mean = torch.var_mean(x, dim=[axis for axis in range(x.ndim) if axis != 1], correction=0)
    mean_buffer, variance_buffer = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    mean_buffer.copy_(mean)
    variance_buffer.copy_(variance.clamp_min(LEAST_VARIANCE * float(variance.mean())))
