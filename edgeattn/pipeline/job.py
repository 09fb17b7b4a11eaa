"""A job: one model to one target in one precision, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeattn.recipe import Resolved


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        resolved: the recipe and its files.
        target, precision: names.
        device: name of the device that the export is for, or None.
    """

    resolved: Resolved
    target: str
    precision: str
    device: str | None = None

    @property
    def title(self) -> str:
        """Name of the bundle's folder."""
        return f"{self.resolved.title}.{self.target}.{self.precision}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the worker process."""
        return {
            "resolved": self.resolved.model_dump(mode="json"),
            "target": self.target,
            "precision": self.precision,
            "device": self.device,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Job:
        """The inverse of ``to_dict``."""
        return Job(Resolved.model_validate(data["resolved"]), data["target"], data["precision"], data["device"])
