"""A report as Markdown, fit for a comment on GitHub."""

from __future__ import annotations

import html
from collections.abc import Iterable

from edgeattn.profile.record import Operation, Record
from edgeattn.report.records.tables import Table, caveat_table, proof_table, summary
from edgeattn.report.records.words import ESTIMATE, NONE, count, names, number, plain

#: Operations that are listed of each record.
TOP = 10
#: GitHub refuses a comment that is longer; what does not fit any more is left away and said.
MOST = 65_000

_SPECIAL = str.maketrans(
    {char: f"\\{char}" for char in "\\`*_[]~#$|"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@<!-- -->"}
)


def escape(value: object) -> str:
    """A name as text of Markdown on one line: no markup, no table cell, nobody is mentioned."""
    return plain(value).translate(_SPECIAL)


def markdown(records: list[Record]) -> str:
    """Summary, what must be known, what is proven and what is not, and the operations that take most."""
    called = names(records)
    parts = [f"## {count(len(records), 'record')}", "", as_markdown(summary(records, called)), ""]
    if caution := caveat_table(records, called):
        parts += ["### To know", ""]
        for number_of, called_so, what, full in caution.rows:
            words = _note(what.badges[0].text, full.text)
            parts.append(f"- \\#{number_of.text} {escape(called_so.text)}: {words}")
        parts.append("")
    if proof := proof_table(records, called):
        parts += ["### Proven, and not", "", as_markdown(proof), ""]
    left = 0
    for index, (record, name) in enumerate(zip(records, called, strict=True), 1):
        if ops := _operations(record):
            head = f"<summary>{index}. {_html(name)}: operations that take most</summary>"
            part = ["<details>", head, "", *ops, "", "</details>", ""]
            if sum(map(len, parts)) + sum(map(len, part)) + len(parts) + len(part) > MOST:
                left += 1
                continue
            parts += part
    if left:
        parts += [f"Operations of {count(left, 'record')} are left away: a comment would be too long.", ""]
    return "\n".join(parts)


def _html(name: str) -> str:
    """For a block of HTML, in which Markdown's own escapes do not count."""
    return html.escape(plain(name)).replace("@", "@<!-- -->")


def _note(short: str, full: str) -> str:
    return escape(full) if short in full or short.endswith("…") else f"{escape(short)}: {escape(full)}"


def as_markdown(table: Table) -> str:
    """A table with a heading; what is below a cell's text stands behind it."""
    heads = [f"{column.name}, {column.unit}" if column.unit else column.name for column in table.columns]
    lines = [_line(map(escape, heads)), _line("--:" if column.figure else "---" for column in table.columns)]
    for row in table.rows:
        cells = []
        for cell in row:
            small = f" ({escape(cell.small)})" if cell.small else ""
            badges = "".join(f" **{escape(badge.text)}**" for badge in cell.badges)
            cells.append((f"{escape(cell.text)}{small}{badges}" if cell.text else f"{badges}{small}").strip())
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _operations(record: Record) -> list[str]:
    operations = record.breakdown.operations
    timed = any(op.ms is not None for op in operations)

    def cost(op: Operation) -> float:
        return (op.ms if timed else op.estimate_ms) or 0.0

    shown = [op for op in sorted(operations, key=cost, reverse=True)[:TOP] if cost(op)]
    if not shown:
        return []
    total = sum(map(cost, operations))
    head = "ms" if timed else f"ms, {ESTIMATE}"
    lines = [_line(("module", "kind", "unit", head, "%")), _line(("---", "---", "---", "--:", "--:"))]
    for op in shown:
        place = escape(op.module or op.name) or NONE
        lines.append(_line((place, escape(op.op), escape(op.unit), number(cost(op)), f"{100 * cost(op) / total:.1f}")))
    return lines
