"""``edgeattn sweep``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgeattn.sweep.run import Plan

#: Of a state: how it looks.
_STYLES = {"held": "green", "failed": "bold red", "toolchain": "yellow", "unsupported": "dim"}


@click.command("sweep", short_help="Export models in every target, precision and device of a matrix.")
@click.argument("matrix", type=click.Path())
@click.option("--output", "-o", type=click.Path(), metavar="FOLDER", help="For results. [default: NAME-sweep]")
@click.option("--workers", "-j", type=click.IntRange(min=1), help="Cells at once. [default: as cores and memory allow]")
@click.option("--retry", is_flag=True, help="Run again what failed, too.")
@click.option("--dry-run", is_flag=True, help="Say what would be run, and run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print all results as JSON.")
def command(matrix: str, output: str | None, workers: int | None, retry: bool, dry_run: bool, as_json: bool) -> None:
    """Export every model of MATRIX, a TOML file, in every target, precision and device that it names.

    Each cell is an export in a process of its own. A sweep that was stopped goes on where it was: a cell is run again
    only if what goes into it has changed. The folder then holds report.html, report.md, sweep.json and the bundles.

    Ends with 0 if every cell that can be run here held, with 1 if numbers of one did not, else with the code of what
    went wrong: 4 for a conversion, 3 for a toolchain that is missing.

    \b
      edgeattn sweep matrix.toml
      edgeattn sweep matrix.toml --dry-run
      edgeattn sweep matrix.toml --output results --workers 2
    """
    import json
    import time

    from edgeattn.cli._tasks import Tasks
    from edgeattn.core.files import write_whole
    from edgeattn.pipeline.executor import Processes
    from edgeattn.report.records.page import check_installed
    from edgeattn.report.sweep import html, markdown
    from edgeattn.sweep import matrix as files
    from edgeattn.sweep import results
    from edgeattn.sweep import run as sweeps

    file = files.read(Path(matrix))
    folder = Path(output) if output else Path(f"{file.name}-sweep")
    plan = sweeps.plan(files.entries(file, matrix), folder, retry)
    if dry_run:
        _list(plan)
        return
    check_installed()
    begun = time.perf_counter()
    tasks = Tasks(len(plan.kept) + len(plan.todo), len(plan.kept))
    try:
        with tasks as watch:
            found = sweeps.run(plan, folder, Processes(workers), watch)
    except KeyboardInterrupt:
        click.echo(f"{tasks.done} of {tasks.total} cells are done and kept; the same command goes on", err=True)
        raise
    data = results.plain(sweeps.summary(file.name, plan, found, time.perf_counter() - begun))
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)
    for name, content in (("sweep.json", f"{text}\n"), ("report.md", markdown(data)), ("report.html", html(data))):
        write_whole(folder / name, content.encode())
    if as_json:
        click.echo(text)
    else:
        _show(data, folder)
    sys.exit(sweeps.exit_code(data["cells"]))


def _list(plan: Plan) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import console, table

    todo = {entry.cell.sha256 for entry in plan.todo}
    rows = table("cell", "", "why")
    for entry in plan.entries:
        error = entry.error or {}
        kept = "[green]done before[/green]" if not entry.state else f"[yellow]{entry.state}[/yellow]"
        state = "to be run" if entry.cell.sha256 in todo else kept
        rows.add_row(
            escape(entry.label), state, escape(" ".join(str(error[k]) for k in ("what", "why") if error.get(k)))
        )
    console().print(rows)
    console().print(f"{len(plan.entries)} cells: {len(todo)} to be run, {len(plan.kept)} done before")


def _show(data: Mapping[str, Any], folder: Path) -> None:
    from rich.markup import escape
    from rich.text import Text

    from edgeattn.cli._show import console, table
    from edgeattn.report.sweep import evidence, word

    out = console()
    rows = table("cell", "state", "evidence")
    for row in data["cells"]:
        state = row["state"]
        rows.add_row(escape(row["label"]), Text(word(row), style=_STYLES[state]), Text(evidence(row)))
    out.print(rows)
    out.print()
    counts = {state: sum(row["state"] == state for row in data["cells"]) for state in _STYLES}
    kept = sum(bool(row.get("kept")) for row in data["cells"])
    words = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    out.print(f"{len(data['cells'])} cells: {words}; {kept} kept from before, {data['seconds']:.1f} s")
    for row in data["cells"]:
        if row["state"] == "failed" and (fix := row["error"].get("fix")):
            out.print(Text(f"{row['label']}: {fix}"), soft_wrap=True)
    out.print(f"wrote {escape(str(folder / 'report.html'))}, report.md, sweep.json", soft_wrap=True)
