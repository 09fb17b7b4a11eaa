"""Cross-layer equalization: channels between two layers scaled so that both layers' ranges are alike.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.1.
Given y = W2 f(W1 x + b1) with f(s z) = s f(z) for s > 0. Result: W1 / s, b1 / s and W2 s, where s = sqrt(range1 /
range2) by channel. Two things differ from the paper. s is the nearest power of two: but for underflow, no bit of the
float outputs changes. And channels that are near the middle of their pair stay: weights have a scale for each output
channel here, and to even out what is nearly even made a trained model slightly worse (docs/equalization.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from edgeattn.capture import Program
from edgeattn.core.numerics import Array, compare
from edgeattn.quant.channels import Reach, Reader, reach
from edgeattn.quant.weighted import Layer, entries_for, layers, run, with_weights

#: Largest relative L2 between the outputs before and after.
TOLERANCE = 1e-5
#: Samples on which this is measured.
PROVEN_ON = 8
#: log2 of the factor that a channel must be away from the middle one of its pair: ranges 4 times out of balance.
FAR = 1.0
#: log2 of the largest factor of a channel, all sweeps together: float16 must hold the weights too.
LARGEST = 12
#: Sweeps over all pairs; a change in one pair undoes some of its neighbours' balance.
SWEEPS = 30


@dataclass(frozen=True)
class _Pair:
    """A layer and all that read it, the same in every entry."""

    source: Layer
    readers: tuple[Reader, ...]
    free: Tensor  # (channels,), where a factor is allowed


def _pairs(program: Program) -> list[_Pair]:
    found = layers(program)
    reaches: dict[str, dict[str, Reach]] = {}
    for name, own in found.items():
        by_node = {layer.node: layer for layer in own.values()}
        for weight, layer in own.items():
            reaches.setdefault(weight, {})[name] = reach(layer, by_node)
    pairs = []
    for weight, by_entry in reaches.items():
        readers = {name: {r.layer.weight: r for r in one.readers} for name, one in by_entry.items()}
        first, *rest = readers.values()
        same = all(
            other.keys() == first.keys()
            and all(torch.equal(other[k].channels, r.channels) and other[k].power == r.power for k, r in first.items())
            for other in rest
        )
        # A reader must not read something else in another entry.
        nowhere_else = all((key in own) == (name in by_entry) for key in first for name, own in found.items())
        fixed = torch.stack([one.fixed for one in by_entry.values()]).any(dim=0)
        if first and same and nowhere_else and not bool(fixed.all()):
            source = next(own[weight] for own in found.values() if weight in own)
            pairs.append(_Pair(source, tuple(first.values()), ~fixed))
    return pairs


def _given(pair: _Pair, weights: Mapping[str, Tensor]) -> Tensor:
    """Largest magnitude of the weights of each output channel, (channels,)."""
    return pair.source.grid(weights[pair.source.weight]).abs().amax(dim=(2, 3)).reshape(-1)


def _taken(reader: Reader, weights: Mapping[str, Tensor], count: int) -> Tensor:
    """Largest magnitude of the weights that each of ``count`` channels is read with, 0 where it is not."""
    largest = reader.layer.grid(weights[reader.layer.weight]).abs().amax(dim=(1, 3))
    index = reader.channels.reshape(-1).long()
    return torch.zeros(count).scatter_reduce_(0, index, largest.float().reshape(-1), "amax")


def _exponents(pair: _Pair, weights: Mapping[str, Tensor], before: Tensor) -> Tensor:
    """log2 of the factor s of each channel; W1 is to be divided by it.

    Args:
        before: what earlier sweeps have made of it.
    """
    given = _given(pair, weights).float()
    best = torch.full_like(given, math.inf)
    for reader in pair.readers:
        # given / s = taken * s ** power; of several readers the one that is balanced first decides.
        ratio = given / _taken(reader, weights, len(given))
        best = torch.minimum(best, ratio.log2() / (1 + reader.power))
    # A channel without weights on one side has no balance.
    usable = best.isfinite() & pair.free
    if not bool(usable.any()):
        return torch.zeros_like(before)
    # A factor that all channels share changes no scale but its own.
    best = best - best[usable].median()
    best = torch.where(usable & (best.abs() > FAR), best, torch.zeros(())).round()
    return (before + best).clamp(-LARGEST, LARGEST) - before


def _scale(pair: _Pair, weights: dict[str, Tensor], exponents: Tensor) -> None:
    """Divide what the layer gives by 2 ** exponents, and multiply what reads it; in place."""
    source = pair.source
    factor = torch.exp2(-exponents)
    grid = source.grid(weights[source.weight])
    grid.mul_(factor.view(grid.shape[0], grid.shape[1], 1, 1).to(grid.dtype))
    if source.bias:
        weights[source.bias].mul_(factor.to(grid.dtype))
    for reader in pair.readers:
        grid = reader.layer.grid(weights[reader.layer.weight])
        back = torch.exp2(exponents * reader.power)[reader.channels.long()]
        grid.mul_(back[:, None, :, None].to(grid.dtype))


def _ends(values: Tensor) -> list[float]:
    """Smallest and largest, zeros apart."""
    used = values[values > 0]
    return [float(used.min()), float(used.max())] if used.numel() else [0.0, 0.0]


def _ranges(pair: _Pair, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    given = _given(pair, weights)
    taken = {r.layer.module: _ends(_taken(r, weights, len(given))[pair.free]) for r in pair.readers}
    return {"given": _ends(given[pair.free]), "taken": taken}


def equalize(program: Program, samples: Iterable[Mapping[str, Array]]) -> tuple[Program, dict[str, Any]]:
    """Even out the ranges of channels that are far out of balance between two layers; no output changes.

    Pairs are found by following each layer's output channels through everything that a positive factor passes:
    ReLU, pools, means, moves of places, attention's values. Where a channel reaches anything else, it stays as it is.

    Args:
        samples: feeds by input name, on the first ``PROVEN_ON`` of which both programs run.

    Returns:
        A new program that shares all tensors that did not change; and plain data: ``pairs`` with the smallest and
        largest range of the channels before and after, ``relative_l2`` by output, ``held``, ``words`` for the user.
        If outputs differ by more than ``TOLERANCE``, or no sample fits an entry, the program is the given one.
    """
    pairs = _pairs(program)
    state = {k: v for entry in program.entries.values() for k, v in entry.graph.state_dict.items()}
    names = {layer.weight for p in pairs for layer in (p.source, *(r.layer for r in p.readers))}
    names |= {p.source.bias for p in pairs if p.source.bias}
    weights = {name: state[name].detach().clone() for name in names}
    before = [_ranges(pair, weights) for pair in pairs]
    totals = [torch.zeros(len(pair.free)) for pair in pairs]
    sweeps, moved = 0, bool(pairs)
    while moved and sweeps < SWEEPS:
        moved, sweeps = False, sweeps + 1
        for total, pair in zip(totals, pairs, strict=True):
            exponents = _exponents(pair, weights, total)
            if bool(exponents.any()):
                _scale(pair, weights, exponents)
                total += exponents
                moved = True
    facts: dict[str, Any] = {
        "pairs": [
            {
                "from": pair.source.module,
                "to": [reader.layer.module for reader in pair.readers],
                "channels": len(pair.free),
                "scaled": int(total.count_nonzero()),
                "before": was,
                "after": _ranges(pair, weights),
            }
            for pair, total, was in zip(pairs, totals, before, strict=True)
        ],
        "sweeps": sweeps,
        "relative_l2": {},
        "held": True,
        "words": ["no two layers can be equalized: what is between them takes no factor"] if not pairs else [],
    }
    if not any(bool(total.any()) for total in totals):
        facts["words"] = facts["words"] or [f"{len(pairs)} pairs of layers are even as they are"]
        return program, facts
    even = with_weights(program, {k: v for k, v in weights.items() if not torch.equal(v, state[k])})
    facts["relative_l2"], missing = _distance(program, even, samples)
    worst = max(facts["relative_l2"].values(), default=math.inf)
    facts["held"] = not missing and worst <= TOLERANCE
    if not facts["held"]:
        why = f"{', '.join(missing)} did not run on the samples" if missing else f"the outputs differ by {worst:.1e}"
        facts["words"] = [f"equalization was undone: {why}"]
        return program, facts
    scaled, channels = sum(bool(t.any()) for t in totals), sum(int(t.count_nonzero()) for t in totals)
    facts["words"] = [
        f"{channels} channels scaled between {scaled} of {len(pairs)} pairs of layers; outputs differ by {worst:.1e}"
    ]
    return even, facts


def _distance(
    program: Program, other: Program, samples: Iterable[Mapping[str, Array]]
) -> tuple[dict[str, float], list[str]]:
    """Largest relative L2 of each output, ``ENTRY.OUTPUT``; and the entries that no sample has the inputs of."""
    found: dict[str, float] = {}
    missing = set(program.entries)
    for feeds in islice(samples, PROVEN_ON):
        for name in entries_for(program, feeds):
            missing.discard(name)
            ours = run(other.entries[name], feeds)
            for output, value in run(program.entries[name], feeds).items():
                numerics = compare(value.double().numpy(), ours[output].double().numpy())
                distance = numerics.relative_l2 if numerics.nonfinite == numerics.nonfinite_reference else math.inf
                key = f"{name}.{output}"
                found[key] = max(found.get(key, 0.0), distance)
    return found, sorted(missing)
