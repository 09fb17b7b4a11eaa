"""Lint: what is known to go wrong or slow on the target. Errors among it end the export at its next stage."""

from __future__ import annotations

from typing import Any

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core.specs import shape_texts
from edgeattn.lint import Finding
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.job import Job


def _fixed(job: Job) -> list[Finding]:
    """A note where the recipe lets dimensions vary and the target does not."""
    specs = [spec for spec in job.resolved.recipe.specs() if spec.dynamic]
    if not specs or targets.get(job.target).dynamic:
        return []
    texts = [
        f"{s.name}: {'x'.join(shape_texts(s.shape, s.dynamic))} became {'x'.join(map(str, s.shape))}" for s in specs
    ]
    return [
        Finding(
            "fixed-shape",
            "note",
            "",
            f"target {job.target} takes one shape; the artifact was made for the recipe's own",
            "; ".join(texts),
            "export once for each shape that is needed, or take a target with dynamic shapes",
        )
    ]


def run(context: Context) -> dict[str, Any]:
    """Fact: the findings."""
    job = context.job
    device = devices.resolve(job.device) if job.device else None
    findings = targets.get(job.target).lint(context.value("capture"), device)
    return {"findings": [finding.as_dict() for finding in (*_fixed(job), *findings)]}
