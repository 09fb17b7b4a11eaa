"""Runs the cells of a file: what changed is exported, all of it is judged, and what came of it is kept."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.bundle.runner_state import about
from edgeattn.check import lock as locks
from edgeattn.check.file import NAME, Wanted
from edgeattn.check.judge import Inside, findings_of, judge, locked_bytes
from edgeattn.check.latency import Gates
from edgeattn.core.errors import EdgeAttnError
from edgeattn.core.files import write_whole
from edgeattn.core.hashing import sha256_data, sha256_sources
from edgeattn.pipeline.cells import CALL, no_outcome, planned_key, stands
from edgeattn.pipeline.executor import Executor, Task, Watcher
from edgeattn.pipeline.stages import PACKAGE
from edgeattn.report.checks.data import Checked, Item, Run

#: Beside the file: bundles, results of the last run, baselines. Nothing in it is for version control.
WORK = ".edgeattn"


@dataclass(frozen=True)
class Asked:
    """How a file is checked.

    Attributes:
        work: folder of bundles and results. lock: the lock file.
        locked: other bytes than accepted are failures. update: accept what holds.
        baseline: folder of another commit's bundles, in place of the accepted ones.
        again: run all cells, also those of which nothing changed.
        inside: see ``check.judge.Inside``.
    """

    work: Path
    lock: Path
    locked: bool = False
    update: bool = False
    baseline: Path | None = None
    again: bool = False
    inside: Inside = field(default=lambda file: file)


def machine() -> str:
    """This machine in words, as far as times depend on it."""
    here = about()
    return f"{here['cpu'] or platform.processor() or 'unknown CPU'}, {here['cores']} cores, {here['system']}"


@dataclass(frozen=True)
class Plan:
    """What there is to do: all cells, outcomes of those of which nothing changed, and the names of the others."""

    wanted: Sequence[Wanted]
    kept: Mapping[str, dict[str, Any]]
    todo: tuple[str, ...]


def plan(wanted: Sequence[Wanted], asked: Asked) -> Plan:
    """Looks at what goes into each cell; exports nothing.

    Raises:
        UsageError: the work folder cannot be written.
    """
    _make_work(asked.work)
    kept = {} if asked.again else {one.id: found for one in wanted if (found := _kept(asked, one)) is not None}
    return Plan(wanted, kept, tuple(one.id for one in wanted if one.id not in kept))


def run(
    planned: Plan, asked: Asked, executor: Executor, watch: Watcher, say: Callable[[str], None]
) -> tuple[Run, locks.Lock | None]:
    """Export what changed, and judge all.

    Returns:
        What came of it, and with ``asked.update`` the lock file's new content.

    Raises:
        UsageError: the lock file cannot be read. KeyboardInterrupt: Ctrl-C; the results of finished cells are kept.
    """
    begun, here = time.perf_counter(), machine()
    lock = locks.read(asked.lock)
    wanted, fresh = planned.wanted, set(planned.todo)
    outcomes = _outcomes(planned, asked, executor, watch)
    gates = Gates(asked.work, _bundles(asked), here, say, asked.again)
    cells: list[Checked] = []
    entries: dict[str, locks.Entry] = {}
    accepted: dict[str, locks.Entry] = {}
    for one in wanted:
        outcome, locked = outcomes[one.id], lock.cells.get(one.id) if lock else None
        if outcome["held"] and one.budgets.peak_memory_mb is not None and _measure_memory(outcome, say):
            _keep(asked, one, outcome)
        items = judge(one, outcome, locked, here, asked.inside)
        if asked.locked and (item := locked_bytes(one, outcome, locked)):
            items.append(item)
        latency = None
        if one.budgets.latency and not asked.update:
            item, latency = gates.check(one, outcome, locked)
            items.append(item)
        if outcome["held"]:
            entries[one.id] = locks.entry_of(Bundle.open(outcome["bundle"]), outcome, here)
            if asked.update and not any(item.status == "failed" and not of_lock(item) for item in items):
                accepted[one.id] = _entry(one, entries[one.id], locked, items)
                items = [_accepting(item) for item in items]
                if one.budgets.latency:
                    gates.accept(one, Path(outcome["bundle"]))
        facts, lint = outcome["facts"] if outcome["held"] else {}, findings_of(one, outcome, asked.inside)
        cells.append(
            Checked(
                one.suite,
                one.name,
                outcome["cell"],
                tuple(items),
                facts,
                tuple(lint),
                outcome["bundle"],
                one.id not in fresh,
                outcome["facts"].get("wall_s", 0.0) if one.id in fresh else 0.0,
                latency,
            )
        )
    new = _lock(lock, accepted, wanted) if asked.update else None
    shown = entries if new is None else new.cells
    changes = _changes(lock, shown, [one.id for one in wanted]) if lock or new else []
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    done = Run(wanted[0].file, created, edgeattn.__version__, tuple(cells), tuple(changes), time.perf_counter() - begun)
    return done, new


def _outcomes(planned: Plan, asked: Asked, executor: Executor, watch: Watcher) -> dict[str, dict[str, Any]]:
    """Of all cells, by name."""
    tasks, by_key = {}, {}
    for one in planned.wanted:
        if one.id in planned.todo:
            argument = {"cell": one.cell.to_dict(), "output": str(asked.work / "bundles" / one.folder)}
            tasks[one.id] = Task(sha256_data({"call": CALL, **argument}), CALL, argument, one.id)
            by_key[tasks[one.id].key] = one
    done = executor.run(list(tasks.values()), _Keeping(watch, lambda key, o: _keep(asked, by_key[key], o)))
    made = {name: (done[task.key], by_key[task.key].cell) for name, task in tasks.items()}
    return {**planned.kept, **{name: d.result or no_outcome(cell, d.error) for name, (d, cell) in made.items()}}


class _Keeping:
    """A watcher that keeps each result as it comes, so that Ctrl-C loses none."""

    def __init__(self, watch: Watcher, keep: Callable[[str, dict[str, Any]], None]) -> None:
        self._watch, self._keep = watch, keep
        self.started, self.said = watch.started, watch.said

    def finished(self, task: Task, done: Any) -> None:
        """See ``Watcher``."""
        if done.result is not None:
            self._keep(task.key, done.result)
        self._watch.finished(task, done)


def work_of(file: Path) -> Path:
    """The work folder of a file: ``.edgeattn`` beside it, in which another file than edgeattn.toml has a part."""
    return file.parent / WORK if file.name == NAME else file.parent / WORK / file.stem


def _bundles(asked: Asked) -> Path | None:
    """Another commit's bundles, of its checkout too; None without a baseline."""
    if asked.baseline is None:
        return None
    checkout = asked.baseline / asked.work.relative_to(asked.lock.parent) / "bundles"
    return checkout if checkout.is_dir() else asked.baseline


def _make_work(work: Path) -> None:
    """With a file that keeps it out of version control."""
    ignore = work / ".gitignore"
    if not ignore.is_file():
        write_whole(ignore, b"# Made by edgeattn check: bundles and results, which it makes again.\n*\n")


def _file(asked: Asked, one: Wanted) -> Path:
    return asked.work / "results" / f"{sha256_data(one.id)}.json"


def _code() -> str:
    """What makes facts of a bundle: results of other code are made again."""
    return sha256_sources(PACKAGE, ("pipeline/cells.py", "profile/roofline.py"))


def _keep(asked: Asked, one: Wanted, outcome: Mapping[str, Any]) -> None:
    """A result that the next run need not make again."""
    data = {"code": _code(), "cell": one.cell.to_dict(), "outcome": outcome}
    write_whole(_file(asked, one), json.dumps(data, allow_nan=False).encode())


def _kept(asked: Asked, one: Wanted) -> dict[str, Any] | None:
    """The cell's last outcome, if nothing that goes into it has changed and its bundle is still there."""
    try:
        data = json.loads(_file(asked, one).read_text(encoding="utf-8"))
        outcome: dict[str, Any] = data["outcome"]
        same = data["code"] == _code() and data["cell"] == one.cell.to_dict()
        return outcome if same and stands(outcome, planned_key(one.cell)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure_memory(outcome: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Sets the fact ``run_mb``, what a process that runs the bundle takes; False where it is known, or cannot be."""
    from edgeattn.profile.measure import Effort
    from edgeattn.profile.run import Wanted as Runs
    from edgeattn.profile.run import jobs_of, measure

    if outcome["facts"].get("run_mb") is not None:
        return False
    bundle = Bundle.open(outcome["bundle"])
    try:
        jobs = jobs_of([bundle], Runs(backend=bundle.manifest.backend))
        effort = Effort(rounds=1, runs=3, warmup=1, operations=False)
        records = measure(jobs, "local", effort, say).records
    except EdgeAttnError:
        return False
    outcome["facts"]["run_mb"] = records[0].memory.peak_rss_mb if records else None
    return True


def _changes(lock: locks.Lock | None, entries: Mapping[str, locks.Entry], names: Sequence[str]) -> list[str]:
    """What differs from the lock file."""
    old = lock or locks.Lock()
    found = [text for name, entry in entries.items() for text in locks.changes(name, old.cells.get(name), entry)]
    return found + [f"{name}: not asked for any more" for name in locks.gone(old, names)]


def _entry(one: Wanted, entry: locks.Entry, before: locks.Entry | None, items: Sequence[Item]) -> locks.Entry:
    """What is accepted of a cell: of the same artifact on the same versions and machine the first seconds stay."""
    slower = any(item.name == "export time" and item.status == "failed" for item in items)
    same = before is not None and before.machine == entry.machine and not list(locks.changes(one.id, before, entry))
    return before if before is not None and same and not slower else entry


def _lock(lock: locks.Lock | None, accepted: Mapping[str, locks.Entry], wanted: Sequence[Wanted]) -> locks.Lock:
    """The lock file with what is accepted; what does not hold stays as it was, and what nobody asks for goes."""
    old = lock.cells if lock else {}
    found = {one.id: accepted.get(one.id) or old.get(one.id) for one in wanted}
    return locks.Lock(cells={name: entry for name, entry in found.items() if entry is not None})


def of_lock(item: Item) -> bool:
    """Whether an item holds a cell against what was accepted before, so that accepting anew mends it."""
    return item.name.startswith("growth of ") or item.name in ("export time", "locked", "latency")


def _accepting(item: Item) -> Item:
    """With ``--update`` what was held against the lock file is no failure: it is what is accepted."""
    if item.status != "failed":
        return item
    return replace(item, status="held", words=f"{item.words}; accepted now", fix="")
