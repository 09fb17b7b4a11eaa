"""``edgeattn toolchain``."""

from __future__ import annotations

import click


@click.group("toolchain", short_help="Add toolchains that need an environment of their own.")
def command() -> None:
    """Toolchains that cannot live beside the others: each gets an environment of its own, on request only."""


@command.command("list", short_help="List them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_them(as_json: bool) -> None:
    """List the toolchains: what for, whether added, versions, size on the disk."""
    import json

    from rich.markup import escape

    from edgeattn import toolchains
    from edgeattn.cli._show import console, size, table

    found = [(one, toolchains.installed(name), toolchains.size(name)) for name, one in toolchains.known().items()]
    if as_json:
        rows = [
            {
                "name": one.name,
                "purpose": one.purpose,
                "state": state.state,
                "why": state.why,
                "folder": str(state.folder),
                "versions": state.versions,
                "bytes": count,
                "requirements": list(one.requirements),
            }
            for one, state, count in found
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    shown = table("toolchain", "for", "state", "versions", "size", right=("size",))
    shown.columns[0].no_wrap = True  # it is there to be copied
    for one, state, count in found:
        colour = "green" if state.usable else "yellow"
        versions = ", ".join(f"{name} {version}" for name, version in list(state.versions.items())[:4])
        about = size(count) if count else f"about {one.size_mb} MB"
        shown.add_row(one.name, one.purpose, f"[{colour}]{state.state}[/{colour}]", escape(versions), about)
    out = console()
    out.print(shown)
    for one, state, _ in found:
        if state.state in ("incomplete", "outdated"):
            out.print(f"\n{one.name}: {escape(state.why)}; to make it anew:\n  {one.line}", soft_wrap=True)
        elif not state.usable:
            out.print(f"\nto get {one.name}:\n  {one.line}", soft_wrap=True)


@command.command("add", short_help="Add one: packages are downloaded.")
@click.argument("name")
def add(name: str) -> None:
    """Make the environment of toolchain NAME and install its packages into it with pip.

    Nothing else is changed. It is used from then on by what needs it; `remove` takes it away.
    """
    import time

    from rich.markup import escape

    from edgeattn import toolchains
    from edgeattn.cli._show import Status, console, size

    toolchain = toolchains.get(name)
    found = toolchains.installed(name)
    out = console()
    if found.usable:
        out.print(f"there  {name} in {escape(str(found.folder))}", soft_wrap=True)
        return
    out.print(f"adding  {name}: {escape(toolchain.purpose)}", soft_wrap=True)
    out.print(f"with    {escape(', '.join(toolchain.requirements))}, and what these need", soft_wrap=True)
    out.print(f"into    {escape(str(found.folder))}", soft_wrap=True)
    out.print(f"size    about {toolchain.size_mb} MB; took {toolchain.seconds} s where it was measured", soft_wrap=True)
    if toolchain.note:
        out.print(f"note    {escape(toolchain.note)}", soft_wrap=True)
    if found.state != "not added":
        out.print(f"anew    {escape(found.why)}", soft_wrap=True)
    start = time.monotonic()
    with Status() as status:
        made = toolchains.add(name, lambda text: status.say(f"{name}: {text}"))
    seconds = time.monotonic() - start
    out.print(f"ready   {escape(str(made.folder))}: {size(toolchains.size(name))}, {seconds:.0f} s", soft_wrap=True)


@command.command("remove", short_help="Remove one.")
@click.argument("name")
def remove(name: str) -> None:
    """Delete the environment of toolchain NAME."""
    from edgeattn import toolchains

    gone = toolchains.remove(name)
    click.echo(f"removed  {gone}" if gone else f"nothing to remove: {name} is not added")
