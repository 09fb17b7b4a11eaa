"""What stands for a registered target that cannot be loaded: it is listed with the reason, and stops nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from edgeattn.core.errors import ToolchainMissing
from edgeattn.core.numerics import TOLERANCES
from edgeattn.targets.base import Artifact, Availability, LowerPlan, Runtime, Target

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device


class BrokenTarget(Target):
    """Off, whatever is asked of it."""

    name: ClassVar[str] = "broken"
    runtime_tools: ClassVar[tuple[str, ...]] = ("edgeattn",)

    def __init__(self, name: str, why: str, fix: str) -> None:
        """``name`` that it is registered under; ``why`` it cannot be loaded; ``fix`` for the user."""
        vars(self)["name"] = name
        self._why, self._fix = why, fix

    def availability(self) -> Availability:
        """Off, with the reason."""
        return Availability(False, self._why, self._fix)

    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """All: which it holds nobody knows, and the reason that it is off must not hide behind a guess."""
        return tuple(TOLERANCES)

    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """None is known."""
        return ("edgeattn",)

    def _off(self) -> ToolchainMissing:
        return ToolchainMissing(f"target {self.name} cannot be loaded", why=self._why, fix=self._fix)

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """Raises ToolchainMissing."""
        raise self._off()

    def open(self, artifact: Artifact) -> Runtime:
        """Raises ToolchainMissing."""
        raise self._off()
