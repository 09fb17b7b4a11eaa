"""Raspberry Pi: both the ONNX and the TFLite artifact in one bundle, the faster in front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeattn import targets
from edgeattn.core.errors import UsageError
from edgeattn.targets.base import Artifact, Availability, LowerPlan, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device


class RpiTarget(Target):
    """Stands for ``onnx`` and ``tflite`` on 64-bit Raspberry Pi OS."""

    name: ClassVar[str] = "rpi"
    runtime_tools: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ("onnx", "tflite")

    def availability(self) -> Availability:
        """Found when both parts are."""
        found = {part: targets.get(part).availability() for part in self.parts}
        missing = [one for one in found.values() if not one.found]
        detail = "; ".join(f"{part}: {one.detail}" for part, one in found.items())
        return missing[0] if missing else Availability(True, detail)

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """What both parts hold."""
        first, *others = (targets.get(part).precisions(device) for part in self.parts)
        return tuple(name for name in first if all(name in other for other in others))

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """Those of the parts."""
        return tuple(tool for part in self.parts for tool in targets.get(part).lower_tools(precision))

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """Not done here: each part is lowered as a target of its own."""
        raise UsageError("target rpi is lowered part by part", why=f"it stands for {', '.join(self.parts)}")

    def open(self, artifact: Artifact) -> Runtime:
        """Not done here: each part is opened as a target of its own."""
        raise UsageError("target rpi is opened part by part", why=f"it stands for {', '.join(self.parts)}")
