"""``edgeattn targets``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgeattn.conformance import Report

_COLOURS = {"held": "green", "failed": "red", "skipped": "yellow"}


@click.group(
    "targets",
    invoke_without_command=True,
    short_help="List targets, their precisions and whether they can be used here.",
)
@click.pass_context
def command(context: click.Context) -> None:
    """List the targets: the precisions that each can hold, and whether its toolchain is installed here."""
    if context.invoked_subcommand is None:
        _list()


def _list() -> None:
    from rich.markup import escape

    from edgeattn import targets
    from edgeattn.cli._show import console, table
    from edgeattn.targets.broken import BrokenTarget

    rows = table("target", "state", "precisions", "options (-O NAME=CHOICE)", "toolchain", "how to get it")
    for name in targets.names():
        target = targets.get(name)
        found = target.availability()
        state = "[green]found[/green]" if found.found else "[yellow]off[/yellow]"
        options = "\n".join(f"{option}: {', '.join(choices)}" for option, choices in target.options.items())
        held = "" if isinstance(target, BrokenTarget) else ", ".join(target.precisions(None))
        rows.add_row(*map(escape, (name,)), state, held, escape(options), escape(found.detail), escape(found.fix or ""))
    console().print(rows)


@command.command("test", short_help="Run the conformance kit on a target.")
@click.argument("name")
@click.option("--check", "only", multiple=True, metavar="CHECK", help="Make this check alone; may be given again.")
@click.option("--model", help="Take this model for the whole export: a recipe, or package.module:factory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def test(name: str, only: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Look at every promise that target NAME makes, its own code's and those of the artifacts that it writes.

    NAME is a registered target, or package.module:Class of one that is being written. Ends with exit code 1 where a
    promise is not kept, and with 3 where the toolchain is missing, so that most cannot be looked at.
    """
    import json

    from edgeattn.cli._show import Status
    from edgeattn.conformance import conform
    from edgeattn.core.errors import CheckFailed, ToolchainMissing

    with Status() as status:
        report = conform(name, only, model, status.say)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=1))
    else:
        _show(report)
    if report.failed:
        checks = ", ".join(outcome.check for outcome in report.failed)
        first = report.failed[0]
        raise CheckFailed(f"target {name} does not keep what it promises", value=checks, fix=first.mend)
    if report.missing:
        why, fix = report.missing
        raise ToolchainMissing(f"target {name} cannot be tested here", why=why, fix=fix)


def _show(report: Report) -> None:
    from collections import Counter

    from rich.markup import escape

    from edgeattn.cli._show import console, table

    rows = table("check", "verdict", "what was looked at")
    rows.columns[0].no_wrap = True
    for outcome in report.outcomes:
        colour = _COLOURS[outcome.verdict]
        words = f"{outcome.demand}: {outcome.detail}" if outcome.detail else outcome.demand
        rows.add_row(outcome.check, f"[{colour}]{outcome.verdict}[/]", escape(words))
        for label in ("expected", "given", "mend") if outcome.verdict == "failed" else ():
            rows.add_row("", "", f"[bold]{label}[/] {escape(getattr(outcome, label))}")
    out = console()
    out.print(rows)
    counts: Counter[str] = Counter(outcome.verdict for outcome in report.outcomes)
    out.print(f"{escape(report.target)}: " + ", ".join(f"{counts[word]} {word}" for word in _COLOURS if counts[word]))
