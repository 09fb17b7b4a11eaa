"""``edgeattn verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgeattn.bundle import Bundle


@click.command("verify", short_help="Re-hash a bundle and re-run its golden inputs.")
@click.argument("bundle", type=click.Path())
@click.option("--device", "-d", help="Do it there: a device's name, ssh://user@host, qemu://cortex-a76, local.")
@click.option("--score", is_flag=True, help="Score the held-out samples instead, here or on the device.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(bundle: str, device: str | None, score: bool, as_json: bool) -> None:
    """Re-hash every file of BUNDLE and re-run its golden inputs here; works without PyTorch.

    With --device the bundle's own run.py does so on the device. With --score it counts how many of the held-out samples
    each artifact gets right there; on an emulated CPU too, whose kernels are not those of this machine.
    """
    import json

    from edgeattn.bundle import Bundle
    from edgeattn.cli._show import console, numerics_rows, table, worst_rows

    opened = Bundle.open(bundle)
    if score:
        _score(opened, device or "local", as_json)
        return
    if device is not None:
        _on_device(opened, device, as_json)
        return
    verified = opened.verify()
    numerics = {name: {k: n.as_dict() for k, n in sample.items()} for name, sample in verified.numerics.items()}
    if as_json:
        result = {"bundle": opened.manifest.name, "files": verified.files, "tolerance": verified.tolerance}
        unproven = list(verified.unproven)
        click.echo(json.dumps({**result, "numerics": numerics, "unproven": unproven, "holds": True}, indent=1))
        return
    out = console()
    rows = table("golden", "output", "relative L2", "max abs", "SQNR", "cosine", "not finite", right=("relative L2",))
    for row in worst_rows(numerics_rows(numerics)):
        rows.add_row(*row)
    out.print(rows)
    out.print()
    worst = verified.worst.relative_l2
    out.print(
        f"[bold green]held[/bold green]  {opened.manifest.name}: {verified.files} files as they were made, "
        f"worst relative L2 {worst:.2e}, allowed {verified.tolerance:g}"
    )
    for sentence in verified.unproven:
        out.print(f"[yellow]{sentence}[/yellow]")


def _score(bundle: Bundle, device: str, as_json: bool) -> None:
    import json

    from edgeattn.cli._show import Status, console, table
    from edgeattn.profile.transports import open_transport

    transport = open_transport(device)
    backends = [info.backend for info in bundle.manifest.artifacts]
    with Status() as status:
        runs = [["--score", "--backend", name] for name in backends]
        answers = transport.run_all(bundle.path, runs, status.say)
    if as_json:
        click.echo(json.dumps([{"device": device, "emulated": transport.emulated, **one} for one in answers], indent=1))
        return
    out = console()
    rows = table("backend", "runtime", "right", "accuracy", "PyTorch", "drop", right=("right", "accuracy", "drop"))
    for one in answers:
        right, theirs = f"{one['correct']} of {one['samples']}", f"{one['reference_correct'] / one['samples']:.2%}"
        accuracy, drop = f"{one['accuracy']:.2%}", f"{100 * one['drop']:.2f} points"
        rows.add_row(one["backend"], one["runtime"], right, accuracy, theirs, drop)
    out.print(rows)
    out.print()
    out.print(f"{bundle.manifest.name} on {transport.url}{', emulated' if transport.emulated else ''}", markup=False)


def _on_device(bundle: Bundle, device: str, as_json: bool) -> None:
    import json

    from edgeattn.cli._show import Status, console, table
    from edgeattn.profile.transports import open_transport

    transport = open_transport(device)
    with Status() as status:
        answer = transport.run(bundle.path, ["--verify"], status.say)
    if as_json:
        click.echo(json.dumps({"device": device, "emulated": transport.emulated, **answer}, indent=1))
        return
    out = console()
    rows = table("backend", "runtime", "golden", "relative L2", "", right=("golden", "relative L2"))
    for part in answer["parts"]:
        if "missing" in part:
            rows.add_row(part["backend"], "[yellow]not there[/yellow]", "", "", f"{part['missing']}; {part['fix']}")
        else:
            rows.add_row(part["backend"], part["runtime"], str(part["golden"]), f"{part['worst_relative_l2']:.2e}", "")
    out.print(rows)
    out.print()
    how = (
        f"{transport.url}, emulated: numbers hold there, times would mean nothing"
        if transport.emulated
        else transport.url
    )
    out.print(
        f"[bold green]held[/bold green]  {bundle.manifest.name} on {how} ({answer['machine']}, Python "
        f"{answer['python']}), allowed {answer['tolerance']:g}"
    )
