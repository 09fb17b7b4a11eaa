"""Bias correction: what rounded weights add to a layer's outputs on average is taken from its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.2,
with expectations over samples: b - E[(Wq - W) x], x being what the layer reads in floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, fx

from edgeattn.capture import Program
from edgeattn.core.numerics import Array
from edgeattn.quant.plan import QuantPlan
from edgeattn.quant.rounding import rounded
from edgeattn.quant.weighted import Layer, arguments, entries_for, layers, run, with_weights

#: Errors are measured on so many feeds, spread over all, and what correcting gains on as many others. Twice the number,
#: or eight times, gained nothing on fmvit-digits.
USED = 32


def rounded_weights(program: Program, plan: QuantPlan) -> dict[str, Tensor]:
    """The weights that the plan stores in integers, as the floats that these stand for, by name in the state dict."""
    made = {}
    for name, own in layers(program).items():
        state = program.entries[name].graph.state_dict
        for weight, layer in own.items():
            scheme = plan.scheme(layer.module)
            if not scheme.floats and weight not in made:
                value = state[weight].detach()
                scheme = scheme.for_kernel(value.shape) if layer.spatial else scheme
                rows = layer.rows(value).float().numpy()
                made[weight] = layer.of_rows(torch.from_numpy(rounded(rows, scheme.weights, scheme.group)), value)
    return made


def _some(samples: Iterable[Mapping[str, Array]], others: bool = False) -> Iterator[Mapping[str, Array]]:
    """At most ``USED`` feeds; ``others`` are those in between, or the same one where there is no other."""
    step = max(1, length_hint(samples, 0) // (2 * USED))
    chosen = islice(samples, 0, 2 * USED * step, step)
    for i, feeds in enumerate(chosen):
        if i % 2 == others or (others and i == 0 and length_hint(samples, 2) == 1):
            yield feeds


class _Errors:
    """Mean error of each output channel of layers, over samples and places."""

    def __init__(self, watched: Mapping[fx.Node, Layer], changes: Mapping[str, Tensor]) -> None:
        self.watched, self.changes = watched, changes
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def look(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> None:
        """Add what the change of a layer's weight makes of the data that it is about to read."""
        layer = self.watched.get(node)
        if layer is None:
            return
        made = _apply(layer, value(layer.data), self.changes[layer.weight])
        channels = made.movedim(made.ndim - 1 - layer.spatial, 0).flatten(1).double()
        self.sums[layer.bias] = self.sums.get(layer.bias, torch.zeros(())) + channels.sum(dim=1)
        self.counts[layer.bias] = self.counts.get(layer.bias, 0) + channels.shape[1]

    def means(self) -> dict[str, Tensor]:
        """(outputs,) by the name of the bias."""
        return {bias: total / self.counts[bias] for bias, total in self.sums.items()}


def _apply(layer: Layer, data: Tensor, weight: Tensor) -> Tensor:
    """The layer's operation with another weight and without bias."""
    if not layer.spatial:
        return data @ layer.rows(weight).t()
    function: Any = layer.node.target
    made: Tensor = function(**(arguments(layer.node) | {"input": data, "weight": weight, "bias": None}))
    return made


def _energy(values: Iterable[Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in values)


def _relative_l2(
    program: Program, others: Mapping[str, Program], samples: Iterable[Mapping[str, Array]]
) -> dict[str, float]:
    """Root of the summed squared error over the summed squares of all outputs, of each other program."""
    energy, errors = 0.0, dict.fromkeys(others, 0.0)
    for feeds in samples:
        for name in entries_for(program, feeds):
            wanted = run(program.entries[name], feeds)
            energy += _energy(wanted.values())
            for key, other in others.items():
                made = run(other.entries[name], feeds)
                errors[key] += _energy(made[output] - value for output, value in wanted.items())
    return {key: math.sqrt(error / energy) if energy else math.inf for key, error in errors.items()}


def correct(
    program: Program, plan: QuantPlan, samples: Iterable[Mapping[str, Array]]
) -> tuple[Program, dict[str, Any]]:
    """Change biases so that rounded weights err by nothing on average.

    Args:
        samples: feeds by input name, gone through twice: some for the mean errors, others for what correcting gains.

    Returns:
        A new program in which nothing but biases differ; and plain data: ``corrected`` modules, ``without_bias`` ones,
        which are left alone, ``relative_l2`` of the outputs with rounded weights ``before`` and ``after``, ``held``,
        and ``words`` for the user. If the error does not get smaller, the program is the given one.
    """
    made = rounded_weights(program, plan)
    found = {n: {w: layer for w, layer in own.items() if w in made} for n, own in layers(program).items()}
    modules = {w: layer.module for own in found.values() for w, layer in own.items()}
    biased = {w: layer.bias for own in found.values() for w, layer in own.items() if layer.bias}
    facts: dict[str, Any] = {
        "corrected": [],
        "without_bias": [modules[w] for w in modules if w not in biased],
        "relative_l2": {},
        "held": True,
        "words": ["no bias to correct"],
    }
    if not biased:
        return program, facts
    state = {k: v.detach() for entry in program.entries.values() for k, v in entry.graph.state_dict.items()}
    changes = {w: made[w] - state[w] for w in biased}
    errors = _Errors({layer.node: layer for own in found.values() for w, layer in own.items() if layer.bias}, changes)
    for feeds in _some(samples):
        for name in entries_for(program, feeds):
            run(program.entries[name], feeds, errors.look)
    if not errors.sums:
        return program, facts | {"held": False, "words": ["biases were not corrected: no sample fits the model"]}
    biases = {bias: (state[bias].double() - mean).to(state[bias].dtype) for bias, mean in errors.means().items()}
    others = {"before": with_weights(program, made), "after": with_weights(program, made | biases)}
    facts["relative_l2"] = _relative_l2(program, others, _some(samples, others=True))
    before, after = facts["relative_l2"]["before"], facts["relative_l2"]["after"]
    facts["held"] = after < before
    if not facts["held"]:
        facts["words"] = [f"bias correction was undone: the error would go from {before:.2e} to {after:.2e}"]
        return program, facts
    facts["corrected"] = [modules[w] for w, bias in biased.items() if bias in biases]
    facts["words"] = [
        f"biases of {len(biases)} modules corrected: the error of rounded weights goes from {before:.2e} to {after:.2e}"
    ]
    return with_weights(program, biases), facts
