"""One page with all that a run of checks found: an artifact that CI keeps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgeattn.report.checks.data import Checked, Run
from edgeattn.report.checks.table import MARKS, headline, table
from edgeattn.report.page import page

_STYLE = """
table.cells th, table.cells td { text-align: left; vertical-align: top; padding-right: 14px; }
.held { color: #1a7f37; } .failed { color: #c1121f; } .warned { color: #9a6700; } .skipped { color: #777; }
td.held, td.failed, td.warned, td.skipped { font-weight: 600; white-space: nowrap; }
details { margin: 12px 0; border: 1px solid #ddd; border-radius: 6px; padding: 6px 12px; }
summary { cursor: pointer; font-weight: 600; }
code { background: #f4f4f4; padding: 1px 4px; }
"""


def html(run: Run) -> str:
    """The document."""
    heads, rows = table(run)
    state = "held" if run.held else "failed"
    body = [
        f'<h1>Export checks: <span class="{state}">{escape(headline(run))}</span></h1>',
        f'<p class="dim">{escape(run.file)}, {escape(run.created)}, EdgeAttn {escape(run.edgeattn)}, '
        f"{run.seconds:.0f} s</p>",
        _table(heads, [(cell.status, row) for cell, row in zip(run.cells, rows, strict=True)]),
        "<h2>What each export was held to</h2>",
        *(_cell(cell) for cell in run.cells),
    ]
    if run.changes:
        changes = "".join(f"<li>{escape(change)}</li>" for change in run.changes)
        body += ["<h2>Against the lock file</h2>", f"<ul>{changes}</ul>"]
    return page("EdgeAttn: export checks", body, width=1300, style=_STYLE)


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Each row with the status that colours its first cell."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = [
        "<tr>"
        + "".join(f'<td class="{status * (n == 0)}">{escape(text)}</td>' for n, text in enumerate(cells))
        + "</tr>"
        for status, cells in rows
    ]
    return f'<div class="wide"><table class="cells"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _cell(cell: Checked) -> str:
    rows = []
    for item in cell.items:
        found = "; ".join([item.words, *item.details[:5]])
        rows.append((item.status, (f"{MARKS[item.status]} {item.name}", found, item.why, item.fix, str(item.place))))
    parts = [_table(("check", "found", "why", "what to do", "asked for at"), rows)]
    if cell.lint:
        lines = []
        for finding in cell.lint:
            data = finding.data
            status = "failed" if finding.fails else "warned" if data["severity"] == "warning" else "skipped"
            words = (f"{data['severity']} {data['rule']}", data["module"] or "(model)", str(finding.place))
            lines.append((status, (*words, data["detail"], data["mend"])))
        parts.append(_table(("lint", "module", "place", "found", "what to do"), lines))
    if cell.facts:
        facts = ", ".join(
            f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in cell.facts.items()
            if value not in (None, "")
        )
        parts.append(f'<p class="dim">{escape(facts)}</p>')
    shown = " open" if cell.status != "held" else ""
    mark = f'<span class="{cell.status}">{MARKS[cell.status]}</span>'
    return f"<details{shown}><summary>{mark} {escape(cell.label)}</summary>{''.join(parts)}</details>"
