"""Cross-layer equalization: channels between two layers scaled so that data and weights have ranges that are alike.

Given y = W2 f(W1 x + b1) with f(s z) = s f(z) for s > 0. Result: W1 / s, b1 / s and W2 s by channel, as in Nagel et
al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.1. There s
evens out the ranges of W1 and W2. Here it is sqrt(range of f / range of W2), the f being measured on samples, as in
Xiao et al., "SmoothQuant" (arXiv 2211.10438): W1 has a scale for each output channel anyway, while data share one, and
so do the weights of W2 that are added up. A channel of tiny weights that lives by its bias, as behind a batch norm that
switched it off, would become the loudest of all by the ranges of weights; by those of data it stays.

s is the nearest power of two: but for underflow, no bit of the float outputs changes. Channels that are near the middle
of their pair stay: to even out what is nearly even gained nothing (docs/equalization.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.capture import Program
from edgeattn.core.numerics import Array, compare
from edgeattn.quant.channels import Reach, Reader, reach
from edgeattn.quant.weighted import Layer, entries_for, layers, run, with_weights

#: Largest relative L2 between the outputs before and after.
TOLERANCE = 1e-5
#: Samples on which this is measured, of those on which the data's ranges are.
PROVEN_ON = 8
#: Samples on which the data's ranges are, spread over all.
SEEN = 16
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


class _Peaks:
    """Largest magnitude of what layers read, (channels,) by the name of their weight."""

    def __init__(self, program: Program) -> None:
        self._layers = {layer.node: layer for own in layers(program).values() for layer in own.values()}
        self.of: dict[str, Tensor] = {}

    def look(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> None:
        """Look at what an operation is about to read."""
        layer = self._layers.get(node)
        if layer is not None:
            data = value(layer.data)
            peaks = data.movedim(data.ndim - 1 - layer.spatial, 0).flatten(1).abs().amax(dim=1).float()
            self.of[layer.weight] = torch.maximum(self.of.get(layer.weight, peaks), peaks)


def _by_channel(reader: Reader, values: Tensor, count: int) -> Tensor:
    """Of ``count`` channels the largest of the values of what reads them, 0 where nothing does.

    Args:
        values: of each input of the reader, (groups, inputs of a group) in any shape.
    """
    index = reader.channels.reshape(-1).long()
    return torch.zeros(count).scatter_reduce_(0, index, values.float().reshape(-1), "amax")


def _taken(reader: Reader, weights: Mapping[str, Tensor], count: int) -> Tensor:
    """Largest magnitude of the weights that each of ``count`` channels is read with."""
    return _by_channel(reader, reader.layer.grid(weights[reader.layer.weight]).abs().amax(dim=(1, 3)), count)


def _given(reader: Reader, peaks: _Peaks, scaled: Tensor) -> Tensor:
    """Largest magnitude of the data that reach a layer by each of the channels, (channels,).

    Args:
        scaled: log2 of what the channels have been divided by since they were measured.
    """
    seen = peaks.of.get(reader.layer.weight)
    if seen is None:
        return torch.zeros(len(scaled))
    return _by_channel(reader, seen, len(scaled)) * torch.exp2(-scaled * reader.power)


def _exponents(pair: _Pair, weights: Mapping[str, Tensor], peaks: _Peaks, before: Tensor) -> Tensor:
    """log2 of the factor s of each channel; W1 is to be divided by it.

    Args:
        before: what earlier sweeps have made of it.
    """
    best = torch.full_like(before, math.inf)
    for reader in pair.readers:
        # given / s ** power = taken * s ** power; of several readers the one that is balanced first decides.
        ratio = _given(reader, peaks, before) / _taken(reader, weights, len(before))
        best = torch.minimum(best, ratio.log2() / (2 * reader.power))
    # A channel without data or without weights has no balance.
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


def _ranges(pair: _Pair, weights: Mapping[str, Tensor], peaks: _Peaks, scaled: Tensor) -> dict[str, Any]:
    """Of each reader the ends of the data's ranges and of the weights'."""
    return {
        r.layer.module: {
            "data": _ends(_given(r, peaks, scaled)[pair.free]),
            "weights": _ends(_taken(r, weights, len(scaled))[pair.free]),
        }
        for r in pair.readers
    }


def equalize(program: Program, samples: Iterable[Mapping[str, Array]]) -> tuple[Program, dict[str, Any]]:
    """Even out the channels between two layers whose data and weights are far out of balance; no output changes.

    Pairs are found by following each layer's output channels through everything that a positive factor passes:
    ReLU, pools, means, moves of places, attention's values. Where a channel reaches anything else, it stays as it is.

    Args:
        samples: feeds by input name: ``SEEN`` of them tell the data's ranges, on ``PROVEN_ON`` of these both
            programs run.

    Returns:
        A new program that shares all tensors that did not change; and plain data: ``pairs`` with the smallest and
        largest range of the channels before and after by reader, ``relative_l2`` by output, ``held``, ``words`` for the
        user.
        If outputs differ by more than ``TOLERANCE``, or no sample fits an entry, the program is the given one.
    """
    pairs = _pairs(program)
    state = {k: v for entry in program.entries.values() for k, v in entry.graph.state_dict.items()}
    names = {layer.weight for p in pairs for layer in (p.source, *(r.layer for r in p.readers))}
    names |= {p.source.bias for p in pairs if p.source.bias}
    weights = {name: state[name].detach().clone() for name in names}
    peaks = _Peaks(program)
    runs = _looked_at(program, samples, peaks) if pairs else {}
    missing = sorted(set(program.entries) - set(runs)) if pairs else []
    totals = [torch.zeros(len(pair.free)) for pair in pairs]
    before = [_ranges(pair, weights, peaks, total) for pair, total in zip(pairs, totals, strict=True)]
    sweeps, moved = 0, bool(pairs)
    while moved and sweeps < SWEEPS:
        moved, sweeps = False, sweeps + 1
        for total, pair in zip(totals, pairs, strict=True):
            exponents = _exponents(pair, weights, peaks, total)
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
                "after": _ranges(pair, weights, peaks, total),
            }
            for pair, total, was in zip(pairs, totals, before, strict=True)
        ],
        "sweeps": sweeps,
        "relative_l2": {},
        "held": True,
        "words": ["no two layers can be equalized: what is between them takes no factor"] if not pairs else [],
    }
    if missing:
        words = f"ranges of channels were not evened out: {', '.join(missing)} did not run on the samples"
        return program, facts | {"held": False, "words": [words]}
    if not any(bool(total.any()) for total in totals):
        facts["words"] = facts["words"] or [f"{len(pairs)} pairs of layers are even as they are"]
        return program, facts
    even = with_weights(program, {k: v for k, v in weights.items() if not torch.equal(v, state[k])})
    facts["relative_l2"] = _distance(even, runs)
    worst = max(facts["relative_l2"].values(), default=math.inf)
    facts["held"] = worst <= TOLERANCE
    if not facts["held"]:
        facts["words"] = [f"equalization was undone: the outputs differ by {worst:.1e}"]
        return program, facts
    scaled, channels = sum(bool(t.any()) for t in totals), sum(int(t.count_nonzero()) for t in totals)
    facts["words"] = [
        f"{channels} channels scaled between {scaled} of {len(pairs)} pairs of layers; outputs differ by {worst:.1e}"
    ]
    return even, facts


#: Feeds and what a program made of them, by entry.
_Runs = dict[str, list[tuple[Mapping[str, Array], dict[str, Tensor]]]]


def _looked_at(program: Program, samples: Iterable[Mapping[str, Array]], peaks: _Peaks) -> _Runs:
    """Measure the data's ranges; the first ``PROVEN_ON`` runs of each entry that ran."""
    runs: _Runs = {}
    step = max(1, length_hint(samples, 0) // SEEN)
    for feeds in islice(samples, 0, SEEN * step, step):
        for name in entries_for(program, feeds):
            made, kept = run(program.entries[name], feeds, peaks.look), runs.setdefault(name, [])
            if len(kept) < PROVEN_ON:
                kept.append((feeds, made))
    return runs


def _distance(other: Program, runs: _Runs) -> dict[str, float]:
    """Largest relative L2 of each output from those runs, ``ENTRY.OUTPUT``."""
    found: dict[str, float] = {}
    for name, kept in runs.items():
        for feeds, made in kept:
            ours = run(other.entries[name], feeds)
            for output, value in made.items():
                numerics = compare(value.double().numpy(), ours[output].double().numpy())
                distance = numerics.relative_l2 if numerics.nonfinite == numerics.nonfinite_reference else math.inf
                key = f"{name}.{output}"
                found[key] = max(found.get(key, 0.0), distance)
    return found
