"""Lower: program -> a target's artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgeattn
from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core import tools
from edgeattn.core.numerics import Array
from edgeattn.lint import Finding, gate
from edgeattn.pipeline.context import Context, Result
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan, Tensor


def run(context: Context) -> dict[str, Any]:
    """Write the artifact's files.

    Raises:
        CheckFailed: lint found an error, in the program before anything is converted, or in the artifact.
            ConversionFailed: it found operations that the converter has no form for.
    """
    gate([Finding(**finding) for finding in context.results["lint"].facts["findings"]], converting=True)
    job = context.job
    target = targets.get(job.target)
    metadata = {
        "edgeattn": edgeattn.__version__,
        "recipe": job.resolved.recipe.name,
        "recipe_sha256": job.resolved.sha256,
        "weights": "random" if job.resolved.random_weights else f"sha256:{job.resolved.checkpoint_sha256}",
        **{
            f"tool.{name}": version or "" for name, version in tools.versions(target.lower_tools(job.precision)).items()
        },
    }
    by_entry = _step_samples(context)
    samples = [] if by_entry else [feeds for feeds, _ in context.golden()]
    recipe = job.resolved.recipe
    plan = LowerPlan(
        job.precision,
        samples,
        metadata | ({"author": recipe.author} if recipe.author else {}),
        job.runtime,
        job.layout,
        job.settled,
        recipe.preprocess,
        recipe.labels,
        job.strict,
        job.quant,
        samples,
        by_entry,
        None if job.resolved.tokenizer is None else Path(job.resolved.tokenizer),
        devices.resolve(job.device) if job.device else None,
    )
    program = context.value("capture")
    if job.quant.quantizes:
        from edgeattn.quant.flow import read_from_kept

        quantized = context.value("quantize")
        program = quantized.program
        quant = replace(job.quant, float_data=read_from_kept(program, job.quant))
        plan = replace(plan, quant=quant, calibration=quantized.samples)
    artifact = target.lower(program, plan, context.out)
    gate(list(artifact.findings))
    return {
        "entries": {
            name: {
                "file": entry.file,
                "inputs": [vars(t) | {"shape": list(t.shape)} for t in entry.inputs],
                "outputs": [vars(t) | {"shape": list(t.shape)} for t in entry.outputs],
            }
            for name, entry in artifact.entries.items()
        },
        "artifact": dict(artifact.facts),
        "findings": [finding.as_dict() for finding in artifact.findings],
    }


def _step_samples(context: Context) -> dict[str, list[Mapping[str, Array]]]:
    """Feeds of a decoder's entries; {} for other models."""
    found: dict[str, list[Mapping[str, Array]]] = {}
    if context.job.steps:
        from edgeattn.pipeline.decoding.samples import Text, golden

        for sample in golden(Text.load(context.results["reference"].folder), context.job.steps):
            found.setdefault(sample.entry, []).append(sample.feeds)
    return found


def entries_of(facts: Mapping[str, Any]) -> dict[str, ArtifactEntry]:
    """The artifact's entries as ``run`` recorded them."""
    return {
        name: ArtifactEntry(
            entry["file"],
            tuple(map(_tensor, entry["inputs"])),
            tuple(map(_tensor, entry["outputs"])),
        )
        for name, entry in facts["entries"].items()
    }


def _tensor(fields: Mapping[str, Any]) -> Tensor:
    pixels = tuple((factor, offset) for factor, offset in fields["pixels"])
    dynamic = tuple(map(tuple, fields["dynamic"]))
    return Tensor(**{**fields, "shape": tuple(fields["shape"]), "pixels": pixels, "dynamic": dynamic})


def artifact_of(result: Result, precision: str) -> Artifact:
    """The artifact that ``run`` wrote."""
    return Artifact(result.folder, precision, entries_of(result.facts), result.facts["artifact"])
