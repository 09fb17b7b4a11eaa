"""Quantize: what the ranges of activations are measured on, and the program made ready for small numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeattn.capture import Program
from edgeattn.core.numerics import Array
from edgeattn.pipeline.context import Context


@dataclass(frozen=True)
class Quantized:
    """The program with its ranges evened out, and calibration samples that can be gone through again and again."""

    program: Program
    samples: Iterable[Mapping[str, Array]]


def run(context: Context) -> dict[str, Any]:
    """Check the calibration samples."""
    samples = [feeds for feeds, _ in context.golden()]
    context.values["quantize"] = Quantized(context.value("capture"), samples)
    return {"calibration": {"source": "golden samples", "samples": len(samples)}}
