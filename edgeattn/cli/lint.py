"""``edgeattn lint``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import job_options, parse_args

if TYPE_CHECKING:
    from rich.console import Console

    from edgeattn.lint import Finding, Severity
    from edgeattn.lint.fix import Fix

#: Worst first, with their colours.
_COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
#: Modules shown under a rule.
_MODULES = 12


@click.command("lint", short_help="Show what in a model is known to go wrong or slow on a target.")
@job_options
@click.option("--rules", "files", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help="More rules.")
@click.option(
    "--fix", "fixing", is_flag=True, help="Show what the safe mends change in the graph, each with its proof."
)
@click.option("--list", "listing", is_flag=True, help="List all rules, or those of --target; MODEL is left away.")
@click.option("--sarif", "log", metavar="FILE", type=click.Path(path_type=Path), help="Write SARIF 2.1.0, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every module.")
def command(
    args: tuple[str, ...],
    files: tuple[Path, ...],
    fixing: bool,
    listing: bool,
    log: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what in MODEL is known to go wrong or slow on a target, in which modules, and how it is mended.

    The model is built, reparameterized and captured; nothing is converted, and the target's toolchain is not needed. It
    is asked which operations it knows, if it is here. Rules of your own are TOML files in the folder lint beside your
    own recipes, or those of --rules.

    Ends with exit code 1 where an export would end before its conversion, or where a mend of --fix does not hold.
    """
    import json

    from edgeattn.cli._show import console
    from edgeattn.core.errors import UsageError

    if listing:
        if given["model"] is not None or fixing or log:
            raise UsageError("a list of rules takes no model", value=given["model"], fix="leave away all but --target")
        _list(console(), given["target"], files, as_json)
        return
    if given["model"] is None:
        raise UsageError("no model was given", where="edgeattn lint MODEL", fix="name one, or --list the rules")

    from edgeattn.core.files import write_whole
    from edgeattn.lint import gate

    found, fixes, base, device = _run(given, parse_args(args), files, fixing)
    flat = [(target, finding) for target, part in found.items() for finding in part]
    if log is not None:
        from edgeattn.report.sarif import sarif

        write_whole(log, json.dumps(sarif(flat, base, given["model"]), indent=1).encode())
    if as_json:
        data: dict[str, Any] = {"model": given["model"], "device": device}
        data["findings"] = [{"target": target, **finding.as_dict()} for target, finding in flat]
        if fixing:
            data["fixes"] = [{"target": target, **one.as_dict()} for target, part in fixes.items() for one in part]
        click.echo(json.dumps(data, indent=1))
    else:
        for target, part in found.items():
            _show(console(), target, part)
            if fixing:
                _show_fixes(console(), target, fixes[target])
    gate([finding for _, finding in flat])
    _gate_fixes([one for part in fixes.values() for one in part])


#: For --list there is none.
next(one for one in command.params if one.name == "model").required = False


def _run(
    given: dict[str, Any], args: dict[str, Any], files: tuple[Path, ...], fixing: bool
) -> tuple[dict[str, list[Finding]], dict[str, list[Fix]], Path, str | None]:
    """Findings and fixes by target, the folder that the findings' files are relative to, and the device."""
    import tempfile

    from edgeattn import targets
    from edgeattn.cli._show import Live
    from edgeattn.lint import Finding
    from edgeattn.lint.books import user_books
    from edgeattn.pipeline.cache import Cache
    from edgeattn.pipeline.export import make_job
    from edgeattn.pipeline.run import run_plan

    targets.check_rules(user_books(files))  # a mistake in them is said before anything runs
    live = Live()
    found: dict[str, list[Finding]] = {}
    fixes: dict[str, list[Fix]] = {}
    try:
        job = make_job(**given, args=args, check_tools=False)
        for part in job.parts:
            records = run_plan(part, Cache.default(), live, upto="lint").records
            found[part.target] = [Finding(**finding) for finding in records["lint"].facts["findings"]]
            if not files and not fixing:
                continue
            from edgeattn.pipeline.context import Context, Result
            from edgeattn.pipeline.stages import lint

            results = {name: Result(record.folder, record.facts) for name, record in records.items()}
            with tempfile.TemporaryDirectory() as folder:
                context = Context(part, Path(folder), results)
                found[part.target] += lint.by_files(context, files) if files else []
                fixes[part.target] = lint.fixes(context, found[part.target]) if fixing else []
    finally:
        live.stop()
    return found, fixes, Path(job.resolved.folder), job.device


def _show(out: Console, target: str, findings: list[Finding]) -> None:
    """Findings by rule, the worst first: what it is, where it is, how it is mended."""
    from collections import Counter

    from rich.markup import escape

    from edgeattn.cli._show import table

    rules: dict[tuple[Severity, str], list[Finding]] = {}
    for severity in _COLOURS:
        for finding in findings:
            if finding.severity == severity:
                rules.setdefault((severity, finding.rule), []).append(finding)
    for (severity, rule), held in rules.items():
        colour = _COLOURS[severity]
        out.print(f"[bold {colour}]{severity}[/] [bold]{escape(rule)}[/]  {escape(held[0].what)}", soft_wrap=True)
        rows = table("  module", "detail", "line")
        places = Counter((f.module or "(model)", f.detail, f"{f.file}:{f.line}" if f.file else "") for f in held)
        for (module, detail, line), count in list(places.items())[:_MODULES]:
            times = f", {count} times" if count > 1 else ""
            rows.add_row(f"  {escape(module)}", escape(f"{detail}{times}"), escape(line))
        if len(places) > _MODULES:
            rows.add_row(f"  and {len(places) - _MODULES} more", "--json lists them all", "")
        out.print(rows)
        for mend in dict.fromkeys(finding.mend for finding in held):
            out.print(f"  [bold]mend[/]  {escape(mend)}", soft_wrap=True)
        out.print()
    counts = Counter(finding.severity for finding in findings)
    counted = ", ".join(f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in _COLOURS if counts[s])
    out.print(f"{target}: {counted or 'nothing found'}", soft_wrap=True)


def _show_fixes(out: Console, target: str, fixes: list[Fix]) -> None:
    """What each mend changes, and its proof."""
    from rich.markup import escape

    from edgeattn.cli._show import table

    def words(operations: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" if count > 1 else name for name, count in operations.items()) or "nothing"

    for one in fixes:
        state = "[bold green]holds[/]" if one.holds else "[bold red]refused[/]"
        whose = f"the lowering of target {target} does so already" if one.applied else "for the model: write it so"
        out.print(f"\n[bold]fix {escape(one.rule)}[/]  {one.mend}, {whose}", soft_wrap=True)
        rows = table("  module", "before", "after")
        for module, (before, after) in list(one.modules.items())[:_MODULES]:
            rows.add_row(f"  {escape(module or '(model)')}", words(before), words(after))
        if len(one.modules) > _MODULES:
            rows.add_row(f"  and {len(one.modules) - _MODULES} more", "--json lists them all", "")
        out.print(rows)
        finite = f", {one.nonfinite} numbers not finite" if one.nonfinite else ""
        many = f"{one.samples} sample{'s' * (one.samples > 1)}"
        out.print(f"  {state}  outputs are {one.worst:.1e} apart (relative L2, {many}){finite}", soft_wrap=True)
    if not fixes:
        out.print("no safe mend for what was found")


def _gate_fixes(fixes: list[Fix]) -> None:
    """Raises CheckFailed where a mend changes the outputs."""
    from edgeattn.core.errors import CheckFailed
    from edgeattn.lint.fix import NEAR

    refused = [one for one in fixes if not one.holds]
    if refused:
        first = refused[0]
        raise CheckFailed(
            f"mend {first.mend} changes the outputs",
            value=f"relative L2 {first.worst:.3g}, {first.nonfinite} numbers not finite, {first.samples} samples",
            where=f"rule {first.rule}",
            why=f"allowed are {NEAR:g}",
            fix="mend the model by hand; what the rule says holds all the same",
            details=[f"{one.mend}, rule {one.rule}: {one.worst:.3g}" for one in refused[1:]],
        )


def _list(out: Console, target: str | None, files: tuple[Path, ...], as_json: bool) -> None:
    """All rules, with what they rest on."""
    import json

    from rich.markup import escape

    from edgeattn import targets
    from edgeattn.cli._show import table
    from edgeattn.lint.books import every, user_books

    if target is not None:
        targets.get(target)  # an unknown one is an error
    wanted = set(targets.get(target).parts or (target,)) if target else set()
    rows = [
        {"rule": name, "targets": list(held), "from": source, **rule.model_dump(include=_COLUMNS)}
        for source, name, held, rule in every(targets.names(), user_books(files))
        if not wanted or not held or wanted & set(held)
    ]
    if as_json:
        click.echo(json.dumps({"rules": rows}, indent=1))
        return
    shown = table("rule", "severity", "targets", "measured with", "what, and why it is known")
    for row in rows:
        versions = ", ".join(f"{name} {bounds}" for name, bounds in row["versions"].items())
        words = f"{row['what']}. {row['evidence']}"
        cells = (row["rule"], row["severity"], ", ".join(row["targets"]) or "all", versions, words)
        shown.add_row(*(escape(str(cell)) for cell in cells))
    out.print(shown)
    out.print(f"{len(rows)} rules")


_COLUMNS = {"severity", "what", "evidence", "mend", "versions", "fix"}
