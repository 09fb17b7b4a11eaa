"""Targets: one folder and one entry point each. ``names()`` lists them without importing any toolchain."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.hashing import sha256_sources
from edgeattn.lint.rules import RuleBook
from edgeattn.targets.base import Target

GROUP = "edgeattn.targets"
_OWN = "edgeattn.targets."


def _points() -> dict[str, EntryPoint]:
    """By name; where two packages took the same one ours stands."""
    found = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value.startswith(_OWN)))
    return {point.name: point for point in found}


def _point(name: str) -> EntryPoint:
    points = _points()
    if name not in points:
        raise unknown("target", name, points)
    return points[name]


def _made(point: EntryPoint) -> Target:
    """Raises UsageError where a third party's target cannot be loaded; a fault of ours is shown as it is."""
    if point.value.startswith(_OWN):
        own: Target = point.load()()
        return own
    package = point.dist.name if point.dist is not None else ""
    where = f"entry point {point.value}" + (f" of {package}" if package else "")
    fix = f"pip install --upgrade {package}, or uninstall it" if package else "mend its module"
    try:
        target = point.load()()
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError("the target cannot be loaded", value=point.name, where=where, why=why, fix=fix) from error
    if not isinstance(target, Target):
        why = f"{type(target).__name__} is no subclass of edgeattn.targets.base.Target"
        raise UsageError("the target cannot be loaded", value=point.name, where=where, why=why, fix=fix)
    return target


def names() -> list[str]:
    """Every registered target, also those whose toolchain is missing."""
    return list(_points())


def place_of(name: str) -> str:
    """``package.module:Class`` of a target. Raises UsageError: no entry point of that name."""
    return _point(name).value


def load(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: no entry point of that name (with the closest), or one that cannot be loaded.
    """
    return _made(_point(name))


def get(name: str) -> Target:
    """The target of that name; a third party's that cannot be loaded is there too, off and with the reason.

    Raises:
        UsageError: no entry point of that name (with the closest).
    """
    point = _point(name)
    try:
        return _made(point)
    except UsageError as error:
        from edgeattn.targets.broken import BrokenTarget

        return BrokenTarget(name, f"{error.where}: {error.why}", error.fix or "")


def check_rules(books: Iterable[RuleBook]) -> None:
    """Whether the targets that a user's lint rules name are there.

    Raises:
        UsageError: one is not (with the closest).
    """
    for book in books:
        for name, rule in book.rules.items():
            for target in rule.targets:
                if target not in names():
                    raise unknown("target", target, names(), where=f"{book.path}, rules.{name}.targets")


def code_of(name: str) -> str:
    """Digest of a third party's own code: its module's package, or its only file. "" for a target of ours.

    Raises:
        UsageError: no entry point of that name.
    """
    module = place_of(name).partition(":")[0]
    if module.startswith(_OWN):
        return ""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return ""
    file = Path(spec.origin)
    alone = "." not in module and not spec.submodule_search_locations
    return sha256_sources(file.parent, [file.name] if alone else ["."])
