"""``edgeattn optics``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgeattn.cli._options import output_file

if TYPE_CHECKING:
    from edgeattn.report.optics import Shown


@click.group("optics", short_help="Look at a bundle of target optical.")
def command() -> None:
    """Look at what a bundle of target optical does on a 4f correlator. All of it is simulated."""


@command.command("show", short_help="Operations, cost, planes and accuracy of an optical bundle.")
@click.argument("bundle")
@click.option("--output", "-o", type=click.Path(), metavar="FILE.html", help="Write a page with pictures.")
@click.option("--operation", metavar="NAME", help="Whose planes the page shows. [default: the one with the most MACs]")
@click.option("--entry", metavar="NAME", help="Which graph of a bundle that has several. [default: the first]")
@click.option(
    "--curves/--no-curves",
    default=False,
    help="Score held-out samples under noise, bits and misalignment; takes minutes. [default: no]",
)
@click.option("--on", type=click.IntRange(1, 10_000_000), help="Held-out samples for the curves. [default: 32]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def show(
    bundle: str,
    output: str | None,
    operation: str | None,
    entry: str | None,
    curves: bool,
    on: int | None,
    as_json: bool,
) -> None:
    """Show the operations of BUNDLE as they are laid out on the planes, and what they cost in frames, time and energy.

    A page has pictures too: the planes of one operation on a golden sample, as one would see them, and the schedule.
    With --curves the model is scored on its held-out samples under one effect of hardware after the other.

    \b
      edgeattn optics show convsharevit-v2-digits.optical.fp32
      edgeattn optics show convsharevit-v2-digits.optical.fp32 --output optics.html --operation blocks.1.attn.qkv
      edgeattn optics show convsharevit-v2-digits.optical.fp32 --output optics.html --curves --on 64
    """
    import json

    from edgeattn.bundle import Bundle
    from edgeattn.cli._show import Status
    from edgeattn.core.errors import UsageError
    from edgeattn.core.files import check_writable
    from edgeattn.pipeline import optics
    from edgeattn.report.optics import Shown, write

    file = output_file(output, ".html", ".htm")
    if on is not None and not curves:
        raise UsageError("--on is the number of samples for the curves", value=on, fix=f"--curves --on {on}")
    opened = optics.open_optical(Bundle.open(bundle), entry)
    op = opened.operation(operation)
    if curves:
        optics.samples_of(opened.bundle)
    if file is not None:
        check_writable(file.parent)
    costs, spans = optics.find_costs(opened.program), optics.timeline(opened)
    with Status() as status:
        planes = None
        if file is not None:
            from edgeattn.report.optics_planes import find_planes

            status.say(f"the planes of {op.name}")
            planes = find_planes(opened, op)
        found = optics.curves(opened.bundle, on, status.say) if curves else None
    shown = Shown(opened, costs, spans, found, planes)
    if file is not None:
        write(shown, file)
    if as_json:
        click.echo(json.dumps(shown.as_dict(), indent=1, allow_nan=False))
        return
    _show(shown)
    if file is not None:
        click.echo(f"wrote {file}")


def _show(found: Shown) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import console, table
    from edgeattn.report.optics import (
        OPERATION,
        OPERATION_WORDS,
        SIMULATED,
        batch_words,
        cost_head,
        cost_rows,
        curve_rows,
        curve_words,
        operation_row,
        share_words,
    )

    out, program, costs = console(), found.opened.program, found.costs
    out.print(f"[bold]{escape(found.opened.title)}[/bold] on {escape(program.device)}", soft_wrap=True)
    if found.opened.random:
        out.print("[yellow]weights are random: what the model says means nothing[/yellow]")
    out.print(SIMULATED, style="dim", soft_wrap=True)
    out.print()
    rows = table(*OPERATION, right=OPERATION[2:])
    for column in rows.columns[:2]:
        column.no_wrap = True  # names are there to be copied
    for op in program.operations:
        rows.add_row(*map(escape, operation_row(op)))
    out.print(rows)
    out.print(escape(OPERATION_WORDS), style="dim", soft_wrap=True)
    out.print()
    head = cost_head(costs)
    rows = table(*head, right=head[2:])
    for row in cost_rows(costs, program.optics):
        rows.add_row(*map(escape, row))
    out.print(rows)
    out.print()
    out.print(share_words(costs.one), soft_wrap=True)
    out.print(batch_words(costs), soft_wrap=True)
    out.print(escape(f"assumed: {'; '.join(costs.one.assumptions)}"), soft_wrap=True)
    if found.curves is None:
        return
    out.print()
    rows = table("effect", "setting", "accuracy", "95 % interval", right=("accuracy", "95 % interval"))
    for values in curve_rows(found.curves):
        rows.add_row(*map(escape, values))
    out.print(rows)
    out.print(escape(curve_words(found.curves)), soft_wrap=True)
