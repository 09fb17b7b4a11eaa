"""``edgeattn history``."""

from __future__ import annotations

import click

from edgeattn.cli._options import output_file


@click.command("history", short_help="Show what was measured before, by model and device.")
@click.argument("model", required=False)
@click.option("--device", "-d", help="Only of this device.")
@click.option("--last", "-n", type=click.IntRange(min=1), help="Only the newest so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON, for edgeattn report.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the figures as CSV.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE", help="Write .json, .csv, or .html with a plot.")
def command(
    model: str | None, device: str | None, last: int | None, as_json: bool, as_csv: bool, output: str | None
) -> None:
    """Show the records of MODEL, or of all: every edgeattn profile on this machine adds its own.

    MODEL is a model's or a bundle's name. Records live in history.sqlite, in $EDGEATTN_HOME or ~/.config/edgeattn.

    \b
      edgeattn history fmvit-digits
      edgeattn history fmvit-digits --output history.html
      edgeattn history --csv
    """
    from rich.markup import escape

    from edgeattn.cli._show import console, table
    from edgeattn.core.errors import unknown
    from edgeattn.core.files import write_whole
    from edgeattn.profile import store
    from edgeattn.profile.record import to_json

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    file = output_file(output, ".html", ".json", ".csv")
    records = store.find(model, device, last)
    if not records and model is not None and model not in (known := store.names()):
        raise unknown("model", model, known, where=str(store.path()), fix="" if known else "edgeattn profile BUNDLE")
    if file is not None:
        kind = file.suffix.lower()
        if kind == ".html":
            from edgeattn.report.records.html import html

            text = html(records)
        else:
            text = to_json(records) if kind == ".json" else store.to_csv(records)
        write_whole(file, text.encode())
    if as_json or as_csv:
        click.echo(to_json(records) if as_json else store.to_csv(records), nl=False)
        return
    numbers = ("p50 ms", "95 % interval", "peak MB", "size MB")
    rows = table("when", "record", "device", *numbers, "commit", "", right=numbers)
    for record in records:
        found = record.latency
        times = (
            [f"{found.p50:.4g}", f"{found.low:.4g}-{found.high:.4g}"]
            if found
            else [f"{record.breakdown.estimate_ms or 0:.4g}", "estimate"]
        )
        peak = f"{record.memory.peak_rss_mb:.0f}" if record.memory.peak_rss_mb else "-"
        commit = record.commit[:9] + ("+" if record.commit.endswith("+") else "")
        flags = ", ".join(flag.split(":")[0] for flag in record.flags) + (" partial" if record.partial else "")
        cells = [record.created[:16].replace("T", " "), escape(record.label), escape(record.place.device)]
        rows.add_row(*cells, *times, peak, f"{record.subject.size_mb:.2f}", commit, escape(flags))
    out = console()
    out.print(rows)
    if not records:
        out.print("nothing was measured yet: edgeattn profile BUNDLE")
    if file is not None:
        click.echo(f"wrote {output}")
