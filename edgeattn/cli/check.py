"""``edgeattn check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from edgeattn.check.run import Asked
    from edgeattn.core.errors import UsageError
    from edgeattn.report.checks.data import Run


@click.command("check", short_help="Check every export that a repository asks for, against its budgets.")
@click.argument("file", required=False, type=click.Path(), metavar="[edgeattn.toml]")
@click.option("--init", is_flag=False, flag_value="fmvit-digits", metavar="[MODEL]", help="Write a commented file.")
@click.option("--input", "-i", "inputs", multiple=True, metavar="NAME=SHAPE", help="With --init: an input of MODEL.")
@click.option("--update", is_flag=True, help="Accept what holds: write edgeattn.lock, and show the difference.")
@click.option("--locked", is_flag=True, help="Other artifacts than edgeattn.lock names are failures.")
@click.option("--baseline", type=click.Path(), metavar="FOLDER", help="Another commit's bundles, to compare latency.")
@click.option(
    "--output", "-o", type=click.Path(), metavar="FOLDER", help="Of the reports. [default: .edgeattn/reports]"
)
@click.option("--workers", type=click.IntRange(1), help="Exports at once. [default: by cores and memory]")
@click.option("--again", is_flag=True, help="Look at everything, also where nothing changed.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "github", "plain"]),
    default="auto",
    show_default=True,
    help="Annotations for GitHub, or none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    file: str | None,
    init: str | None,
    inputs: tuple[str, ...],
    update: bool,
    locked: bool,
    baseline: str | None,
    output: str | None,
    workers: int | None,
    again: bool,
    form: str,
    as_json: bool,
) -> None:
    """Export every model that edgeattn.toml lists, and hold each to its budgets.

    Numbers, accuracy, size, parameters, nodes, memory, lint, fallback, and latency against a baseline. What has not
    changed since the last run is not exported again. Ends with exit code 1 if anything does not hold.

    \b
      edgeattn check --init                   # a commented file, for fmvit-digits
      edgeattn check
      edgeattn check --update                 # accept what is there: edgeattn.lock
      edgeattn check --locked -o reports      # in CI: JUnit, SARIF, Markdown, HTML, JSON
    """
    import os

    from edgeattn.check import file as files
    from edgeattn.cli._show import console
    from edgeattn.core.errors import CheckFailed, UsageError

    path = Path(file or files.NAME)
    if init is not None:
        from edgeattn.check.init import write

        folder = Path(os.path.abspath(path)).parent
        if not folder.is_dir():
            raise UsageError("the folder does not exist", value=folder, where="edgeattn.toml")
        os.chdir(folder)  # where the file is looked up from
        write(folder / path.name, init, inputs)
        console().print(f"wrote {path}    (edgeattn check{'' if file is None else f' {path}'} runs it)", markup=False)
        return
    for given, words in ((inputs, "--input"), (update and locked, "--update and --locked")):
        if given:
            fix = "give it with --init" if given is inputs else "--update accepts what --locked would refuse"
            raise UsageError("the options do not go together", value=words, fix=fix)
    try:
        run, asked, reports = _run(path, update, locked, baseline, output, workers, again)
    except UsageError as error:
        if _github(form):
            click.echo(_annotation(error, path), err=as_json)
        raise
    if as_json:
        import json

        click.echo(json.dumps(run.as_dict(), indent=1, allow_nan=False, ensure_ascii=False))
    else:
        _show(console(), run, reports)
        if update:
            click.echo(f"wrote {asked.lock.name}" if run.changes else f"{asked.lock.name} says so already")
    if _github(form):
        from edgeattn.report.checks.ci import workflow_commands

        for line in workflow_commands(run):
            click.echo(line, err=as_json)
    if not run.held:
        from edgeattn.report.checks.table import headline

        raise CheckFailed(headline(run), where=str(path), fix="see what is said of each; edgeattn check runs it again")


def _run(
    path: Path, update: bool, locked: bool, baseline: str | None, output: str | None, workers: int | None, again: bool
) -> tuple[Run, Asked, Path]:
    """Run all from the file's own folder, and write the reports; paths of the command line are of the folder before."""
    import os

    from edgeattn.check import lock as locks
    from edgeattn.check.file import read
    from edgeattn.check.run import Asked, plan, run, work_of
    from edgeattn.check.work import Shown
    from edgeattn.cli._tasks import Tasks
    from edgeattn.core.errors import UsageError
    from edgeattn.core.files import check_writable
    from edgeattn.pipeline.executor import Processes
    from edgeattn.report.checks.files import write_all

    shown = Shown.here()
    folder = Path(os.path.abspath(path)).parent
    work = work_of(folder / path.name)
    reports = Path(output).resolve() if output else work / "reports"
    base = Path(baseline).resolve() if baseline else None
    if base is not None and not base.is_dir():
        raise UsageError("the baseline is no folder", value=baseline, where="--baseline")
    name = shown.name(str(folder / path.name)) or str(path)
    if folder.is_dir():
        os.chdir(folder)
    wanted = read(path if not folder.is_dir() else folder / path.name, name)
    check_writable(reports)
    asked = Asked(work, folder / f"{path.stem}.lock", locked, update, base, again, shown.name)
    planned = plan(wanted, asked)
    with Tasks(len(wanted), len(planned.kept)) as watch:
        done, lock = run(planned, asked, Processes(workers), watch, watch.say)
    if lock is not None:
        locks.write(asked.lock, lock)
    write_all(done, reports, os.environ.get("GITHUB_STEP_SUMMARY"))
    return done, asked, reports


def _annotation(error: UsageError, path: Path) -> str:
    """A file that cannot be read has a line too."""
    from edgeattn.report.checks.ci import command as annotation
    from edgeattn.report.checks.data import Place

    file, _, line = (error.where or "").partition(",")[0].rpartition(":")
    place = Place(file, int(line)) if file and line.isdigit() else Place(str(path))
    words = "\n".join(part for part in (error.what, error.why, error.fix) if part)
    return annotation("error", place, "edgeattn check", words)


def _show(out: Console, run: Run, reports: Path) -> None:
    """The table, what did not hold, what changed, and where the reports are."""
    from rich.text import Text

    from edgeattn.cli._show import table
    from edgeattn.report.checks.table import MARKS, NUMBERS, headline
    from edgeattn.report.checks.table import table as cells
    from edgeattn.report.records.words import plain

    colours = {"held": "green", "failed": "red", "warned": "yellow", "skipped": "dim"}
    heads, lines = cells(run)
    last = heads.index("what") if "what" in heads else len(heads)
    shown = table(*heads[:last], right=NUMBERS)
    for cell, line in zip(run.cells, lines, strict=True):
        mark, *rest = line[:last]
        state = "" if cell.status != "held" else "unchanged" if cell.cached else f"{cell.seconds:.0f} s"
        shown.add_row(
            Text(mark, style=f"bold {colours[cell.status]}"),
            *(Text(plain(text)) for text in rest),
            Text(state, style="dim"),
        )
    out.print(shown)
    for cell, item in (*run.failures(), *run.warnings()):
        out.print()
        words = Text(f"{MARKS[item.status]} ", style=f"bold {colours[item.status]}")
        out.print(words.append(plain(f"{cell.label}: {item.name}"), style="bold"), soft_wrap=True)
        rows = {"found": item.words, "why": item.why, "to do": item.fix, "at": str(item.place)}
        for label, text in rows.items():
            if text:
                out.print(Text(f"  {label:<6} ", style="bold").append(plain(text), style="not bold"), soft_wrap=True)
        for detail in item.details[:8]:
            out.print(Text(f"         {plain(detail)}", style="dim"), soft_wrap=True)
    if run.changes:
        out.print()
        out.print("against the lock file", style="bold")
        for change in run.changes:
            out.print(Text(f"  {plain(change)}"), soft_wrap=True)
    out.print()
    out.print(Text(headline(run), style=f"bold {'green' if run.held else 'red'}"))
    out.print(Text(f"reports: {reports}", style="dim"), soft_wrap=True)


def _github(form: str) -> bool:
    import os

    return form == "github" or (form == "auto" and os.environ.get("GITHUB_ACTIONS") == "true")
