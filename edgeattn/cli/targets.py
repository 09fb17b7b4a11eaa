"""``edgeattn targets``."""

from __future__ import annotations

import click


@click.command("targets", short_help="List targets, their precisions and whether they can be used here.")
def command() -> None:
    """List the targets: the precisions that each can hold, and whether its toolchain is installed here."""
    from rich.markup import escape

    from edgeattn import targets
    from edgeattn.cli._show import console, table

    rows = table("target", "state", "precisions", "options (-O NAME=CHOICE)", "toolchain", "how to get it")
    for name in targets.names():
        target = targets.get(name)
        found = target.availability()
        state = "[green]found[/green]" if found.found else "[yellow]off[/yellow]"
        options = "\n".join(f"{option}: {', '.join(choices)}" for option, choices in target.options.items())
        held = ", ".join(target.precisions(None))
        rows.add_row(name, state, held, options, escape(found.detail), escape(found.fix or ""))
    console().print(rows)
