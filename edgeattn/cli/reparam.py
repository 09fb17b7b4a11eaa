"""``edgeattn reparam``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import model_options, parse_args

if TYPE_CHECKING:
    from rich.console import Console


@click.command("reparam", short_help="Fuse a model's blocks and show the proof of each.")
@click.argument("model")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the proof as JSON.")
def command(args: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Bring MODEL from its training form to its deploy form, and show for each block how exactly that holds.

    Every fused block is run in both forms on real and on random activations, in float64 and in float32. What does not
    hold keeps its training form and is listed with the reason.
    """
    import json

    from edgeattn.cli._show import Live, console
    from edgeattn.pipeline.cache import Cache
    from edgeattn.pipeline.export import make_job
    from edgeattn.pipeline.run import run_plan

    live = Live()
    try:
        job = make_job(**given, target="null", args=parse_args(args))
        finished = run_plan(job, Cache.default(), live, upto="reparameterize")
    finally:
        live.stop()
    facts = finished.records["reparameterize"].facts
    if as_json:
        click.echo(json.dumps(facts["proof"], indent=1))
        return
    out = console()
    if job.resolved.random_weights:
        out.print("[yellow]weights are random: no checkpoint was given[/yellow]")
    _show(out, facts["proof"], facts["summary"])


def _figure(values: list[float | None]) -> str:
    """The larger of the errors on real and on random activations."""
    known = [value for value in values if value is not None]
    return f"{max(known):.1e}" if len(known) == len(values) else "not finite"


def _show(out: Console, proof: dict[str, Any], summary: str) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import table

    if proof["fused"]:
        numbers = ("fp64 error", "fp32 error", "parameters", "range", "crest")
        rows = table("block", "rule", *numbers, "PTQ", right=numbers)
        for block in proof["fused"]:
            errors = [
                _figure([block["errors"][f"float{bits}_{kind}"] for kind in ("real", "random")]) for bits in (64, 32)
            ]
            count = f"{block['parameters_before']:,} -> {block['parameters_after']:,}"
            growth = ["" if block[g] is None else f"x{block[g]:.2f}" for g in ("range_growth", "crest_growth")]
            risk = "[yellow]risk[/yellow]" if block["ptq_risk"] else ""
            rows.add_row(escape(block["path"] or "(model)"), block["rule"], *errors, count, *growth, risk)
        out.print(rows)
        out.print()
        out.print(
            "errors: relative L2 of the deploy against the training form, the larger of real and random activations; "
            "range: growth of max|W|; crest: of max|W| / rms(W)",
            style="dim",
        )
        out.print()
    if proof["not_fused"]:
        rows = table("not fused", "rule", "why")
        for item in proof["not_fused"]:
            rows.add_row(escape(item["path"] or "(model)"), item["rule"], escape(item["reason"]))
        out.print(rows)
        out.print()
    out.print(escape(summary), soft_wrap=True)
