"""Targets: one folder and one entry point each. ``names()`` lists them without importing any toolchain."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from edgeattn.core.errors import unknown
from edgeattn.targets.base import Target

GROUP = "edgeattn.targets"


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def names() -> list[str]:
    """Every registered target, also those whose toolchain is missing."""
    return list(_points())


def get(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: no entry point of that name (with the closest).
    """
    points = _points()
    if name not in points:
        raise unknown("target", name, points)
    target: Target = points[name].load()()
    return target
