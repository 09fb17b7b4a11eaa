"""``edgeattn lint``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import job_options, parse_args

if TYPE_CHECKING:
    from rich.console import Console

    from edgeattn.lint import Finding, Severity

#: Worst first, with their colours.
_COLOURS: dict[Severity, str] = {"error": "red", "warning": "yellow", "note": "cyan"}
#: Modules shown under a rule.
_MODULES = 12


@click.command("lint", short_help="Show what in a model is known to go wrong or slow on a target.")
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every module.")
def command(args: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Show what in MODEL is known to go wrong or slow on a target, in which modules, and how it is mended.

    The model is built, reparameterized and captured; nothing is converted, and the target's toolchain is not needed.
    Ends with exit code 1 where an export would end before its conversion.
    """
    import json

    from edgeattn.cli._show import Live, console
    from edgeattn.lint import Finding, gate
    from edgeattn.pipeline.cache import Cache
    from edgeattn.pipeline.export import make_job
    from edgeattn.pipeline.run import run_plan

    live = Live()
    try:
        job = make_job(**given, args=parse_args(args), check_tools=False)
        found = {
            part.target: run_plan(part, Cache.default(), live, upto="lint").records["lint"].facts["findings"]
            for part in job.parts
        }
    finally:
        live.stop()
    findings = {target: [Finding(**finding) for finding in facts] for target, facts in found.items()}
    if as_json:
        flat = [{"target": target, **finding} for target, facts in found.items() for finding in facts]
        click.echo(json.dumps({"model": given["model"], "device": job.device, "findings": flat}, indent=1))
    else:
        for target, part in findings.items():
            _show(console(), target, part)
    gate([finding for part in findings.values() for finding in part])


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
        out.print(f"[bold {colour}]{severity}[/] [bold]{rule}[/]  {escape(held[0].what)}", soft_wrap=True)
        rows = table("  module", "detail")
        places = Counter((finding.module or "(model)", finding.detail) for finding in held)
        for (module, detail), count in list(places.items())[:_MODULES]:
            rows.add_row(f"  {escape(module)}", escape(f"{detail}{f', {count} times' if count > 1 else ''}"))
        if len(places) > _MODULES:
            rows.add_row(f"  and {len(places) - _MODULES} more", "--json lists them all")
        out.print(rows)
        for mend in dict.fromkeys(finding.mend for finding in held):
            out.print(f"  [bold]mend[/]  {escape(mend)}", soft_wrap=True)
        out.print()
    counts = Counter(finding.severity for finding in findings)
    counted = ", ".join(f"{counts[s]} {s}{'s' * (counts[s] > 1)}" for s in _COLOURS if counts[s])
    out.print(f"{target}: {counted or 'nothing found'}", soft_wrap=True)
