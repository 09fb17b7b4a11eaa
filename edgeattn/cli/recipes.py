"""``edgeattn recipes``."""

from __future__ import annotations

import click


@click.group("recipes", invoke_without_command=True, short_help="List recipes, or show one resolved.")
@click.pass_context
def command(context: click.Context) -> None:
    """List the recipes: a user's own first, then those that come with EdgeAttn."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape

    from edgeattn import recipe
    from edgeattn.cli._show import console, table
    from edgeattn.core import schema
    from edgeattn.core.errors import UsageError

    out = console()
    rows = table("recipe", "weights", "inputs", "description")
    for name, path in schema.find("recipes").items():
        try:
            found = recipe.load(path)
        except UsageError as error:
            rows.add_row(name, "", "", f"[red]not valid: {escape(str(error.why))}[/red] ({path})")
            continue
        inputs = ", ".join(str(spec) for spec in found.specs())
        rows.add_row(name, "checkpoint" if found.model.checkpoint else "random", inputs, escape(found.description))
    out.print(rows)
    out.print()
    out.print("next:\n  edgeattn recipes show NAME\n  edgeattn export NAME --target onnx")


@command.command("show")
@click.argument("name")
def show(name: str) -> None:
    """Print recipe NAME with every default filled in and its files found, as JSON."""
    import json

    from edgeattn import recipe

    resolved = recipe.resolve(name)
    click.echo(json.dumps({**resolved.model_dump(mode="json"), "sha256": resolved.sha256}, indent=1))
