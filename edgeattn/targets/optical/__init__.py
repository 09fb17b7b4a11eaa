"""Optics: convolutions and linear layers on a simulated 4f correlator, the rest by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgeattn import device as devices
from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.targets.base import Artifact, Availability, LowerPlan, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device
    from edgeattn.lint import Finding

#: The device that an export is for where none is named: what the literature assumes.
DEFAULT = "optical-4f-4k-2mhz"


class OpticalTarget(Target):
    """Lowers to planes, masks and frames, and runs them on ideal ones; ``edgeattn optics`` has those of a device."""

    name: ClassVar[str] = "optical"
    runtime_tools: ClassVar[tuple[str, ...]] = ("edgeattn", "torch", "onnxruntime", "numpy")
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "whole"
    tolerances: ClassVar[Mapping[str, float]] = {"fp32": 1e-4}
    unproven: ClassVar[str] = (
        "computed on ideal planes, simulated: no optical hardware has run it; what noise, bits and misalignment of a "
        "device do to it, edgeattn optics show simulates"
    )
    #: Products with whole maps are what optics are good at: a shared convolution stays one.
    leaves: ClassVar[tuple[str, ...]] = ("shared_conv",)

    def availability(self) -> Availability:
        """Found when torch and the ONNX packages are installed."""
        found: Mapping[str, str | None] = tools.versions(("torch", "onnx", "onnxscript", "onnxruntime"))
        missing = [name for name, version in found.items() if version is None]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return Availability(True, f"simulated; torch {found['torch']}, onnxruntime {found['onnxruntime']}")

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """Ideal planes have no precision of their own; modulators' and cameras' bits are effects of a device."""
        return ("fp32",)

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """The exporter's packages, and what carries the plans out."""
        return ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")

    def of_device(self, device: Device | None) -> dict[str, Any]:
        """Name and optics."""
        place = device or devices.resolve(DEFAULT)
        return {"name": place.name, "optics": place.optics.model_dump(mode="json") if place.optics else None}

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """See ``Target.lower``; a folder for each entry."""
        from edgeattn.targets.optical.lower import lower

        return lower(program, plan, plan.device or devices.resolve(DEFAULT), out)

    def lint(self, program: Program, device: Device | None) -> list[Finding]:
        """See ``Target.lint``; the rules are in ``lint.toml``."""
        from edgeattn.targets.optical.lint import lint

        return lint(program, device or devices.resolve(DEFAULT))

    def open(self, artifact: Artifact) -> Runtime:
        """Ideal planes."""
        availability = self.availability()
        if not availability.found:
            raise ToolchainMissing("optics cannot be simulated", why=availability.detail, fix=availability.fix)
        from edgeattn.targets.optical.runtime import OpticalRuntime

        return OpticalRuntime(artifact)
