"""A page of Markdown: what GitHub shows as a step's summary, and what a merge request can quote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from edgeattn.report.checks.data import Run
from edgeattn.report.checks.table import MARKS, headline, table

_GATE = ("cell", "verdict", "ratio", "interval", "the baseline against itself")
_LINT = ("severity", "rule", "model", "module", "place", "what to do")

#: Rows of a table: GitHub shows nothing of a summary that is larger than 1 MiB.
_MOST = 200


def markdown(run: Run) -> str:
    """The page."""
    parts = [f"## EdgeAttn: {headline(run)}", _table(*table(run))]
    failures, warnings = list(run.failures()), list(run.warnings())
    for title, found in (("What did not hold", failures), ("What to know", warnings)):
        if not found:
            continue
        parts.append(f"### {title}")
        for cell, item in found:
            lines = [f"- {MARKS[item.status]} **{_text(cell.label)}: {_text(item.name)}**: {_text(item.words)}"]
            lines += [f"  <br>{_text(item.why)}"] if item.why else []
            lines += [f"  <br>To do: {_text(item.fix)}"] if item.fix else []
            parts.append("\n".join([*lines, f"  <br>{_text(str(item.place))}"]))
    gates = [cell for cell in run.cells if cell.latency]
    if gates:
        parts.append("### Latency against the baseline")
        parts.append(_table(_GATE, (_gate(cell.label, dict(cell.latency or {})) for cell in gates)))
    findings = [(cell, finding) for cell in run.cells for finding in cell.lint]
    if findings:
        rows = []
        for cell, finding in findings:
            data, model = finding.data, f"{cell.suite}, {finding.data['target']}"
            rows.append(
                (data["severity"], data["rule"], model, data["module"] or "(model)", str(finding.place), data["mend"])
            )
        different = list(dict.fromkeys(rows))
        body = _table(_LINT, different[:_MOST]) + _rest(different)
        parts.append(f"<details><summary>Lint: {len(different)} findings</summary>\n\n{body}\n\n</details>")
    if run.changes:
        listed = "\n".join(f"- {_text(change)}" for change in run.changes[:_MOST]) + _rest(run.changes)
        title = f"<summary>{len(run.changes)} changes against the lock file</summary>"
        parts.append(f"<details>{title}\n\n{listed}\n\n</details>")
    parts.append(f"EdgeAttn {run.edgeattn}, {run.created}, {run.seconds:.0f} s, checks of {_text(run.file)}")
    return "\n\n".join(parts) + "\n"


def _gate(label: str, verdict: dict[str, object]) -> tuple[str, ...]:
    cells = [label, str(verdict["verdict"])]
    for name in ("ratio", "self_check"):
        ratio = verdict[name]
        if not isinstance(ratio, dict):
            cells += ["", ""] if name == "ratio" else [""]
            continue
        interval = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        cells += [f"{ratio['value']:.3f}x", interval] if name == "ratio" else [interval]
    return tuple(cells)


def _rest(rows: Sequence[object]) -> str:
    return f"\n\nand {len(rows) - _MOST} more, in report.html" if len(rows) > _MOST else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """As plain text: no HTML, no table cells, no emphasis or links out of somebody's names."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", " ".join(text.split()))
