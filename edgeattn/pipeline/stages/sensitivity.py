"""Sensitivity, in the worker: no stage of an export, but it starts from their results as one does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeattn import targets
from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.stages.quantize import Quantized
from edgeattn.pipeline.stages.verify import SAMPLES_OFF, SHARE_OFF
from edgeattn.quant.batching import takes_several
from edgeattn.quant.sensitivity import Error, Journal, fewest, sensitivity
from edgeattn.quant.simulate import Operations, Simulation, Style
from edgeattn.reparam.trace import duplicate

#: Samples in a forward, where the model takes as many, and so many labelled ones at most that the advice is judged on.
BATCH, JUDGED = 16, 256


@dataclass
class _Samples:
    """Feeds, the labels of each where they have some, and where they are from in words."""

    words: str
    feeds: list[Mapping[str, Array]]
    labels: list[Array] = field(default_factory=list)


def _heldout(context: Context, model: nn.Module, count: int) -> _Samples:
    """Of the labelled held-out samples ``count``, evenly spaced; whole batches of them."""
    with np.load(context.results["reference"].folder / "heldout.npz", allow_pickle=False) as data:
        x, y = data["x"], data["y"]
    spec = context.value("build").specs[0]
    chosen = np.unique(np.linspace(0, len(y) - 1, min(count, len(y))).astype(int))
    x, y = x[chosen], y[chosen]
    own = spec.shape[0]
    two = [{spec.name: x[:own]}, {spec.name: x[own : 2 * own]}]
    size = BATCH if len(x) >= BATCH > own and takes_several(model, two, [spec.name]) else own
    starts = range(0, max(len(x) - size, 0) + 1, size)
    rest = len(x) % size if size != own else 0
    ends = [(s, s + size) for s in starts] + ([(len(x) - rest, len(x))] if rest else [])
    feeds: list[Mapping[str, Array]] = [{spec.name: x[a:b]} for a, b in ends]
    return _Samples(f"{ends[-1][1]} held-out samples", feeds, [y[a:b] for a, b in ends])


def _samples(context: Context, model: nn.Module, quantized: Quantized, count: int) -> _Samples:
    """Held-out samples with labels, else those of the calibration, among them golden ones where there are no others."""
    if "heldout" in context.results["reference"].facts:
        return _heldout(context, model, count)
    spec = context.value("build").specs[0]
    batch = max(1, spec.shape[0] if spec.shape else 1)
    feeds = list(itertools.islice(quantized.samples, math.ceil(count / batch)))
    source = context.results["quantize"].facts["calibration"]["source"]
    return _Samples(f"{len(feeds) * batch} of the calibration's samples ({source})", feeds)


def _allowed(precision: str, samples: int) -> int:
    """How many samples fewer than the reference a model may get right, as ``verify`` has it."""
    return max(SAMPLES_OFF, int(SHARE_OFF.get(precision, 0.0) * samples))


def _prepared(model: nn.Module, quantized: Quantized) -> tuple[nn.Module, int]:
    """The model as an export quantizes it, its ranges evened out; and how many of its tensors differ."""
    state = {k: v for entry in quantized.program.entries.values() for k, v in entry.graph.state_dict.items()}
    changed = {k: state[k] for k, v in model.state_dict().items() if k in state and not torch.equal(v, state[k])}
    if not changed:
        return model, 0
    made = duplicate(model)
    made.load_state_dict(changed, strict=False)
    return made, len(changed)


def run(context: Context) -> dict[str, Any]:
    """Facts: rows, the worst first, and what is left of the error where more and more of them are kept.

    Rows are of the deploy form as it is, so that a module is named that only evening out ranges would mend; what is
    left of the error is that of the model as an export quantizes it.

    What is asked for is in ``context.results["asked"]``: ``on`` (samples), ``what`` and ``journal``.

    Raises:
        CheckFailed: the plan quantizes nothing.
    """
    asked = context.results["asked"].facts
    job, say = context.job, context.say
    model, quantized = context.value("reparameterize"), context.value("quantize")
    journal = Journal(Path(asked["journal"]))
    samples = _samples(context, model, quantized, asked["on"])
    say("measuring ranges")
    asymmetric = targets.get(job.target).asymmetric
    style = Style(zero_point=asymmetric, outputs=asymmetric)
    operations = asked["what"] == "operations"
    simulation = (Operations if operations else Simulation)(model, job.quant, quantized.samples, style)
    if not simulation.units:
        raise CheckFailed(
            "there is nothing to quantize",
            value=job.precision,
            why="no module with weights is left to it" if not operations else "the model has no such operations",
            fix="keep fewer modules in floats" if not operations else None,
        )
    known = len({unit.name for unit in simulation.units} & set(journal.known))
    if known:
        say(f"goes on where it stopped: {known} of {len(simulation.units)} are measured")
    rows = sensitivity(simulation, samples.feeds, samples.labels, journal, say)
    tolerance = targets.get(job.target).tolerance_together(job.precision)
    judged = _samples(context, model, quantized, max(JUDGED, asked["on"])) if samples.labels else samples

    def holds(error: Error) -> bool:
        lost = error.reference_correct - error.correct
        return error.finite and error.relative_l2 <= tolerance and lost <= _allowed(job.precision, error.samples)

    prepared, evened = (model, 0) if operations else _prepared(model, quantized)
    whole = simulation if not evened else Simulation(prepared, job.quant, quantized.samples, style)
    kept = [] if operations else fewest(whole, rows, holds, judged.feeds, judged.labels, journal, say)
    return {
        "rows": [row.as_dict() for row in rows],
        "kept": [{"count": step.count, "error": step.error.as_dict(), "holds": holds(step.error)} for step in kept],
        "tolerance": tolerance,
        "samples": samples.words,
        "judged": judged.words,
        "known": known,
        "evened": evened,
    }
