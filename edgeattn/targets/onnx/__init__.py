"""ONNX: the dynamo exporter's graph, run by ONNX Runtime on any CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.targets.base import Artifact, Availability, LowerPlan, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device


class OnnxTarget(Target):
    """Lowers with ``torch.onnx`` (opset 20), runs with ONNX Runtime's CPU provider."""

    name: ClassVar[str] = "onnx"
    runtime_tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    device_runtimes: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    keeps_wider: ClassVar[bool] = True
    half_activations: ClassVar[bool] = True

    def availability(self) -> Availability:
        """Found when every package is installed; the versions are the detail."""
        found: Mapping[str, str | None] = tools.versions(("onnx", "onnxscript", "onnxruntime"))
        missing = [name for name, version in found.items() if version is None]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return Availability(True, ", ".join(f"{name} {version}" for name, version in found.items()))

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """fp32, and fp16 storage with whatever would overflow kept in fp32."""
        return ("fp32", "fp16")

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """The exporter's packages; for float16 the runtime too, which measures what must stay in float32."""
        exporter = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
        return exporter if precision == "fp32" else (*exporter, "onnxruntime")

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """See ``Target.lower``; one .onnx file for each entry, weights beside it from 1.5 GB on."""
        from edgeattn.targets.onnx.lower import lower

        return lower(program, plan, out)

    def open(self, artifact: Artifact) -> Runtime:
        """An ONNX Runtime session for each entry, made at its first run."""
        availability = self.availability()
        if not availability.found:
            raise ToolchainMissing("ONNX Runtime is missing", why=availability.detail, fix=availability.fix)
        from edgeattn.targets.onnx_graph.execute import OnnxRuntime

        return OnnxRuntime(artifact)

    def package(self) -> str:
        """The runner needs ONNX Runtime alone."""
        return "onnxruntime"
