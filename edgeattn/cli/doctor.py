"""``edgeattn doctor``."""

from __future__ import annotations

import click


@click.command("doctor", short_help="Show every toolchain: found, version, why off, how to get it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show every toolchain: found or not, its version, why it is off, and the line that installs it. Never fails."""
    import json

    from rich.markup import escape

    from edgeattn.cli._show import console, table
    from edgeattn.doctor import examine

    found = examine()
    if as_json:
        click.echo(json.dumps([vars(item) for item in found], indent=1))
        return
    out = console()
    rows = table("toolchain", "for", "state", "version, or why it is off", "how to get it")
    rows.columns[-1].no_wrap = True  # lines are there to be copied
    for item in found:
        state = "[green]found[/green]" if item.found else "[yellow]off[/yellow]"
        rows.add_row(item.name, item.purpose, state, escape(item.detail), escape(item.fix or ""))
    out.print(rows)
