"""Capture: deploy form -> exported program."""

from __future__ import annotations

from typing import Any

import torch

from edgeattn.capture import Program, capture
from edgeattn.core.specs import step_of
from edgeattn.pipeline.context import Context


def run(context: Context) -> dict[str, Any]:
    """Save the program, and leave it in memory."""
    dynamic, samples = context.job.dynamic, context.golden()
    # torch.export takes a 1 in its example for a constant; the last sample of a dynamic job has the largest shape.
    ones = any(ends[1] == step_of(ends) for axes in dynamic.values() for ends in axes.values())
    feeds, _ = samples[-1 if ones else 0]
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    outputs = tuple(context.results["reference"].facts["outputs"])
    program = capture(context.value("reparameterize"), inputs, outputs, dynamic=dynamic)
    context.values["capture"] = program
    return {"entries": program.save(context.out)}


def revive(context: Context) -> Program:
    """Load the cached program."""
    result = context.results["capture"]
    return Program.load(result.folder, result.facts["entries"])
