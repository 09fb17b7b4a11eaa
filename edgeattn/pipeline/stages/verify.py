"""Verify: the artifact against the training-form float32 reference, on golden and on held-out samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from edgeattn import targets
from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array, Numerics, compare, lost_slices
from edgeattn.core.specs import batches
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.diverge import first_divergence, own_rounding
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.stages.lower import artifact_of
from edgeattn.targets.base import Runtime, Tensor
from edgeattn.targets.feeds import own_feeds

#: How many held-out samples more or fewer than the reference an artifact may get right.
SAMPLES_OFF = 1
#: The same of quantized artifacts, as a share of the samples.
SHARE_OFF = {"w8": 0.005, "w8a8": 0.01, "fp8": 0.01, "w4": 0.02}

#: How an artifact's runtime computes by itself.
AS_RUN = "as run"

#: Random weights amplify rounding. What is more than so many times as far off as a simulation is the target's doing.
BEYOND_SIMULATED = 1.5


def _rounded(runtime: Runtime, feeds: dict[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
    """The outputs with every tensor inside stored in the artifact's own dtype."""
    return {item.name: item.value for item in runtime.trace("main", feeds) if item.name in outputs}


def _task(context: Context, runtime: Runtime, inputs: Sequence[Tensor]) -> dict[str, Any] | None:
    reference = context.results["reference"]
    if "heldout" not in reference.facts:
        return None
    with np.load(reference.folder / "heldout.npz", allow_pickle=False) as data:
        x, y, logits = data["x"], data["y"], data["logits"]
    spec = inputs[0]
    context.say(f"scoring {len(y)} held-out samples")
    first = reference.facts["outputs"][0]
    parts = batches(x, spec.shape[0])
    ours = np.concatenate([runtime.run("main", own_feeds(inputs, {spec.name: part}))[first] for part in parts])
    ours = ours[: len(y)]
    correct = int((ours.argmax(-1) == y).sum())
    expected = reference.facts["heldout"]["correct"]
    return {
        "metric": "top-1 accuracy",
        "samples": len(y),
        "reference_correct": expected,
        "artifact_correct": correct,
        "reference_accuracy": expected / len(y),
        "artifact_accuracy": correct / len(y),
        "top1_agreement": float((ours.argmax(-1) == logits.argmax(-1)).mean()),
    }


@dataclass(frozen=True)
class _Measured:
    """One output of one golden sample."""

    sample: int
    how: str
    output: str
    reference: Array
    value: Array

    @cached_property
    def numerics(self) -> Numerics:
        return compare(self.reference, self.value)


def _joined(values: Iterable[Array]) -> Array:
    return np.concatenate([value.ravel() for value in values])


def _failed(measured: Sequence[_Measured], bounds: tuple[float, float]) -> list[tuple[int, str]]:
    """Samples whose numbers do not hold, each with a sentence; outputs that hold alone but not together come last.

    Args:
        bounds: largest relative L2 of an output of one sample, and of all samples together.
    """
    failed = [
        (
            m.sample,
            f"{m.output} of golden sample {m.sample} ({m.how}): relative L2 {m.numerics.relative_l2:.3g}, "
            f"{m.numerics.nonfinite} values not finite",
        )
        for m in measured
        if not m.numerics.holds(bounds[0])
    ]
    if failed:
        return failed
    for output, how in dict.fromkeys((m.output, m.how) for m in measured):
        group = [m for m in measured if (m.output, m.how) == (output, how)]
        together = compare(_joined(m.reference for m in group), _joined(m.value for m in group))
        if not together.holds(bounds[1]):
            worst = max(group, key=lambda m: m.numerics.relative_l2)
            words = f"{output} of all {len(group)} golden samples together ({how})"
            failed.append((worst.sample, f"{words}: relative L2 {together.relative_l2:.3g}"))
    return failed


def _fail(
    context: Context,
    runtime: Runtime,
    inputs: Sequence[Tensor],
    failed: Sequence[tuple[int, str]],
    bounds: tuple[float, float],
) -> NoReturn:
    context.say("the numbers do not hold; looking for the module at which they diverge first")
    precision = context.job.precision
    fix = "try --precision fp32" if precision != "fp32" else "compare that module's operations with the target's"
    feeds, reference = context.golden()[failed[0][0]]
    together = f", and {bounds[1]:g} for all samples together" if bounds[1] < bounds[0] else ""
    raise CheckFailed(
        "the artifact's numbers do not hold",
        value=failed[0][1],
        where=first_divergence(context, runtime, inputs, feeds),
        why=f"tolerance is a relative L2 of {bounds[0]:g} for {precision}{together}",
        fix=fix,
        details=[*(sentence for _, sentence in failed[1:]), *own_rounding(context, feeds, reference)],
    )


def _simulated(context: Context) -> float:
    """How far a quantized model of random weights is off before any target has it; 0 for all others.

    Largest relative L2 over golden samples and outputs of the deploy form with what the plan rounds rounded in PyTorch.
    """
    job = context.job
    # A guest's factory may have put trained weights in by itself.
    surely = re.split(r"[.:]", job.resolved.recipe.model.factory)[0] in ("edgeattn", "timm")
    if not (surely and job.resolved.random_weights and job.quant.quantizes):
        return 0.0
    import torch

    from edgeattn.capture import run_eager
    from edgeattn.quant.simulate import Simulation

    model, golden = context.value("reparameterize"), context.golden()
    simulation = Simulation(model, job.quant, [feeds for feeds, _ in golden])
    worst = 0.0
    with simulation.rounded(simulation.sites):
        for feeds, reference in golden:
            outputs = run_eager(model, {k: torch.from_numpy(v.copy()) for k, v in feeds.items()}, tuple(reference))
            pairs = ((reference[k], outputs[k].numpy()) for k in reference if reference[k].dtype.kind == "f")
            worst = max([worst, *(compare(r, y).relative_l2 for r, y in pairs)])
    return worst


def _lost(reference: dict[str, Array], outputs: dict[str, Array]) -> Iterator[str]:
    """A sentence for every output of which parts are lost, though as a whole it holds."""
    for name, value in outputs.items():
        if value.dtype.kind == "f":
            for axis, places in lost_slices(reference[name], value).items():
                yield (
                    f"{len(places)} of {value.shape[axis]} slices along axis {axis} of output {name} hold more error "
                    f"than signal (the first is {places[0]}): if they mean something of their own, as scores beside "
                    "boxes do, keep the module that gives them in floats (--keep)"
                )


def run(context: Context) -> dict[str, Any]:
    """Facts: tolerance, numerics by sample and output, task score.

    Raises:
        CheckFailed: an output is further from the reference than the tolerance or not finite (naming the module at
            which they diverge first), or the artifact gets more samples more or fewer right than it may.
    """
    if context.job.steps:
        from edgeattn.pipeline.decoding import verify

        return verify.run(context)
    job = context.job
    target = targets.get(job.target)
    artifact = artifact_of(context.results["lower"], job.precision)
    runtime, inputs = target.open(artifact), artifact.entries["main"].inputs
    bounds = target.tolerance(job.precision), target.tolerance_together(job.precision)
    if job.tolerance is not None:
        bounds = job.tolerance, job.tolerance
    warnings: dict[str, None] = {}
    measured: list[_Measured] = []
    for i, (sample_feeds, reference) in enumerate(context.golden()):
        feeds = own_feeds(inputs, sample_feeds)
        runs = {AS_RUN: runtime.run("main", feeds)}
        if job.precision != "fp32" and target.half_activations:
            runs["every tensor rounded"] = _rounded(runtime, feeds, reference)
        for how, outputs in runs.items():
            # An integer output is not among the traced floats; as run every output must be there.
            compared = [k for k in reference if k in outputs or how == AS_RUN]
            measured += [_Measured(i, how, k, reference[k], outputs[k]) for k in compared]
            if job.quant.quantizes:
                warnings |= dict.fromkeys(_lost(reference, {k: outputs[k] for k in compared}))
    failed = _failed(measured, bounds)
    if failed and job.tolerance is None and (simulated := _simulated(context) * BEYOND_SIMULATED) > bounds[1]:
        bounds = (max(bounds[0], simulated), simulated)
        failed = _failed(measured, bounds)
        warnings[
            f"the weights are random, and amplify rounding: rounding alone, simulated in PyTorch, is "
            f"{simulated / BEYOND_SIMULATED:.2g} off; the artifact was held to {BEYOND_SIMULATED:g} times that. It "
            "says nothing of a trained model"
        ] = None
    if failed:
        _fail(context, runtime, inputs, failed, bounds)
    numerics: dict[str, dict[str, Any]] = {}
    for item in measured:
        numerics.setdefault(f"main-{item.sample:03} {item.how}", {})[item.output] = item.numerics.as_dict()
    task = _task(context, runtime, inputs)
    if task:
        _check_accuracy(job, task)
    return {"tolerance": bounds[0], "numerics": numerics, "task": task, "warnings": list(warnings)}


def _check_accuracy(job: Job, task: dict[str, Any]) -> None:
    """Raises CheckFailed where more held-out samples than allowed come out otherwise than the reference's."""
    off = task["artifact_correct"] - task["reference_correct"]
    allowed = max(SAMPLES_OFF, int(SHARE_OFF.get(job.precision, 0.0) * task["samples"]))
    if job.accuracy_drop is not None:
        allowed, off = int(job.accuracy_drop * task["samples"]), min(off, 0)
    if abs(off) > allowed:
        words = "fewer" if job.accuracy_drop is not None else "more or fewer"
        raise CheckFailed(
            "the artifact's accuracy differs from the model's",
            value=f"{task['artifact_correct']} of {task['samples']} right",
            why=f"the reference gets {task['reference_correct']} right; allowed are {allowed} {words}",
            fix="try --precision fp32" if job.precision != "fp32" else "look at the numerics of single samples",
        )
