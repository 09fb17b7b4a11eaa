"""TensorRT: a strongly typed ONNX graph, and engines of TensorRT for RTX built without a GPU.

Two flavours. ``rtx`` is TensorRT for RTX, whose engines any x86-64 Linux builds ahead of time for given compute
capabilities. ``full`` is the TensorRT of JetPack and of servers (10 and 11), which builds engines on the device alone:
the bundle carries the graph, ``build.sh`` and a runner that builds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing, UsageError, unknown
from edgeattn.targets.base import Artifact, Availability, LowerPlan, OpCost, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device
    from edgeattn.lint import Finding

RTX, FULL = "rtx", "full"
#: The distribution of each flavour; its module has the same name with an underscore.
PACKAGES = {RTX: "tensorrt-rtx", FULL: "tensorrt"}
#: An engine that holds code for every GPU from compute capability 8.0 on.
PORTABLE = "portable"
#: Compute capabilities that TensorRT for RTX 1.7 builds for. 9.0 is none of them.
COMPUTE = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
#: Half of what others may be off in w8a8: here operations go back to float16 until the samples hold.
TIGHT = {"w8a8": 1e-1}
#: The first compute capability with fp8.
FIRST_FP8 = 8.9


class TensorRTTarget(Target):
    """Lowers to a strongly typed ONNX graph and engines; the graph runs on the CPU, an engine needs its GPU."""

    name: ClassVar[str] = "tensorrt"
    runtime_tools: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    # Measured with tensorrt-rtx 1.7.1: of one ONNX file the builder makes engines of different bytes.
    varies: ClassVar[tuple[str, ...]] = ("*.engine",)
    device_runtimes: ClassVar[tuple[str, ...]] = tuple(PACKAGES.values())
    dynamic: ClassVar[bool] = True
    keeps_wider: ClassVar[bool] = True
    half_activations: ClassVar[bool] = True
    # Shapes that stay are what a CUDA graph can be made of, and what kernels are chosen for before the first step.
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "whole"
    tolerances: ClassVar[Mapping[str, float]] = TIGHT
    unproven: ClassVar[str] = "built and parsed; numbers verified on the typed graph; not run on a GPU"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "flavour": (RTX, FULL),
        "compute": (PORTABLE, *COMPUTE),
        "quantizer": ("edgeattn", "modelopt"),
        "level": ("3", "0", "1", "2", "4", "5"),
        "workspace_mb": ("default", "256", "512", "1024", "2048", "4096", "8192"),
        "weight_streaming": ("no", "yes"),
        "strip": ("no", "yes"),
    }

    def availability(self) -> Availability:
        """Found when the exporter and a TensorRT with a parser are installed; the versions are the detail."""
        found = tools.versions(("onnx", "onnxscript", "onnxruntime"))
        builders = {name: version for name in PACKAGES.values() if (version := tools.version(name))}
        missing = [name for name, version in found.items() if version is None]
        missing += [] if builders else [PACKAGES[RTX]]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", "pip install 'edgeattn[tensorrt]'")
        return Availability(True, ", ".join(f"{name} {version}" for name, version in {**builders, **found}.items()))

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """fp32; fp16; small weights or small weights and data at weighted operations, with fp16 around them."""
        held = ("fp32", "fp16", "w8a8", "w8", "w4", "fp8")
        compute = device.compute_capability if device else None
        return held if compute is None or float(compute) >= FIRST_FP8 else held[:-1]

    def settle(self, options: Mapping[str, str], device: Device | None, precision: str = "") -> dict[str, str]:
        """See ``Target.settle``. ``compute`` may be several, as in ``8.6,8.9``; a device says flavour and compute."""
        computes = [one for one in options.get("compute", "").replace(",", "+").split("+") if one]
        for one in computes:
            if one not in self.options["compute"]:
                error = unknown("choice of option compute", one, self.options["compute"], where=f"target {self.name}")
                if re.fullmatch(r"\d+\.\d", one) and float(one) >= 8:
                    error.fix = "TensorRT for RTX has none for it: try -O compute=portable, or -O flavour=full on it"
                raise error
        settled = super().settle({k: v for k, v in options.items() if k != "compute"}, device, precision)
        if device is not None and device.flavour and "flavour" not in options:
            settled["flavour"] = device.flavour
        if settled["flavour"] == FULL:
            if computes:
                raise UsageError(
                    "TensorRT builds for the GPU that it runs on",
                    value=f"compute={options['compute']}",
                    where="target tensorrt, flavour full",
                    fix="leave it away, or take -O flavour=rtx",
                )
        elif not computes and device is not None and device.compute_capability in COMPUTE:
            computes = [device.compute_capability]
        order = self.options["compute"]
        settled["compute"] = "+".join(sorted(set(computes), key=order.index)) or PORTABLE
        return settled

    def unproven_of(self, options: Mapping[str, str], decoder: bool = False) -> str:
        """Of the flavour: ``full`` builds on the device. Of a decoder also how its cache is kept there."""
        kept = "; the cache in the GPU's memory was tried with a stand-in for the driver" if decoder else ""
        if options["flavour"] == FULL:
            built = "parsed; numbers verified on the typed graph; the engine is built on the device, none was run here"
            return built + kept
        return self.unproven + kept

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """The exporter's packages, the runtime that measures for it, and what parses and builds."""
        exporter = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy", *PACKAGES.values())
        return exporter if precision == "fp32" else (*exporter, "onnxruntime")

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """See ``Target.lower``; an .onnx file for each entry, engines beside it, and ``build.sh``."""
        availability = self.availability()
        if not availability.found:
            raise ToolchainMissing("TensorRT's parser is missing", why=availability.detail, fix=availability.fix)
        from edgeattn.targets.tensorrt.lower import lower

        return lower(program, plan, out)

    def open(self, artifact: Artifact) -> Runtime:
        """ONNX Runtime on the typed graph, without optimizations: on CPUs without VNNI its int8 kernels saturate.

        With them for a decoder's small weights, which saturate nothing: else every step would unpack all of them.
        """
        if tools.version("onnxruntime") is None:
            raise ToolchainMissing("ONNX Runtime is missing", why="not installed", fix="pip install onnxruntime")
        from edgeattn.targets.onnx_graph.execute import OnnxRuntime

        return OnnxRuntime(artifact, artifact.precision in ("w8", "w4") and "main" not in artifact.entries)

    def operations(self, artifact: Artifact, entry: str) -> list[OpCost]:
        """See ``Target.operations``; the nodes of the typed graph, which the engine is built of."""
        from edgeattn.targets.onnx_graph.operations import operations

        return operations(artifact, entry)

    def others(self, artifact: Artifact) -> Mapping[str, Runtime]:
        """Where there is a GPU, the engine on it."""
        from edgeattn.targets.tensorrt.gpu import EngineRuntime, at_hand

        return {"TensorRT": EngineRuntime(artifact)} if at_hand(artifact) else {}

    def lint(self, program: Program, device: Device | None) -> list[Finding]:
        """See ``Target.lint``; operations without a form."""
        from edgeattn.targets.tensorrt.lint import lint

        return lint(program)

    def package(self) -> str:
        """The runner needs TensorRT: by default the one for RTX."""
        return PACKAGES[RTX]
