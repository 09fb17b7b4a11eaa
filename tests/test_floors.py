"""The floors of the design: a room imports only from the floors below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edgeattn

PACKAGE = Path(edgeattn.__file__).parent

#: From the ground up; rooms of one floor do not import each other.
FLOORS = [
    ("core",),
    ("recipe", "device", "toolchains"),
    ("models",),
    ("reparam",),
    ("capture",),
    ("quant",),
    ("lint",),
    ("targets",),
    ("bundle",),
    ("profile",),
    ("pipeline",),
    ("report", "doctor"),
    ("check", "conformance", "sweep"),
    ("cli",),
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem not in ("__init__", "__main__"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, anywhere in it, also for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("edgeattn.")}


def breaches(source: str, names: set[str]) -> list[str]:
    """Imports by room ``source`` of rooms on its own floor or above; attributes of the package itself are free."""
    rooms = {name.split(".")[1] for name in names} & set(FLOOR)
    return sorted(room for room in rooms if room != source and FLOOR[room] >= FLOOR[source])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_only_from_floors_below(path: Path) -> None:
    assert room_of(path) in FLOOR, f"{room_of(path)} has no floor: give it one in DESIGN and here"
    assert breaches(room_of(path), imports(path)) == []


def test_a_breach_is_seen() -> None:
    assert breaches("core", {"edgeattn.recipe.Recipe"}) == ["recipe"]
    assert breaches("recipe", {"edgeattn.device.Device"}) == ["device"]
    assert breaches("targets", {"edgeattn.capture.Program", "edgeattn.core.errors.UsageError"}) == []


#: What several targets are made of.
SHARED = ("onnx_graph",)


def test_targets_do_not_import_each_other() -> None:
    for path in (PACKAGE / "targets").rglob("*.py"):
        parts = path.relative_to(PACKAGE / "targets").parts
        if len(parts) < 2:
            continue
        others = {n.split(".")[2] for n in imports(path) if n.startswith("edgeattn.targets.")} - {
            parts[0],
            "base",
            "feeds",
            *SHARED,
        }
        assert not others, f"{path} imports {others}"


def test_no_file_is_longer_than_500_lines() -> None:
    long = {str(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long
