"""What came of a run of checks, as plain data that every writer takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

#: "skipped": there was nothing to hold it against, or an earlier one of the same cell did not hold.
Status = Literal["held", "failed", "warned", "skipped"]


@dataclass(frozen=True)
class Place:
    """A line of a file, relative to where the checks were started; line 0 is the file as a whole."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Item:
    """One thing that a cell is held to.

    Attributes:
        name: "export", "numerics", "size" and so on. words: what was found and what is allowed, in a sentence.
        why, fix: of what did not hold. details: further lines.
        place: the line that asks for it.
    """

    name: str
    status: Status
    words: str
    place: Place
    why: str = ""
    fix: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A lint finding of a cell.

    Attributes:
        data: as ``edgeattn.lint.Finding.as_dict`` has it, and its ``target``.
        fails: whether it is as bad as the budget says.
    """

    data: Mapping[str, Any]
    place: Place
    fails: bool = False


@dataclass(frozen=True)
class Checked:
    """A cell and what it was held to.

    Attributes:
        suite: the model's name in the file. name: of the cell: target, precision, device.
        facts: see ``pipeline.cells.facts_of``; {} where the export did not hold.
        cached: nothing had changed since it was made. seconds: that it took now.
    """

    suite: str
    name: str
    cell: Mapping[str, Any]
    items: tuple[Item, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    lint: tuple[Finding, ...] = ()
    bundle: str = ""
    cached: bool = False
    seconds: float = 0.0
    latency: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """Model, target, precision, device."""
        return f"{self.suite} {self.name}"

    @property
    def status(self) -> Status:
        """The worst of its items; "held" where some are skipped."""
        found = {item.status for item in self.items}
        return "failed" if "failed" in found else "warned" if "warned" in found else "held"


@dataclass(frozen=True)
class Run:
    """All cells of a file.

    Attributes:
        changes: what differs from the lock file, a sentence each. created: UTC, ISO 8601.
    """

    file: str
    created: str
    edgeattn: str
    cells: tuple[Checked, ...]
    changes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether nothing failed."""
        return all(cell.status != "failed" for cell in self.cells)

    def failures(self) -> Iterator[tuple[Checked, Item]]:
        """What did not hold."""
        return ((cell, item) for cell in self.cells for item in cell.items if item.status == "failed")

    def warnings(self) -> Iterator[tuple[Checked, Item]]:
        """What a reader must know."""
        return ((cell, item) for cell in self.cells for item in cell.items if item.status == "warned")

    def counts(self) -> dict[Status, int]:
        """Cells by status."""
        statuses = [cell.status for cell in self.cells]
        kinds: tuple[Status, ...] = ("held", "warned", "failed")
        return {kind: statuses.count(kind) for kind in kinds}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        for cell, made in zip(self.cells, data["cells"], strict=True):
            made["status"] = cell.status
        return {"schema_version": 1, "held": self.held, **data}
