"""Rule ``shared_conv``: a convolution that all tokens share becomes one matrix product, where that is cheaper.

On optics the convolution is what is wanted; on a processor it is 64 small images and few kernels, which keeps vector
units waiting. The criterion comes from benchmarks/shared_conv.py (ONNX Runtime, one thread of an x86 CPU).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from edgeattn.models.layers.shared_conv import SharedConv2d, SharedConvTranspose2d, SharedLinear
from edgeattn.reparam.block import Block, Refused, Rule, Site
from edgeattn.reparam.proof import NotFused

NAME = "shared_conv"

LANES = 16
"""A convolution of fewer output maps takes about as long as one of this many: runtimes block over them."""

MOST_MACS = 2.0
"""The matrix may take this many times the MACs of the convolution, its output maps rounded up to ``LANES``."""

MOST_WEIGHTS = 1 << 14
"""Weights of a matrix that holds a kernel many times over, at most: 64 kB in float32. Larger ones make a file grow more
than a model gains: their layers are faster alone, with the matrix in the cache, than one behind the other."""

FEWEST_TOKENS = 16
"""With fewer, reading such a matrix takes longer than multiplying by it."""

_Shared = SharedConv2d | SharedConvTranspose2d


def _side(site: Site, module: _Shared) -> tuple[int, int]:
    """Side of the maps, and tokens in all, in every recorded call of the module."""
    shapes = {call.inputs[0].shape for call in site.record.calls_of(module) if call.inputs}
    if not shapes:
        raise Refused("it was not called in the recorded forward")
    if len(shapes) > 1 or next(iter(shapes))[-1] != next(iter(shapes))[-2]:
        raise Refused(f"it meets maps of other than one square size: {', '.join(map(str, sorted(shapes)))}")
    (shape,) = shapes
    return shape[-1], shape[0] * shape[1]


def _check(module: _Shared, side: int, tokens: int) -> None:
    """Refuse where the matrix is not the cheaper form, in numbers that are known here."""
    out, n = module.weight.shape[0], module.size
    if isinstance(module, SharedConvTranspose2d):
        out, places, d = module.out_maps, side * side, side + n - 1
    else:
        d = side if module.padding == "same" else side - n + 1
        places = d * d
    macs = module.weight.numel() * places
    matrix = out * d * d * module.in_maps * side * side
    if matrix <= module.weight.numel():  # kernels as large as the map: nothing is added
        return
    rounded = macs * (-(-out // LANES) * LANES) / out
    if matrix > MOST_MACS * rounded:
        raise Refused(
            f"it stays a convolution: as a matrix it would take {matrix / macs:.1f} times the MACs, and with "
            f"{out} output map{'s' * (out != 1)} up to {MOST_MACS * rounded / macs:.1f} times pay"
        )
    if matrix > MOST_WEIGHTS:
        raise Refused(
            f"it stays a convolution: its matrix would have {matrix:,} weights instead of {module.weight.numel():,} "
            f"(at most {MOST_WEIGHTS:,})"
        )
    if tokens < FEWEST_TOKENS:
        raise Refused(
            f"it stays a convolution: {tokens} token{'s' * (tokens != 1)} of at least {FEWEST_TOKENS} would share "
            f"a matrix of {matrix:,} weights"
        )


def propose(site: Site) -> Iterator[Block | NotFused]:
    """Every ``SharedConv2d`` and ``SharedConvTranspose2d`` that meets maps of one size.

    Given:
        y_t = k * x_t for all tokens t, maps x_t of M x M
    Result:
        Y = X Wᵀ, one product for all tokens, W a row a kernel where kernels are as large as the maps (valid padding:
        as many weights and MACs as before), else doubly block Toeplitz.

    With smaller kernels W takes more MACs and holds zeros and repetitions. It is made where it takes at most
    ``MOST_MACS`` times the MACs, counted with the output maps rounded up to ``LANES``, and holds at most
    ``MOST_WEIGHTS`` weights for ``FEWEST_TOKENS`` tokens or more; else the convolution stays and the reason is said.
    """
    for module, path in site.paths.items():
        if not isinstance(module, SharedConv2d | SharedConvTranspose2d):
            continue
        try:
            side, tokens = _side(site, module)
            _check(module, side, tokens)
        except Refused as refusal:
            yield NotFused(path, NAME, str(refusal))
            continue

        def fuse(of: nn.Module, side: int = side) -> nn.Module:
            assert isinstance(of, SharedConv2d | SharedConvTranspose2d)
            return SharedLinear(of, side)

        yield Block(
            path=path,
            rule=NAME,
            modules=(path,),
            entry=module,
            before=module,
            fuse=fuse,
            pairs=lambda matrix, old=module: [(old, matrix)],  # type: ignore[misc]
        )


RULE = Rule(NAME, propose)
