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

    rows = table("device", "cpu", "bits", "targets", "runtimes", "reached")
    for column in (rows.columns[0], rows.columns[-1]):
        column.no_wrap = True  # names and addresses are there to be copied
    broken = []
    for name, path in schema.find("devices").items():
        try:
            found = device.load(path)
        except UsageError as error:
            broken.append(f"[red]not valid[/red]  {escape(f'{path}: {error.why or error.what}')}")
            continue
        # A phone has cores of several kinds; its chip says it shorter.
        alike = found.cores and found.cpu and "," not in found.cpu
        cpu = f"{found.cores} x {found.cpu}" if alike else found.chip or found.cpu or ""
        address = "local" if found.kind == "host" else found.connect or ("emulated" if found.emulate else "")
        texts = (cpu, str(found.os_bits or ""), ", ".join(found.targets), ", ".join(found.runtimes.values()), address)
        rows.add_row(name, *map(escape, texts))
    out = console()
    out.print(rows)
    for line in broken:
        out.print(line, soft_wrap=True)


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print device NAME as JSON."""
    from edgeattn import device

    click.echo(device.resolve(name).model_dump_json(indent=1))
