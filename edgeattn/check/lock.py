"""``edgeattn.lock``: what was accepted of each cell, so that a change of it is seen.

It holds no paths and no times of day: two people who accept the same artifacts on the same versions write the same
bytes, but for seconds and memory of the export, which are those of the machine that is named beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from edgeattn.bundle import Bundle
from edgeattn.core import schema
from edgeattn.core.errors import UsageError
from edgeattn.core.files import write_whole

#: Facts of ``pipeline.cells.facts_of`` that are kept, and how a change of one is written.
KEPT = {
    "relative_l2": "{:.3g}",
    "accuracy": "{:.2%}",
    "size_mb": "{:.3f} MB",
    "parameters": "{:,}",
    "macs": "{:,}",
    "bytes": "{:,}",
    "nodes": "{:,}",
}


class Entry(schema.Strict):
    """What was accepted of a cell.

    Attributes:
        artifacts: SHA-256 of the artifact's files. facts: see ``KEPT``.
        versions: of the tools that made it.
        machine: what the next two were measured on. seconds, peak_mb: of the export's stages.
    """

    artifacts: dict[str, str]
    facts: dict[str, float | int | None]
    versions: dict[str, str | None]
    machine: str
    seconds: float
    peak_mb: float | None


class Lock(schema.Strict):
    """The file. ``cells`` go by their names: the model's name in the file, target, precision and device."""

    schema_version: Literal[1] = 1
    cells: dict[str, Entry] = Field(default_factory=dict)

    def text(self) -> str:
        """Its one text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read(path: Path) -> Lock | None:
    """The lock file; None where there is none yet.

    Raises:
        UsageError: it cannot be read, or is no lock file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fix = "take it from version control again, or delete it and run edgeattn check --update"
        raise UsageError("the lock file cannot be read", value=path.name, why=str(error), fix=fix) from error
    return schema.validate(Lock, data if isinstance(data, dict) else {"lock": data}, path.name)


def write(path: Path, lock: Lock) -> None:
    """Whole or not at all."""
    write_whole(path, lock.text().encode())


def entry_of(bundle: Bundle, outcome: Mapping[str, Any], machine: str) -> Entry:
    """What there is to accept of a cell that held."""
    facts = outcome["facts"]
    versions = {name: version for info in bundle.manifest.artifacts for name, version in info.tools.items()}
    return Entry(
        artifacts=dict(outcome["artifacts"]),
        facts={name: facts.get(name) for name in KEPT},
        versions=dict(sorted(versions.items())),
        machine=machine,
        seconds=round(facts["seconds"], 3),
        peak_mb=facts["peak_mb"],
    )


def changes(name: str, old: Entry | None, new: Entry) -> Iterator[str]:
    """What differs between two entries of a cell, a sentence each."""
    if old is None:
        yield f"{name}: new"
        return
    for tool in sorted({*old.versions, *new.versions}):
        was, now = old.versions.get(tool), new.versions.get(tool)
        if was != now:
            yield f"{name}: {tool} {was or 'not used'} -> {now or 'not used'}"
    for fact, form in KEPT.items():
        # As they are written: the last digits of an error are those of a machine's kernels.
        facts = [entry.facts.get(fact) for entry in (old, new)]
        words = [form.format(value) if value is not None else "unknown" for value in facts]
        if words[0] != words[1]:
            yield f"{name}: {fact} {' -> '.join(words)}"
    differ = [
        file for file in sorted({*old.artifacts, *new.artifacts}) if old.artifacts.get(file) != new.artifacts.get(file)
    ]
    if differ:
        yield f"{name}: other bytes in {', '.join(differ[:3])}{' …' if len(differ) > 3 else ''}"


def gone(lock: Lock, names: Iterable[str]) -> list[str]:
    """Cells of the lock file that are not asked for any more."""
    return sorted(set(lock.cells) - set(names))
