"""Capture: deploy form -> exported program."""

from __future__ import annotations

from typing import Any

import torch

from edgeattn.capture import Program, capture
from edgeattn.capture.decoder import caches_of, capture_decoder
from edgeattn.core.specs import step_of
from edgeattn.pipeline.context import Context


def run(context: Context) -> dict[str, Any]:
    """Save the program, and leave it in memory."""
    if context.job.steps:
        return _steps(context)
    dynamic, samples = context.job.dynamic, context.golden()
    # torch.export takes a 1 in its example for a constant; the last sample of a dynamic job has the largest shape.
    ones = any(ends[1] == step_of(ends) for axes in dynamic.values() for ends in axes.values())
    feeds, _ = samples[-1 if ones else 0]
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    outputs = tuple(context.results["reference"].facts["outputs"])
    program = capture(context.value("reparameterize"), inputs, outputs, dynamic=dynamic)
    context.values["capture"] = program
    return {"entries": program.save(context.out)}


def _steps(context: Context) -> dict[str, Any]:
    """A decoder's entries stay in memory: their files would hold the weights again, each of them."""
    recipe = context.job.resolved.recipe
    assert recipe.decoder is not None
    model = context.value("reparameterize")
    program = capture_decoder(model, caches_of(model, recipe.decoder.context), context.job.steps)
    context.values["capture"] = program
    return {"entries": None}


def revive(context: Context) -> Program:
    """Load the cached program; a decoder's is captured again."""
    result = context.results["capture"]
    if result.facts["entries"] is None:
        _steps(context)
        program: Program = context.values["capture"]
        return program
    return Program.load(result.folder, result.facts["entries"])
