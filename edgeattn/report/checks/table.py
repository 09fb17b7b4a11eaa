"""The table of cells that the terminal, Markdown and the page have in common."""

from __future__ import annotations

from edgeattn.report.checks.data import Checked, Run, Status

HEADS = (
    "",
    "model",
    "target",
    "precision",
    "device",
    "relative L2",
    "accuracy",
    "MB",
    "nodes",
    "lint",
    "latency",
    "what",
)
#: Columns of numbers.
NUMBERS = ("relative L2", "accuracy", "MB", "nodes", "lint", "latency")
MARKS: dict[Status, str] = {"held": "✓", "failed": "✗", "warned": "!", "skipped": "–"}


def headline(run: Run) -> str:
    """The result in a sentence."""
    counts = run.counts()
    failed, total = counts["failed"], len(run.cells)
    exports = f"{total} export{'s' * (total != 1)}"
    if failed:
        return f"{failed} of {exports} did not hold"
    warned = f", {counts['warned']} with a warning" if counts["warned"] else ""
    return f"all {exports} held{warned}" if total > 1 else f"the export held{warned}"


def table(run: Run) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and a row for each cell, without columns in which no cell says anything."""
    rows = [_row(cell) for cell in run.cells]
    kept = [n for n, _ in enumerate(HEADS) if any(row[n] for row in rows)]
    return tuple(HEADS[n] for n in kept), [tuple(row[n] for n in kept) for row in rows]


def _row(cell: Checked) -> tuple[str, ...]:
    """The cell's line, in the order of ``HEADS``."""
    facts, ratio = cell.facts, (cell.latency or {}).get("ratio")
    value, accuracy, size, nodes = (facts.get(name) for name in ("relative_l2", "accuracy", "size_mb", "nodes"))
    failed = [item for item in cell.items if item.status == "failed"]
    warned = [item for item in cell.items if item.status == "warned"]
    what = "; ".join(f"{item.name}: {item.words}" for item in (*failed, *warned))
    return (
        MARKS[cell.status],
        cell.suite,
        str(cell.cell["target"]),
        str(cell.cell["precision"]),
        str(cell.cell["device"] or ""),
        "" if value is None else f"{value:.2e}",
        "" if accuracy is None else f"{accuracy:.2%}",
        "" if size is None else f"{size:.2f}",
        "" if nodes is None else f"{nodes:,}",
        _lint(cell),
        f"{ratio['value']:.3f}x" if ratio else "",
        what or ("unchanged" if cell.cached else ""),
    )


def _lint(cell: Checked) -> str:
    counts = {level: sum(f.data["severity"] == level for f in cell.lint) for level in ("error", "warning", "note")}
    return ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count)
