"""ONNX: the dynamo exporter's graph, run by ONNX Runtime on any CPU."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.targets.base import Artifact, Availability, LowerPlan, OpCost, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device
    from edgeattn.lint import Finding


#: Choices of ``weight_range``: int8 weights of all 8 bits, or of 7, which no CPU's kernels saturate with.
FULL, REDUCED = "full", "reduced"
#: Choices of ``cache``: the numbers that a decoder's cache is kept in; its graph in float16 wants them in float16.
WHOLE, HALF = "float32", "float16"
#: Extensions of x86 CPUs, as /proc/cpuinfo names them, that add products of 8 bits without saturation.
_VNNI = ("avx_vnni", "avx512_vnni", "amx_int8")


def _saturates(machine: str, extensions: Sequence[str]) -> bool:
    """Whether ONNX Runtime's int8 kernels may saturate on such a CPU, so that they lose what 8 bits could hold."""
    return machine not in ("aarch64", "arm64") and not set(_VNNI) & set(extensions)


class OnnxTarget(Target):
    """Lowers with ``torch.onnx`` (opset 20), runs with ONNX Runtime's CPU provider."""

    name: ClassVar[str] = "onnx"
    runtime_tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    device_runtimes: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    keeps_wider: ClassVar[bool] = True
    half_activations: ClassVar[bool] = True
    rounds_as_planned: ClassVar[bool] = True
    asymmetric: ClassVar[bool] = True
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "dynamic"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight_range": (REDUCED, FULL), "cache": (WHOLE, HALF)}

    def availability(self) -> Availability:
        """Found when every package is installed; the versions are the detail."""
        found: Mapping[str, str | None] = tools.versions(("onnx", "onnxscript", "onnxruntime"))
        missing = [name for name, version in found.items() if version is None]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return Availability(True, ", ".join(f"{name} {version}" for name, version in found.items()))

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """fp32; fp16 storage with whatever would overflow kept in fp32; small weights; int8 weights and data."""
        return ("fp32", "fp16", "w8a8", "w8", "w4")

    def settle(self, options: Mapping[str, str], device: Device | None, precision: str = "") -> dict[str, str]:
        """See ``Target.settle``; on a device whose kernels do not saturate weights have all 8 bits."""
        settled = super().settle(options, device, precision)
        if "weight_range" not in options and device is not None and not _saturates(device.machine, device.extensions):
            settled["weight_range"] = FULL
        if "cache" not in options and precision == "fp16":
            settled["cache"] = HALF
        return settled

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

        # Weights of 8 bits are for CPUs that do not saturate. Where this one does, operations are computed one by one
        # as the graph says, or the numbers would be this machine's and not the device's.
        full = artifact.facts.get("weight_range") == FULL
        return OnnxRuntime(artifact, optimized=not (full and _saturates(platform.machine(), tools.cpu_extensions())))

    def operations(self, artifact: Artifact, entry: str) -> list[OpCost]:
        """See ``Target.operations``; the nodes of the graph."""
        from edgeattn.targets.onnx_graph.operations import operations

        return operations(artifact, entry)

    def adopt(self, path: Path) -> Artifact | None:
        """See ``Target.adopt``; an .onnx file of static shapes, whoever made it."""
        if path.suffix != ".onnx":
            return None
        from edgeattn.targets.onnx_graph.files import adopt

        return adopt(path)

    def lint(self, program: Program, device: Device | None) -> list[Finding]:
        """See ``Target.lint``; operations without a form."""
        from edgeattn.targets.onnx.lint import lint

        return lint(program)

    def package(self) -> str:
        """The runner needs ONNX Runtime alone."""
        return "onnxruntime"
