"""Lint: what is known to go wrong or slow on the target, said before anything is converted."""

from __future__ import annotations

from typing import Any

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.lint import gate
from edgeattn.pipeline.context import Context


def run(context: Context) -> dict[str, Any]:
    """Fact: the findings.

    Raises:
        CheckFailed: one of them is an error.
    """
    job = context.job
    device = devices.resolve(job.device) if job.device else None
    findings = targets.get(job.target).lint(context.value("capture"), device)
    gate(findings)
    return {"findings": [finding.as_dict() for finding in findings]}
