"""``edgeattn report``."""

from __future__ import annotations

from pathlib import Path

import click

from edgeattn.cli._options import output_file

#: What the output's suffix asks for.
_FORMATS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json"}


@click.command("report", short_help="Make a page, Markdown or one JSON file of records.")
@click.argument("records", nargs=-1, required=True, type=click.Path(), metavar="RECORDS...")
@click.option(
    "--output", "-o", required=True, type=click.Path(), metavar="FILE", help="FILE.html, FILE.md or FILE.json."
)
def command(records: tuple[str, ...], output: str) -> None:
    """Make a report of RECORDS: JSON files that "edgeattn profile BUNDLE --json" wrote. Each record counts once.

    The page is one file that needs no network: latency, accuracy against latency and size, where the time goes, memory,
    what is proven and what is not. Markdown is for a comment on a change; JSON holds all records in one file.

    \b
      edgeattn report pi.json phone.json -o report.html
      edgeattn report pi.json -o report.md
    """
    from edgeattn.cli._show import Status
    from edgeattn.core.files import write_whole
    from edgeattn.profile.record import read, to_json
    from edgeattn.report.records.words import count, merge

    file = output_file(output, *_FORMATS)
    form = _FORMATS[file.suffix.lower()]
    if form == "html":
        from edgeattn.report.records.page import check_installed

        check_installed()
    found = merge(read(Path(name)) for name in records)
    with Status() as status:
        status.say(f"writing {file}")
        if form == "html":
            from edgeattn.report.records.html import html

            text = html(found)
        elif form == "markdown":
            from edgeattn.report.records.markdown import markdown

            text = markdown(found)
        else:
            text = to_json(found)
        write_whole(file, text.encode())
    click.echo(f"wrote {file}: {count(len(found), 'record')}")
