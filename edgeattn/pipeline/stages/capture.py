"""Capture: deploy form -> exported program."""

from __future__ import annotations

from typing import Any

import torch

from edgeattn.capture import Program, capture
from edgeattn.pipeline.context import Context


def run(context: Context) -> dict[str, Any]:
    """Save the program, and leave it in memory."""
    feeds, _ = context.golden()[0]
    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    outputs = tuple(context.results["reference"].facts["outputs"])
    program = capture(context.value("reparameterize"), inputs, outputs)
    context.values["capture"] = program
    return {"entries": program.save(context.out)}


def revive(context: Context) -> Program:
    """Load the cached program."""
    result = context.results["capture"]
    return Program.load(result.folder, result.facts["entries"])
