"""``edgeattn device``."""

from __future__ import annotations

from typing import Any

import click

#: Kept as an absolute path: the device is used from other folders.
FILE = click.Path(exists=True, dir_okay=False, resolve_path=True)


@click.group("device", short_help="Add, check and set up devices of your own.")
def command() -> None:
    """Devices of your own: their address is kept in a file, their keys and passwords are not."""


@command.command("add", short_help="Keep a device under a name.")
@click.argument("name")
@click.argument("url")
@click.option("--base", help="The shipped device that it is, such as raspberry-pi-5.")
@click.option("--identity", type=FILE, help="The private key, where it is not a usual one.")
@click.option("--known-hosts", type=FILE, help="The known_hosts file, where it is not the usual one.")
@click.option("--folder", help="Where bundles are put on it while they run.")
@click.option("--python", help="Its Python, where that is not python3.")
@click.option("--force", "-f", is_flag=True, help="Replace a device of that name.")
def add(name: str, url: str, base: str | None, force: bool, **files: str | None) -> None:
    """Keep a device: NAME stands for URL (ssh://user@host:port) from now on."""
    from rich.markup import escape

    from edgeattn import device
    from edgeattn.cli._show import console

    fields: dict[str, Any] = {"base": base, "connect": url, "description": f"{base or 'a board'} at {url}", **files}
    if base is None:
        fields |= {"kind": "board", "machine": "any", "targets": ("rpi", "tflite", "onnx")}
    path = device.store(name, fields, force=force)
    out = console()
    out.print(f"added  {escape(name)} in {escape(str(path))}", soft_wrap=True)
    out.print(f"next   edgeattn device check {escape(name)}", soft_wrap=True)


@command.command("remove", short_help="Forget a device.")
@click.argument("name")
def remove(name: str) -> None:
    """Forget device NAME of your own."""
    from edgeattn import device

    click.echo(f"removed  {device.forget(name)}")


@command.command("check", short_help="Say what a device has and lacks.")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(name: str, as_json: bool) -> None:
    """Say what device NAME (or ssh://user@host, qemu://cortex-a76, local) has and lacks, with the install line."""
    import json
    from dataclasses import asdict

    from rich.markup import escape

    from edgeattn.cli._show import Status, console, table
    from edgeattn.core.errors import ToolchainMissing
    from edgeattn.profile.transports import open_transport

    transport = open_transport(name)
    with Status() as status:
        status.say(f"asking {transport.url}")
        found = transport.check()
    if as_json:
        click.echo(json.dumps({"device": name, "found": [asdict(one) for one in found]}, indent=1))
    else:
        rows = table("", "state", "detail")
        for one in found:
            state = "[green]there[/green]" if one.present else "[yellow]lacking[/yellow]"
            rows.add_row(one.name, state, escape(one.detail))
        out = console()
        out.print(rows)
        for one in found:
            if one.fix:  # outside of the table, where a line can be copied whole
                out.print(f"\nto get {one.name} there:\n  {escape(one.fix)}", soft_wrap=True)
    has = {one.name for one in found if one.present}
    runtimes = {"onnxruntime", "ai-edge-litert", "tflite-runtime", "coremltools"}
    lacking = [one for one in found if not one.present and one.name in ("python", "numpy")]
    if not has & runtimes:
        lacking += [one for one in found if one.name in runtimes]
    if lacking:
        raise ToolchainMissing(
            "the device cannot run a bundle yet",
            value=", ".join(one.name for one in lacking),
            where=transport.url,
            why="it needs Python 3.9 or newer, NumPy and one of the runtimes",
            fix="install them there: the output has a line for each",
        )


@command.command("setup", short_help="Set up the emulator of aarch64 CPUs.")
@click.argument("what", type=click.Choice(["qemu"]))
def setup(what: str) -> None:
    """Set up the emulator of aarch64 CPUs: a Python, its runtimes and qemu, in EdgeAttn's own folder.

    Nothing of the system's packages is touched.
    """
    from rich.markup import escape

    from edgeattn.cli._show import Status, console
    from edgeattn.profile.emulator import setup as set_up

    with Status() as status:
        made = set_up(status.say)
    out = console()
    out.print(f"ready  {escape(str(made.folder))}", soft_wrap=True)
    out.print("next   edgeattn verify BUNDLE --device qemu://cortex-a76")
