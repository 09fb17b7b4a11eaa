"""TFLite: a flatbuffer made by litert-torch, run by LiteRT or by the older tflite-runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.targets.base import NCHW, NHWC, Artifact, Availability, LowerPlan, OpCost, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device
    from edgeattn.lint import Finding

#: The runtime that this target's artifacts are made for and proven with.
LITERT = "ai-edge-litert"
#: Its predecessor, the only one where LiteRT has no wheel (32-bit Raspberry Pi OS, older images).
TFLITE_RUNTIME = "tflite-runtime"


class TFLiteTarget(Target):
    """Lowers with litert-torch, quantizes with ai-edge-quantizer, runs with LiteRT."""

    name: ClassVar[str] = "tflite"
    unit = "xnnpack"
    runtime_tools: ClassVar[tuple[str, ...]] = (LITERT, "numpy")
    device_runtimes: ClassVar[tuple[str, ...]] = (LITERT, TFLITE_RUNTIME)
    layouts: ClassVar[tuple[str, ...]] = (NCHW, NHWC)
    asymmetric: ClassVar[bool] = True
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "buckets"

    def availability(self) -> Availability:
        """Found when every package is installed; the versions are the detail."""
        found = tools.versions(("litert-torch", "ai-edge-quantizer", LITERT))
        missing = [name for name, version in found.items() if version is None]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", "pip install 'edgeattn[tflite]'")
        return Availability(True, ", ".join(f"{name} {version}" for name, version in found.items()))

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """fp32, fp16, int8 weights, int8 weights and data; int4 weights where LiteRT computes them."""
        held = ("fp32", "fp16", "w8", "w8a8", "w4")
        return held[:-1] if device is not None and device.runtimes.get(self.name) == TFLITE_RUNTIME else held

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """The converter's packages; for the smaller precisions the quantizer too."""
        converter = ("torch", "litert-torch", "litert-converter", LITERT, "jax", "numpy", "flatbuffers")
        return converter if precision == "fp32" else (*converter, "ai-edge-quantizer")

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """See ``Target.lower``; one file whose signatures are the entries."""
        availability = self.availability()
        if not availability.found:
            raise ToolchainMissing("the TFLite converter is missing", why=availability.detail, fix=availability.fix)
        from edgeattn.targets.tflite.lower import lower

        return lower(program, plan, out)

    def open(self, artifact: Artifact) -> Runtime:
        """A LiteRT interpreter, made at the first run; tflite-runtime where that alone is installed."""
        if all(tools.version(name) is None for name in (LITERT, TFLITE_RUNTIME)):
            raise ToolchainMissing("LiteRT is missing", why=f"not installed: {LITERT}", fix=f"pip install {LITERT}")
        from edgeattn.targets.tflite.runtime import LiteRuntime

        return LiteRuntime(artifact)

    def operations(self, artifact: Artifact, entry: str) -> list[OpCost]:
        """See ``Target.operations``; the operators of the signature's graph."""
        from edgeattn.targets.tflite.table import operations

        return operations(artifact, entry)

    def alone(self, artifact: Artifact, entry: str) -> bytes | None:
        """See ``Target.alone``: LiteRT's wheel has no profiler."""
        from edgeattn.targets.tflite.alone import alone

        return alone(artifact, entry)

    def units(self, artifact: Artifact, entry: str) -> dict[str, str]:
        """See ``Target.units``: XNNPACK, or LiteRT's own kernels."""
        from edgeattn.targets.tflite.alone import units

        return units(artifact, entry)

    def adopt(self, path: Path) -> Artifact | None:
        """See ``Target.adopt``; a .tflite file with signatures, whoever made it."""
        if path.suffix != ".tflite":
            return None
        from edgeattn.targets.tflite.runtime import adopt

        return adopt(path)

    def lint(self, program: Program, device: Device | None) -> list[Finding]:
        """See ``Target.lint``; the rules are in ``lint.toml``, and operations without a form."""
        from edgeattn.targets.tflite.lint import lint, unsupported

        return [*unsupported(program), *lint(program, device)]

    def package(self) -> str:
        """The runner needs LiteRT, or where it has no wheel tflite-runtime."""
        return LITERT
