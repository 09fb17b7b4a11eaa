"""From outcomes to items: what a cell is held to, and whether it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeattn.check.file import LEVELS, Wanted, place_in
from edgeattn.check.lock import Entry
from edgeattn.core import schema
from edgeattn.report.checks.data import Finding, Item, Place, Status

#: Fact, budget, and how the item and its numbers are called.
_LIMITS: tuple[tuple[str, str, str, str], ...] = (
    ("size_mb", "size_mb", "size", "{:.3f} MB"),
    ("parameters", "parameters", "parameters", "{:,}"),
    ("nodes", "nodes", "nodes", "{:,}"),
    ("macs", "macs", "MACs", "{:,}"),
    ("fallback", "max_fallback", "fallback", "{:.1%}"),
    ("peak_mb", "export_memory_mb", "export memory", "{:.0f} MB"),
    ("run_mb", "peak_memory_mb", "peak memory", "{:.0f} MB"),
)
_FIX = {
    "size_mb": "a smaller precision (w8, w4), or fewer parameters",
    "parameters": "edgeattn reparam MODEL shows where they are",
    "nodes": "edgeattn inspect BUNDLE lists them; edgeattn lint says which patterns cost some",
    "macs": "edgeattn inspect BUNDLE lists them by operation",
    "max_fallback": "edgeattn lint says which operations fall off, and what to write instead",
}
_AT_LEAST = {"note": "a note or worse", "warning": "a warning or worse", "error": "an error"}
#: Facts that are written like the limit of the same name.
_FORMS = {"relative_l2": "{:.3g}", "bytes": "{:,}", **{fact: form for fact, _, _, form in _LIMITS}}


#: A file's path as it is shown, or None for files outside of the user's own.
Inside = Callable[[str], str | None]


def judge(wanted: Wanted, outcome: Mapping[str, Any], locked: Entry | None, machine: str, inside: Inside) -> list[Item]:
    """What a cell is held to, but for its latency and its bytes.

    Args:
        outcome: see ``pipeline.cells.run_cell``. locked: what was accepted of the cell, if anything.
        machine: this one; times are compared on the same one only.
    """
    items = [_lint(wanted, outcome)]
    if not outcome["held"]:
        return _ended(wanted, outcome, items[0], inside)
    facts = outcome["facts"]
    items = [Item("export", "held", f"in {facts['seconds']:.1f} s", wanted.place()), _numbers(wanted, facts), *items]
    items += [item for item in (_accuracy(wanted, facts),) if item]
    items += _limits(wanted, facts)
    items += _against_lock(wanted, facts, locked, machine)
    return items


def _ended(wanted: Wanted, outcome: Mapping[str, Any], lint: Item, inside: Inside) -> list[Item]:
    """Items of an export that ended early: one failed, what it would have been held to is skipped."""
    error, stage = outcome["error"], outcome["stage"]
    by_lint = error["what"].startswith("lint: ")
    name = "lint" if by_lint else "export"
    if error["kind"] == "CheckFailed" and not by_lint:
        # Accuracy and numbers are looked at by the same stage, and end it with one error.
        looked = stage in ("reference", "reparameterize", "verify")
        name = "accuracy" if "accuracy" in error["what"] else "numerics" if looked else "export"
    if by_lint and lint.status == "failed":
        failed = lint
    else:
        failed = Item(
            name,
            "failed",
            ": ".join(part for part in (error["what"], error["value"]) if part),
            _place(wanted, error, name, inside),
            why=": ".join(part for part in (error["where"], error["why"]) if part),
            fix=error["fix"] or "",
            details=tuple(error["details"][:20]),
        )
    others = ["export", "numerics", "lint"]
    others += [name for _, budget, name, _ in _LIMITS if getattr(wanted.budgets, budget) is not None]
    passed = {"lint": lint} if lint is not failed and outcome["lint"] else {}
    because = f"the export ended at stage {stage}"
    skipped = [passed.get(n) or Item(n, "skipped", because, wanted.place()) for n in others if n != failed.name]
    return [failed, *skipped]


def _place(wanted: Wanted, error: Mapping[str, Any], name: str, inside: Inside) -> Place:
    """Of an error in a recipe or in the model's source its line there; of numbers the budget's; else the model's."""
    source = re.fullmatch(r"(.+\.py):(\d+)", error["where"] or "")
    if source and (shown := inside(source[1])):
        return Place(shown, int(source[2]))
    file = (error["where"] or "").partition(", ")[0]
    shown = inside(file) if file.endswith(".toml") and Path(file).is_file() else None
    if error["exit_code"] == 2 and shown is not None:
        try:
            lines = schema.lines_of(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return Place(shown)
        return place_in(shown, lines, error["why"] or "")
    if name == "numerics":
        return wanted.place("numerics", wanted.cell.precision)
    return wanted.place("accuracy_drop") if name == "accuracy" else wanted.place()


def findings_of(wanted: Wanted, outcome: Mapping[str, Any], inside: Inside) -> list[Finding]:
    """A cell's lint findings and their lines: of the model's source where they have one there, else of the model."""
    found = []
    for data in outcome["lint"]:
        path = Path(outcome["folder"], data["file"]) if data.get("file") else None
        file = inside(str(path)) if path and path.is_file() else None
        place = Place(file, data["line"]) if file else wanted.place()
        found.append(Finding(data, place, _fails(wanted, data)))
    return found


def _fails(wanted: Wanted, finding: Mapping[str, Any]) -> bool:
    return LEVELS.index(finding["severity"]) >= LEVELS.index(wanted.budgets.lint)


def _lint(wanted: Wanted, outcome: Mapping[str, Any]) -> Item:
    """The worst finding decides."""
    found = [f for f in outcome["lint"] if _fails(wanted, f)]
    found.sort(key=lambda f: -LEVELS.index(f["severity"]))
    place = wanted.place("lint")
    if not found:
        return Item(
            "lint", "held", f"{len(outcome['lint'])} findings, none of them {_AT_LEAST[wanted.budgets.lint]}", place
        )
    first, *rest = (f"{f['rule']} in module {f['module'] or '(model)'} ({f['target']}): {f['detail']}" for f in found)
    return Item("lint", "failed", first, place, found[0]["what"], found[0]["mend"], tuple(rest[:20]))


def _numbers(wanted: Wanted, facts: Mapping[str, Any]) -> Item:
    """They held, or there would be no bundle; the bound is the one that they were held to."""
    value, bound = facts["relative_l2"], facts["tolerance"]
    words = f"relative L2 {value:.3g}, allowed {bound:g}" if value is not None else f"allowed {bound:g}"
    place = wanted.place("numerics", wanted.cell.precision)
    random = "; random weights: it says little of a trained model" if facts["weights"] == "random" else ""
    return Item("numerics", "held", words + random, place, why=facts["unproven"])


def _accuracy(wanted: Wanted, facts: Mapping[str, Any]) -> Item | None:
    ours, reference, bound = facts["accuracy"], facts["reference_accuracy"], wanted.budgets.accuracy_drop
    place = wanted.place("accuracy_drop")
    if ours is None:
        why = "the recipe has no held-out samples"
        return None if bound is None else Item("accuracy", "skipped", why, place)
    allowed = "" if bound is None else f", allowed {bound:.2%}"
    return Item("accuracy", "held", f"{ours:.2%}, reference {reference:.2%}{allowed}", place)


def _limits(wanted: Wanted, facts: Mapping[str, Any]) -> Iterator[Item]:
    for fact, budget, name, form in _LIMITS:
        bound, value = getattr(wanted.budgets, budget), facts.get(fact)
        if bound is not None:
            yield _limit(name, value, bound, form, wanted.place(budget), _FIX.get(budget, ""))


def _limit(name: str, value: float | None, bound: float, form: str, place: Place, fix: str) -> Item:
    if value is None:
        return Item(name, "skipped", "not known of this artifact on this machine", place)
    words = f"{form.format(value)}, allowed {form.format(bound)}"
    return Item(name, "held", words, place) if value <= bound else Item(name, "failed", words, place, fix=fix)


def _against_lock(wanted: Wanted, facts: Mapping[str, Any], locked: Entry | None, machine: str) -> Iterator[Item]:
    """What may grow over what was accepted, and by how much."""
    update = "edgeattn check --update accepts what is there now"
    ratio = wanted.budgets.export_time_ratio
    asked: list[tuple[str, Place]] = [(f"growth of {f}", wanted.place("growth", f)) for f in wanted.budgets.growth]
    asked += [("export time", wanted.place("export_time_ratio"))] if ratio is not None else []
    if locked is None:
        yield from (Item(name, "skipped", "not in the lock file yet", place, fix=update) for name, place in asked)
        return
    for fact, share in wanted.budgets.growth.items():
        was, now, place = locked.facts.get(fact), facts.get(fact), wanted.place("growth", fact)
        if was is None or now is None:
            yield Item(f"growth of {fact}", "skipped", "not known", place)
            continue
        form = _FORMS[fact]
        words = f"{form.format(now)}, accepted {form.format(was)}, allowed {share:.1%} more"
        status: Status = "held" if now <= was * (1 + share) else "failed"
        yield Item(f"growth of {fact}", status, words, place, fix="" if status == "held" else update)
    if ratio is not None:
        place = wanted.place("export_time_ratio")
        if locked.machine != machine:
            yield Item("export time", "skipped", "accepted on another machine: times do not compare", place)
            return
        item = _limit("export time", facts["seconds"] / max(locked.seconds, 1e-3), ratio, "{:.2f}x", place, "")
        yield replace(item, words=f"{item.words}; {facts['seconds']:.1f} s, accepted {locked.seconds:.1f} s")


def locked_bytes(wanted: Wanted, outcome: Mapping[str, Any], locked: Entry | None) -> Item | None:
    """With ``--locked``: whether the artifact is the accepted one, byte for byte."""
    if not outcome["held"]:
        return None
    place, fix = wanted.place(), "edgeattn check --update accepts it and shows the difference"
    if locked is None:
        return Item("locked", "failed", "the cell is not in the lock file", place, fix=fix)
    differ = sorted(f for f, sha in outcome["artifacts"].items() if locked.artifacts.get(f) != sha)
    if differ or set(locked.artifacts) - set(outcome["artifacts"]):
        words = f"other bytes than accepted: {', '.join(differ[:3]) or 'files are missing'}"
        return Item("locked", "failed", words, place, fix=fix)
    return Item("locked", "held", "the accepted bytes", place)
