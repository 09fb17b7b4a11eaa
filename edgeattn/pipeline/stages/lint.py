"""Lint: what is known to go wrong or slow on the target. Errors among it end the export at its next stage."""

from __future__ import annotations

from typing import Any

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.pipeline.context import Context


def run(context: Context) -> dict[str, Any]:
    """Fact: the findings."""
    job = context.job
    device = devices.resolve(job.device) if job.device else None
    findings = targets.get(job.target).lint(context.value("capture"), device)
    return {"findings": [finding.as_dict() for finding in findings]}
