"""``edgeattn compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli._options import output_file

if TYPE_CHECKING:
    from rich.console import Console

    from edgeattn.report.records.compare import Comparison, Pair

#: Modules of a pair that the terminal shows.
_MODULES = 5


@click.command("compare", short_help="Compare two files of records: latency, size, accuracy, operations.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--across", is_flag=True, help="Compare records of different devices, CPUs, systems or units, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE.html", help="Write a page with charts.")
def command(a: str, b: str, across: bool, as_json: bool, output: str | None) -> None:
    """Compare the records of A with those of B: JSON files that "edgeattn profile BUNDLE --json" wrote.

    Records of the same model, target, precision, device, entry, unit, threads and batch are pairs. Ratios are B over A.
    Records of separate sessions carry the machine's drift: a gate should take "edgeattn profile A B", interleaved.

    \b
      edgeattn compare before.json after.json
      edgeattn compare before.json after.json -o compare.html
    """
    import json

    from edgeattn.cli._show import console
    from edgeattn.core.files import write_whole
    from edgeattn.profile.record import read
    from edgeattn.report.records.compare import compare

    file = output_file(output, ".html", ".htm")
    if file is not None:
        from edgeattn.report.records.page import check_installed

        check_installed()
    found = compare(read(Path(a)), read(Path(b)), across)
    if file is not None:
        from edgeattn.report.records.compare_html import html

        write_whole(file, html(found).encode())
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1, allow_nan=False, ensure_ascii=False))
        return
    _show(console(), found)
    if file is not None:
        click.echo(f"wrote {file}")


def _show(out: Console, found: Comparison) -> None:
    from rich.text import Text

    from edgeattn.report.records.words import count, plain

    if len(found.pairs) > 1:
        _pairs(out, found)
    for pair in found.pairs:
        _pair(out, pair)
    for side, rest in (("A", found.only_a), ("B", found.only_b)):
        for record in rest:
            out.print(Text(f"only in {side}: {plain(record.label)} on {plain(record.place.device)}"), soft_wrap=True)
    if found.older:
        out.print(f"{count(found.older, 'older record')} of the same things left out", style="dim")
    if found.drift:
        out.print(Text(found.drift, style="dim"), soft_wrap=True)


def _pairs(out: Console, found: Comparison) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import table
    from edgeattn.report.records.compare import times
    from edgeattn.report.records.words import number, p50

    figures = ("A ms", "B ms", "B/A", "interval")
    rows = table("pair", *figures, "", right=figures)
    for pair in found.pairs:
        ratio = pair.ratio
        interval = f"{times(ratio.low)} to {times(ratio.high)}" if ratio else ""
        marks = "across places" if pair.across else "see below" if pair.notes else ""
        values = (number(p50(pair.a)), number(p50(pair.b)), times(pair.p50_ratio), interval)
        rows.add_row(escape(pair.label), *values, f"[yellow]{marks}[/yellow]")
    out.print(rows)
    out.print()


def _pair(out: Console, pair: Pair) -> None:
    from rich.markup import escape
    from rich.text import Text

    from edgeattn.cli._show import table
    from edgeattn.report.records.compare import lines
    from edgeattn.report.records.words import number

    out.print(Text(pair.label, style="bold"), soft_wrap=True)
    rows = table("", "A", "B", "B against A", right=("A", "B", "B against A"))
    for line in lines(pair):
        name = f"{line.name}, {line.unit}" if line.unit else line.name
        rows.add_row(escape(name), escape(line.a_text), escape(line.b_text), escape(line.change))
    for what, one, other in pair.differs:
        rows.add_row(escape(what), escape(one), escape(other), "other")
    out.print(rows)
    for note in pair.notes:
        out.print(Text(note, style="yellow"), soft_wrap=True)
    moved = [change for change in pair.changes[:_MODULES] if change.change]
    if moved:
        heads = ("A", "B", "B minus A")
        ops = table(f"largest changes, {pair.basis}", *heads, right=heads)
        for change in moved:
            ops.add_row(escape(change.module), number(change.a), number(change.b), f"{change.change:+.3g}")
        out.print(ops)
    out.print()
