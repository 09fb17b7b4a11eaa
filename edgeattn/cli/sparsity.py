"""``edgeattn sparsity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli._options import model_options, output_file, parse_args

if TYPE_CHECKING:
    from edgeattn.pipeline.sparsity import Sparsity


@click.command("sparsity", short_help="Count the exact zeros behind a model's ReLUs.")
@click.argument("model")
@model_options
@click.option("--on", type=click.IntRange(1, 10_000_000), help="Tokens or samples. [default: 4096 tokens, 64 samples]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE.html", help="Write a page with a picture.")
def command(
    model: str,
    inputs: tuple[str, ...],
    checkpoint: str | None,
    args: tuple[str, ...],
    on: int | None,
    as_json: bool,
    output: str | None,
) -> None:
    """Count the exact zeros behind every ReLU, ReLU6 and squared ReLU of MODEL, layer by layer, on data of its own.

    A decoder is run on its recipe's held-out text, and what skipping the zeros is worth to it is computed: how much of
    its weights a decoded token still has to read. Other models are run on held-out samples, or on random inputs.

    \b
      edgeattn sparsity plm-tiny
      edgeattn sparsity plm-tiny --output sparsity.html
      edgeattn sparsity net.py:factory --input x=1x3x224x224 --checkpoint weights.safetensors
    """
    import json

    from edgeattn import recipe
    from edgeattn.cli._show import Status
    from edgeattn.pipeline.sparsity import find_sparsity
    from edgeattn.report.sparsity import write

    file = output_file(output, ".html", ".htm")
    resolved = recipe.resolve(
        model, inputs=inputs, checkpoint=Path(checkpoint) if checkpoint else None, args=parse_args(args)
    )
    with Status() as status:
        found = find_sparsity(resolved, on, status.say)
    if file is not None:
        write(found, file)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1, allow_nan=False))
        return
    _show(found)
    if file is not None:
        click.echo(f"wrote {file}")


def _show(found: Sparsity) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import console, table
    from edgeattn.report.sparsity import worth

    out = console()
    if found.random:
        out.print("[yellow]weights are random: a trained model has other zeros[/yellow]")
    known = found.unit == "tokens"
    figures = ("zeros", "lowest", "highest", *(("units", "never used") if known else ()))
    rows = table("activation", *figures, right=figures)
    for site in found.sites:
        values = [f"{value:.1%}" for value in (site.zeros, site.low, site.high)]
        values += [f"{site.units:,}", f"{site.never:,}"] if known else []
        rows.add_row(escape(site.path or "(model)"), *values)
    rows.add_row("[bold]all[/bold]", f"[bold]{found.zeros:.1%}[/bold]")
    out.print(rows)
    out.print()
    one = found.unit.removesuffix("s")
    about = f"on {found.data}; lowest and highest of a single {one}"
    out.print(escape(about + (f"; never used: zero at every {one}" if known else "")), style="dim", soft_wrap=True)
    if words := worth(found):
        out.print()
        out.print(words, soft_wrap=True)
