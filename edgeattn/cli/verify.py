"""``edgeattn verify``."""

from __future__ import annotations

import click


@click.command("verify", short_help="Re-hash a bundle and re-run its golden inputs.")
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(bundle: str, as_json: bool) -> None:
    """Re-hash every file of BUNDLE and re-run its golden inputs here; works without PyTorch."""
    import json

    from edgeattn.bundle import Bundle
    from edgeattn.cli._show import console, numerics_rows, table

    opened = Bundle.open(bundle)
    verified = opened.verify()
    numerics = {name: {k: n.as_dict() for k, n in sample.items()} for name, sample in verified.numerics.items()}
    if as_json:
        result = {"bundle": opened.manifest.name, "files": verified.files, "tolerance": verified.tolerance}
        click.echo(json.dumps({**result, "numerics": numerics, "holds": True}, indent=1))
        return
    out = console()
    rows = table("golden", "output", "relative L2", "max abs", "SQNR", "cosine", "not finite", right=("relative L2",))
    for row in numerics_rows(numerics):
        rows.add_row(*row)
    out.print(rows)
    out.print()
    worst = verified.worst.relative_l2
    out.print(
        f"[bold green]held[/bold green]  {opened.manifest.name}: {verified.files} files as they were made, "
        f"worst relative L2 {worst:.2e}, allowed {verified.tolerance:g}"
    )
