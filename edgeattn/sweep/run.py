"""Runs the cells of a matrix: what stands is kept, the rest is done by an executor, and each result is kept at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import edgeattn
from edgeattn.core.files import check_writable
from edgeattn.pipeline.cells import CALL, no_outcome, planned_key, stands
from edgeattn.pipeline.executor import Done, Executor, Task, Watcher
from edgeattn.sweep import results
from edgeattn.sweep.matrix import Entry

SCHEMA = 1
#: Exit codes of cells that were run and did not hold, the one that the sweep ends with first.
_CODES = (1, 4, 2, 5, 3)


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do.

    Attributes:
        kept: results of cells that stand, by the cell's digest, see ``results.read``.
        todo: cells that are to be run.
    """

    entries: list[Entry]
    kept: dict[str, dict[str, Any]]
    todo: list[Entry]


def plan(entries: Sequence[Entry], output: Path, retry: bool) -> Plan:
    """Which cells stand in the folder ``output``, and which are to be run. Builds nothing."""
    kept: dict[str, dict[str, Any]] = {}
    for entry in entries:
        found = None if entry.state else results.read(output / "cells", entry.cell)
        again = found is None or (retry and not found["outcome"]["held"])
        if found and not again and stands(found["outcome"], planned_key(entry.cell)):
            kept[entry.cell.sha256] = found
    todo = [entry for entry in entries if not entry.state and entry.cell.sha256 not in kept]
    return Plan(list(entries), kept, _mixed(todo))


def _mixed(todo: list[Entry]) -> list[Entry]:
    """The models in turn: cells of one model wait for each other, since they are built from the same."""
    models: dict[str, list[Entry]] = {}
    for entry in todo:
        models.setdefault(entry.name, []).append(entry)
    return [entry for entry in chain.from_iterable(zip_longest(*models.values())) if entry is not None]


def run(plan: Plan, output: Path, executor: Executor, watch: Watcher) -> dict[str, dict[str, Any]]:
    """Do what is to be done; a result by the cell's digest, for all that can be run.

    Raises:
        UsageError: ``output`` cannot be written. KeyboardInterrupt: what was finished is kept.
    """
    check_writable(output)
    keeper = _Keeper({entry.cell.sha256: entry for entry in plan.todo}, output, watch)
    executor.run([_task(entry, output) for entry in plan.todo], keeper)
    return plan.kept | keeper.found


def _task(entry: Entry, output: Path) -> Task:
    argument = {"cell": entry.cell.to_dict(), "output": str(output / "bundles" / entry.folder)}
    return Task(entry.cell.sha256, CALL, argument, entry.label)


@dataclass
class _Keeper:
    """A ``Watcher`` that keeps what is finished."""

    entries: dict[str, Entry]
    output: Path
    watch: Watcher
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def started(self, task: Task, attempt: int) -> None:
        """See ``Watcher``."""
        self.watch.started(task, attempt)

    def said(self, task: Task, text: str) -> None:
        """See ``Watcher``."""
        self.watch.said(task, text)

    def finished(self, task: Task, done: Done) -> None:
        """See ``Watcher``."""
        entry = self.entries[task.key]
        outcome = done.result or no_outcome(entry.cell, done.error)
        results.write(self.output / "cells", entry.cell, outcome, done.attempts, done.seconds, done.peak_mb)
        kept = results.read(self.output / "cells", entry.cell)
        assert kept is not None  # it was just written
        self.found[task.key] = kept
        self.watch.finished(task, done)


def summary(name: str, plan: Plan, found: Mapping[str, Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """All of a sweep as plain data, see ``report.sweep``.

    Args:
        found: what ``run`` gave. seconds: that it took.
    """
    return {
        "schema": SCHEMA,
        "name": name,
        "edgeattn": edgeattn.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": seconds,
        "cells": list(_rows(plan, found)),
    }


def _rows(plan: Plan, found: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in plan.entries:
        cell = entry.cell
        row: dict[str, Any] = {"id": cell.sha256, "model": entry.name, "target": cell.target}
        row |= {"precision": cell.precision, "device": cell.device, "label": entry.label, "cell": cell.to_dict()}
        if entry.state:
            yield row | {"state": entry.state, "error": entry.error}
            continue
        one = found[cell.sha256]
        outcome = one["outcome"]
        row |= {k: outcome[k] for k in ("error", "stage", "bundle", "digest", "key", "facts", "lint", "artifacts")}
        row |= {k: one[k] for k in ("attempts", "seconds", "peak_mb")}
        yield row | {
            "state": "held" if outcome["held"] else "failed",
            "kept": cell.sha256 in plan.kept,
            "stages": outcome["stages"],
        }


def exit_code(cells: Sequence[Mapping[str, Any]]) -> int:
    """0 if every cell that can be run here held, else the code of what went wrong: 1 before 4 before 2.

    A toolchain that is missing counts last: 3 only if all else held.
    """
    codes = {cell["error"]["exit_code"] for cell in cells if cell["state"] == "failed"}
    codes |= {3 for cell in cells if cell["state"] == "toolchain"}
    return next((code for code in _CODES if code in codes), 0)
