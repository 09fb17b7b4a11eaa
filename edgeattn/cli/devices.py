"""``edgeattn devices``."""

from __future__ import annotations

import click


@click.group("devices", invoke_without_command=True, short_help="List devices, or show one.")
@click.pass_context
def command(context: click.Context) -> None:
    """List the devices that EdgeAttn has a file of: a user's own first."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape

    from edgeattn import device
    from edgeattn.cli._show import console, table
    from edgeattn.core import schema
    from edgeattn.core.errors import UsageError

    rows = table("device", "kind", "targets", "description")
    for name, path in schema.find("devices").items():
        try:
            found = device.load(path)
        except UsageError as error:
            rows.add_row(name, "", "", f"[red]not valid: {escape(str(error.why))}[/red] ({path})")
            continue
        rows.add_row(name, found.kind, ", ".join(found.targets), escape(found.description))
    console().print(rows)


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print device NAME as JSON."""
    from edgeattn import device

    click.echo(device.resolve(name).model_dump_json(indent=1))
