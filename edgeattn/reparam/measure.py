"""Running both forms of a block and measuring how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeattn.reparam.block import Arguments, Block, NotRunnable, Refused, map_tensors
from edgeattn.reparam.fold import is_batch_norm, is_layer
from edgeattn.reparam.proof import BlockProof, Errors, Totals
from edgeattn.reparam.trace import duplicate, leaf_tensors, preserved


def totals(model: nn.Module) -> Totals:
    """Counts of a model."""
    modules = list(model.modules())
    return Totals(
        parameters=parameter_count(model),
        modules=len(modules),
        convolutions=sum(is_layer(module) and not isinstance(module, nn.Linear) for module in modules),
        batch_norms=sum(map(is_batch_norm, modules)),
    )


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def distance(reference: Any, other: Any) -> float:
    """Largest relative L2 over the tensors of two nested outputs; infinite if they differ in kind or are not finite."""
    pairs = list(zip(leaf_tensors(reference), leaf_tensors(other), strict=False))
    if len(leaf_tensors(reference)) != len(leaf_tensors(other)):
        return math.inf
    return max((_distance(r, y) for r, y in pairs), default=0.0)


def _distance(reference: Tensor, other: Tensor) -> float:
    if reference.shape != other.shape:
        return math.inf
    r, y = reference.detach().double(), other.detach().double()
    error, norm = float((y - r).norm()), float(r.norm())
    if not math.isfinite(error) or not math.isfinite(norm):
        return math.inf
    return error / norm if norm else (0.0 if error == 0 else math.inf)


def prove(block: Block, sample: Arguments | None, generator: torch.Generator) -> tuple[nn.Module, BlockProof]:
    """The float32 deploy form of a block and its measured errors; whether these hold is for the caller to say.

    The fold is made in float64 and rounded to float32 once. Nothing of the model is touched.

    Args:
        sample: recorded arguments of the block's entry; None if it was not called.

    Raises:
        NotRunnable: the training form does not run on ``sample``. Refused: the fold cannot be made.
    """
    if sample is None:
        raise Refused("it was not called in the recorded forward")
    noise = map_tensors(lambda x: _noise(x, generator), sample)
    with torch.no_grad():
        _check_dtype(block.before)
        training = block.before
        training64 = duplicate(training).double()
        try:
            references = [_run(training64, _double(sample)), _run(training64, _double(noise))]
            references += [_run(training, sample), _run(training, noise)]
        except Exception as error:  # whatever a guest raises
            raise NotRunnable(f"it could not be run on its own on recorded activations: {error}") from error
        deploy64 = fold(block, training64)
        deploy = duplicate(deploy64).float()
        try:
            results = [_run(deploy64, _double(sample)), _run(deploy64, _double(noise))]
            results += [_run(deploy, sample), _run(deploy, noise)]
        except Exception as error:  # the fused form of a guest may be broken in any way
            raise Refused(f"its fused form raised {type(error).__name__}: {error}") from error
    errors = Errors(*(distance(r, y) for r, y in zip(references, results, strict=True)))
    (range_before, crest_before), (range_after, crest_after) = _spread(training), _spread(deploy)
    return deploy, BlockProof(
        path=block.path,
        rule=block.rule,
        modules=block.modules,
        errors=errors,
        parameters_before=parameter_count(training),
        parameters_after=parameter_count(deploy),
        range_growth=_ratio(range_after, range_before),
        crest_growth=_ratio(crest_after, crest_before),
    )


def fold(block: Block, training64: nn.Module) -> nn.Module:
    """The float64 deploy form out of the block's training form in float64, which may be consumed.

    Raises:
        Refused: the fold cannot be made.
    """
    with torch.no_grad(), _default_float64():
        deploy = block.fuse(training64).double()
        deploy.eval()  # a statement of its own: guests that override train() may return nothing
    return deploy


def _run(module: nn.Module, arguments: Arguments) -> Any:
    """One call on fresh copies of the tensors, since an activation may work in place."""
    args, kwargs = map_tensors(Tensor.clone, arguments)
    with preserved(module):
        return module(*args, **kwargs)


def _double(arguments: Arguments) -> Arguments:
    result: Arguments = map_tensors(lambda x: x.double() if x.is_floating_point() else x, arguments)
    return result


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of the same shape; masks, indices and other integers stay what they are."""
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        return x
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def _check_dtype(module: nn.Module) -> None:
    kinds = {t.dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point() or t.is_complex()}
    if kinds - {torch.float32}:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise Refused(f"its parameters are {names}; only float32 models are fused")


@contextmanager
def _default_float64() -> Iterator[None]:
    """Let modules that a guest's method creates be float64, so that its fold is not rounded on the way."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on CUDA: its 10 bits of mantissa would drown what is measured."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    allowed = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, before in zip(backends, allowed, strict=True):
            backend.allow_tf32 = before


def _spread(module: nn.Module) -> tuple[float, float]:
    """Largest max|W|, and largest max|W| / rms(W), over the kernels of a module."""
    kernels = [layer.weight.detach() for layer in module.modules() if is_layer(layer)]
    ranges = [(float(w.abs().max()), float(w.norm()) / max(1, w.numel()) ** 0.5) for w in kernels if w.numel()]
    return max((top for top, _ in ranges), default=0.0), max((_ratio(top, rms) for top, rms in ranges), default=0.0)


def _ratio(after: float, before: float) -> float:
    """after / before; 1 for two zeros (nothing grew), infinite out of nothing."""
    if before == 0:
        return 1.0 if after == 0 else math.inf
    return after / before
