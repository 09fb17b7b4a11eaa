"""GGUF: PLM's weights as llama.cpp reads them; verified without it, and with it where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing
from edgeattn.targets.base import Artifact, Availability, LowerPlan, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device

#: What reads and writes the files, and what runs them on a device.
GGUF, LLAMA = "gguf", "llama-cpp-python"
#: Blocks of 4-bit weights: of 32 with a scale, or of 256 with scales and offsets of their own for every 32.
ZERO, K = "q4_0", "q4_k"


class GgufTarget(Target):
    """Writes weights, sizes and tokenizer with the gguf package; runs PLM in PyTorch with what the file holds."""

    name: ClassVar[str] = "gguf"
    runtime_tools: ClassVar[tuple[str, ...]] = (GGUF, "edgeattn", "torch", "numpy")
    device_runtimes: ClassVar[tuple[str, ...]] = (LLAMA,)
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"blocks": (ZERO, K)}
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "dynamic"
    unproven: ClassVar[str] = (
        "what the file holds was verified by PyTorch; llama.cpp, which rounds what is multiplied with small weights to "
        "8 bits as well, was not asked"
    )

    def availability(self) -> Availability:
        """Found when the gguf package is installed; its version is the detail."""
        version = tools.version(GGUF)
        if version is None:
            return Availability(False, f"not installed: {GGUF}", "pip install 'edgeattn[gguf]'")
        return Availability(True, f"{GGUF} {version}")

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """F32, F16, Q8_0, and Q4_0 or Q4_K."""
        return ("fp32", "fp16", "w8", "w4")

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """What writes the file."""
        return (GGUF, "torch", "numpy")

    def _need(self) -> None:
        availability = self.availability()
        if not availability.found:
            raise ToolchainMissing("the gguf package is missing", why=availability.detail, fix=availability.fix)

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """See ``Target.lower``; one file for all entries."""
        self._need()
        from edgeattn.targets.gguf.lower import lower

        return lower(program, plan, out)

    def open(self, artifact: Artifact) -> Runtime:
        """PLM in PyTorch with the numbers that the file's blocks stand for."""
        self._need()
        from edgeattn.targets.gguf.runtime import PlmRuntime

        return PlmRuntime(artifact)

    def others(self, artifact: Artifact) -> Mapping[str, Runtime]:
        """llama.cpp, where it is installed; it computes whole texts."""
        if tools.version(LLAMA) is None:
            return {}
        from edgeattn.targets.gguf.llama import LlamaRuntime

        return {"llama.cpp": LlamaRuntime(artifact)}

    def adopt(self, path: Path) -> Artifact | None:
        """See ``Target.adopt``; a .gguf file of PLM, whoever made it."""
        if path.suffix != ".gguf":
            return None
        self._need()
        from edgeattn.targets.gguf.runtime import adopt

        return adopt(path)

    def package(self) -> str:
        """llama.cpp's Python package; ``llama-cli`` needs none."""
        return LLAMA
