"""Verify: the artifact against the training-form float32 reference, on golden and on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeattn import targets
from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array, Numerics, compare
from edgeattn.core.specs import batches
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.diverge import first_divergence, own_rounding
from edgeattn.pipeline.stages.lower import artifact_of
from edgeattn.targets.base import Runtime, Tensor, own_feeds

#: How many held-out samples more or fewer than the reference an artifact may get right.
SAMPLES_OFF = 1
#: The same where activations are quantized, as a share of the samples: one percentage point.
SHARE_OFF = {"w8a8": 0.01, "fp8": 0.01}


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


def _fail(
    context: Context,
    runtime: Runtime,
    inputs: Sequence[Tensor],
    feeds: dict[str, Array],
    reference: dict[str, Array],
    failed: list[str],
    tolerance: float,
) -> None:
    context.say("the numbers do not hold; looking for the module at which they diverge first")
    precision = context.job.precision
    fix = "try --precision fp32" if precision != "fp32" else "compare that module's operations with the target's"
    raise CheckFailed(
        "the artifact's numbers do not hold",
        value=failed[0],
        where=first_divergence(context, runtime, inputs, feeds),
        why=f"tolerance is a relative L2 of {tolerance:g} for {precision}",
        fix=fix,
        details=[*failed[1:], *own_rounding(context, feeds, reference)],
    )


def run(context: Context) -> dict[str, Any]:
    """Facts: tolerance, numerics by sample and output, task score.

    Raises:
        CheckFailed: an output is further from the reference than the tolerance or not finite (naming the module at
            which they diverge first), or the artifact gets more samples more or fewer right than it may.
    """
    job = context.job
    target = targets.get(job.target)
    artifact = artifact_of(context.results["lower"], job.precision)
    runtime, inputs = target.open(artifact), artifact.entries["main"].inputs
    tolerance = target.tolerance(job.precision)
    numerics: dict[str, dict[str, Any]] = {}
    for i, (sample_feeds, reference) in enumerate(context.golden()):
        feeds = own_feeds(inputs, sample_feeds)
        runs = {"as run": runtime.run("main", feeds)}
        if job.precision != "fp32" and target.half_activations:
            runs["every tensor rounded"] = _rounded(runtime, feeds, reference)
        for how, outputs in runs.items():
            # An integer output is not among the traced floats; as run every output must be there.
            compared = [k for k in reference if k in outputs or how == "as run"]
            sample: dict[str, Numerics] = {k: compare(reference[k], outputs[k]) for k in compared}
            numerics[f"main-{i:03} {how}"] = {k: n.as_dict() for k, n in sample.items()}
            failed = [
                f"{k} of golden sample {i} ({how}): relative L2 {n.relative_l2:.3g}, {n.nonfinite} values not finite"
                for k, n in sample.items()
                if not n.holds(tolerance)
            ]
            if failed:
                _fail(context, runtime, inputs, sample_feeds, reference, failed, tolerance)
    task = _task(context, runtime, inputs)
    off = max(SAMPLES_OFF, int(SHARE_OFF.get(job.precision, 0.0) * task["samples"])) if task else 0
    if task and abs(task["artifact_correct"] - task["reference_correct"]) > off:
        raise CheckFailed(
            "the artifact's accuracy differs from the model's",
            value=f"{task['artifact_correct']} of {task['samples']} right",
            why=f"the reference gets {task['reference_correct']} right; allowed are {off} more or fewer",
            fix="try --precision fp32" if job.precision != "fp32" else "look at the numerics of single samples",
        )
    return {"tolerance": tolerance, "numerics": numerics, "task": task}
