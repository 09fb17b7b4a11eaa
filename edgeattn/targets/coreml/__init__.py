"""Core ML: an ML program made by coremltools, verified anywhere by our own interpreter, run on Apple's systems."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from edgeattn.core import tools
from edgeattn.core.errors import ToolchainMissing, UsageError
from edgeattn.targets.base import Artifact, Availability, LowerPlan, OpCost, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device
    from edgeattn.lint import Finding

#: Systems that a package can be made for, and the macOS of the same year. The oldest is the default.
DEPLOYMENTS = {"iOS16": "macOS13", "iOS17": "macOS14", "iOS18": "macOS15"}
_NEWER = {"iOS26": "iOS18", "macOS26": "macOS15"}
#: The first of them that has states.
STATES_FROM = "iOS18"
#: What converts, reads and runs packages.
COREMLTOOLS = "coremltools"
#: How weights are stored in few bits: integers with scales, or indices into a table of numbers.
LINEAR, PALETTE = "linear", "palette"
#: The first system that has what a precision needs: blocks of 4-bit numbers, and data in integers.
_FROM = {("w4", LINEAR): "iOS18", ("w8a8", LINEAR): "iOS17"}


class CoreMLTarget(Target):
    """Lowers with coremltools; runs in the MIL interpreter, and on a Mac in Core ML as well."""

    name: ClassVar[str] = "coreml"
    runtime_tools: ClassVar[tuple[str, ...]] = ("edgeattn", COREMLTOOLS, "torch", "numpy")
    device_runtimes: ClassVar[tuple[str, ...]] = (COREMLTOOLS,)
    # Activations in float16 too, each rounded: more than weights alone lose.
    tolerances: ClassVar[Mapping[str, float]] = {"fp16": 1e-2}
    unproven: ClassVar[str] = "graph and weights verified by interpreter; not run on Apple hardware"
    # A package's functions share their states, and a state has one size.
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = "whole"
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "deployment": (*DEPLOYMENTS, *DEPLOYMENTS.values()),
        "io": ("float32", "float16"),
        "image": ("no", "rgb", "bgr", "gray"),
        "classifier": ("no", "yes"),
        "weights": (LINEAR, PALETTE),
    }

    def availability(self) -> Availability:
        """Found when coremltools is installed; its version is the detail."""
        version = tools.version(COREMLTOOLS)
        if version is None:
            return Availability(False, f"not installed: {COREMLTOOLS}", "pip install 'edgeattn[coreml]'")
        return Availability(True, f"{COREMLTOOLS} {version}")

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """fp32; weights and activations in float16; with weights, or weights and data, in 8 bits, or weights in 4."""
        return ("fp32", "fp16", "w8", "w4", "w8a8")

    def settle(self, options: Mapping[str, str], device: Device | None, precision: str = "") -> dict[str, str]:
        """See ``Target.settle``; a device says which system it has. A macOS means the iOS of the same year.

        Where neither says a system, it is the oldest that has what the precision needs.
        """
        asked = dict(options)
        if "deployment" not in options and device is not None and device.deployment_target:
            # A newer system runs what is made for the newest of these.
            own = device.deployment_target
            asked["deployment"] = _NEWER.get(own, own)
        settled = super().settle(asked, device, precision)
        of_the_year = {mac: ios for ios, mac in DEPLOYMENTS.items()}
        settled["deployment"] = of_the_year.get(settled["deployment"], settled["deployment"])
        if precision and settled["weights"] == PALETTE and precision not in ("w8", "w4"):
            raise UsageError(
                "there is nothing to make palettes of",
                value="weights=palette",
                where=f"target {self.name}, precision {precision}",
                why="a palette holds weights in 8 or 4 bits that are computed with in float16",
                fix="--precision w8 or w4, or leave the option away",
            )
        needed = _FROM.get((precision, settled["weights"]), settled["deployment"])
        if list(DEPLOYMENTS).index(settled["deployment"]) < list(DEPLOYMENTS).index(needed):
            if "deployment" in asked:
                palette = ", or -O weights=palette" if precision == "w4" else ""
                raise UsageError(
                    f"{precision} needs a newer system",
                    value=f"deployment={asked['deployment']}",
                    where=f"target {self.name}" if "deployment" in options else f"target {self.name}, the device's",
                    why=f"it begins with {needed} ({DEPLOYMENTS[needed]})",
                    fix=f"-O deployment={needed}{palette}",
                )
            settled["deployment"] = needed
        return settled

    def settle_decoder(
        self, settled: Mapping[str, str], asked: Mapping[str, str], device: Device | None, precision: str
    ) -> dict[str, str]:
        """See ``Target.settle_decoder``; a cache is a state, in float16 and from iOS18 on."""
        where = f"a decoder on target {self.name}"
        if precision == "fp32":
            raise UsageError(
                "a decoder cannot be in fp32",
                where=where,
                why="its cache is a state, which Core ML has in float16 alone",
                fix="--precision fp16",
            )
        for option in ("image", "classifier"):
            if settled[option] != "no":
                value = f"{option}={settled[option]}"
                raise UsageError("a decoder has no such form", value=value, where=where, fix="leave the option away")
        old = settled["deployment"] != STATES_FROM
        if old and ("deployment" in asked or (device is not None and device.deployment_target)):
            raise UsageError(
                "a decoder needs a newer system",
                value=f"deployment={settled['deployment']}",
                where=where,
                why=f"its cache is a state, which begins with {STATES_FROM} ({DEPLOYMENTS[STATES_FROM]})",
                fix=f"-O deployment={STATES_FROM}",
            )
        return {**settled, "deployment": STATES_FROM}

    def unproven_of(self, options: Mapping[str, str], decoder: bool = False) -> str:
        """See ``Target.unproven_of``; of a decoder also how Core ML treats its cache."""
        cache = "; that Core ML writes the cache in place, and that all functions share one state, is not proven"
        return self.unproven + (cache if decoder else "")

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """The converter and what it computes with, and in 8 and 4 bits what finds palettes."""
        palettes = ("scikit-learn",) if precision in ("w8", "w4") else ()
        return (COREMLTOOLS, "torch", "numpy", "protobuf", *palettes)

    def _need(self) -> None:
        availability = self.availability()
        if not availability.found:
            raise ToolchainMissing("coremltools is missing", why=availability.detail, fix=availability.fix)

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """See ``Target.lower``; one .mlpackage for each entry, and one with all entries of a decoder."""
        self._need()
        if program.decoder is not None:
            from edgeattn.targets.coreml import decoder

            return decoder.lower(program, plan, out)
        from edgeattn.targets.coreml.lower import lower

        return lower(program, plan, out)

    def open(self, artifact: Artifact) -> Runtime:
        """The MIL interpreter; packages are read from the disk when an entry is first run."""
        self._need()
        from edgeattn.targets.coreml.runtime import MilRuntime

        return MilRuntime(artifact)

    def others(self, artifact: Artifact) -> Mapping[str, Runtime]:
        """On a Mac, Core ML itself."""
        if sys.platform != "darwin":
            return {}
        from edgeattn.targets.coreml.predict import CoreMLRuntime

        return {"Core ML": CoreMLRuntime(artifact)}

    def operations(self, artifact: Artifact, entry: str) -> list[OpCost]:
        """See ``Target.operations``; the operations of the entry's function. Raises ToolchainMissing."""
        self._need()
        from edgeattn.targets.coreml.table import operations

        return operations(artifact, entry)

    def adopt(self, path: Path) -> Artifact | None:
        """See ``Target.adopt``; an .mlpackage, whoever made it."""
        if path.suffix != ".mlpackage":
            return None
        self._need()
        from edgeattn.targets.coreml.runtime import adopt

        return adopt(path)

    def lint(self, program: Program, device: Device | None) -> list[Finding]:
        """See ``Target.lint``; the rules are in ``lint.toml``, and operations without a form."""
        from edgeattn.targets.coreml.lint import lint, unsupported

        return [*unsupported(program), *lint(program, device)]

    def package(self) -> str:
        """The runner needs coremltools, and macOS."""
        return COREMLTOOLS
