"""``edgeattn sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import job_options, parse_args

if TYPE_CHECKING:
    from edgeattn.pipeline.sensitivity import Sensitivity

#: Rows that are shown unless all are asked for.
_SHOWN = 20
#: What a command line that is to be continued repeats, by the name of its parameter.
_REPEATED = {
    "target": "--target",
    "precision": "--precision",
    "device": "--device",
    "calibration": "--calibration",
    "samples": "--samples",
    "inputs": "--input",
    "checkpoint": "--checkpoint",
    "keep": "--keep",
}


@click.command("sensitivity", short_help="Find the modules that lose the accuracy when they are quantized.")
@job_options
@click.option("--on", default=32, show_default=True, type=click.IntRange(1, 100_000), help="Samples to measure on.")
@click.option(
    "--what",
    type=click.Choice(["modules", "operations"]),
    default="modules",
    show_default=True,
    help="Modules with weights and what they multiply; or all other operations, which no target rounds by itself.",
)
@click.option("--all", "every", is_flag=True, help=f"Show every row, not the worst {_SHOWN}.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--output", "-o", type=click.Path(), help="Folder for sensitivity.json and sensitivity.svg.")
def command(
    args: tuple[str, ...], on: int, what: str, every: bool, as_json: bool, output: str | None, **job: Any
) -> None:
    """Quantize each module of MODEL alone, and all but it, and rank them by the error.

    It is simulated in torch on the deploy form, on held-out samples, or on those of the calibration. What to keep in
    floats so that the rest holds is measured too, and printed as an entry for the recipe. A run that was stopped goes
    on where it was.

    \b
      edgeattn sensitivity fmvit-digits --target onnx
      edgeattn sensitivity fmvit-digits --target tflite --precision w4 --output report
      edgeattn sensitivity fmvit-digits --what operations
    """
    import json

    from edgeattn.cli._show import Live
    from edgeattn.core.files import check_writable
    from edgeattn.pipeline.export import make_job
    from edgeattn.pipeline.sensitivity import find_sensitivity
    from edgeattn.report.sensitivity import write

    if output:
        check_writable(Path(output))
    live = Live()
    try:
        made = make_job(**job, args=parse_args(args), check_tools=False)
        found = find_sensitivity(made, live, what, on)
    finally:
        live.stop()
    files = write(found, Path(output)) if output else []
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1, allow_nan=False))
        return
    _show(found, every, _next(found, job | {"target": made.target, "args": args}))
    for path in files:
        click.echo(f"wrote {path}")


# Nothing is lost in float32, where exports begin.
next(parameter for parameter in command.params if parameter.name == "precision").default = "w8a8"


def _next(found: Sensitivity, given: dict[str, Any]) -> str:
    """The export that keeps what has to be kept."""
    import shlex

    words = ["edgeattn", "export", given["model"]]
    for name, option in _REPEATED.items():
        value = given[name]
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        words += [part for one in values for part in (option, str(one))]
    words += [part for one in given["args"] for part in ("--arg", one)]
    words += [part for name, choice in given["options"].items() for part in ("--option", f"{name}={choice}")]
    words += ["--layout", given["layout"]] if given["layout"] != "nchw" else []
    words += [part for module in found.keep for part in ("--keep", module)]
    return shlex.join(words)


def _show(found: Sensitivity, every: bool, following: str) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import console, table
    from edgeattn.quant.sensitivity import Error

    out = console()
    if found.random:
        out.print("[yellow]weights are random: the ranking means nothing for trained ones[/yellow]")
    if found.known:
        out.print(f"{found.known} of {len(found.rows)} rows were measured by an earlier run")
    scored = any(row["alone"]["samples"] for row in found.rows)
    figures = ("parameters", "alone", "SQNR", "all but it", *(("top-1", "agree", "KL") if scored else ()))
    rows = table("module", "kind", *figures, right=figures)
    for row in found.rows if every else found.rows[:_SHOWN]:
        alone, without = Error.from_dict(row["alone"]), Error.from_dict(row["without"])
        values = [f"{row['parameters']:,}", _error(alone), _decibels(alone), _error(without)]
        if scored:
            agree = alone.agree / alone.samples
            values += [f"{alone.gain:+.1%}", f"{agree:.1%}", f"{alone.kl:.1e}"]
        rows.add_row(escape(row["name"]), row["kind"], *values)
    out.print(rows)
    if len(found.rows) > _SHOWN and not every:
        out.print(f"and {len(found.rows) - _SHOWN} more: --all", style="dim")
    out.print()
    out.print(
        f"alone, all but it: relative L2 of the outputs against the model in floats, on {escape(found.samples)}",
        style="dim",
        soft_wrap=True,
    )
    if found.kept:
        _advise(found, following)


def _error(error: Any) -> str:
    return f"{error.relative_l2:.2e}" if error.finite else "[bold red]not finite[/bold red]"


def _decibels(error: Any) -> str:
    return f"{error.sqnr_db:.1f} dB" if error.finite and error.relative_l2 else ""


def _advise(found: Sensitivity, following: str) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import console, table
    from edgeattn.quant.sensitivity import Error

    out = console()
    out.print()
    scored = found.kept[0]["error"]["samples"] > 0
    figures = ("in floats", "relative L2", *(("top-1",) if scored else ()))
    steps = table(*figures, "", right=figures)
    for step in found.kept:
        error = Error.from_dict(step["error"])
        held = "[green]holds[/green]" if step["holds"] else "does not hold"
        worst = f"the {step['count']} worst" if step["count"] > 1 else "the worst" if step["count"] else "none"
        steps.add_row(worst, _error(error), *([f"{error.gain:+.1%}"] if scored else []), held)
    out.print(steps)
    evened = f"after {found.evened} weights and biases were evened out, as export does it, " if found.evened else ""
    out.print(
        f"simulated {evened}on {escape(found.judged)}; allowed is a relative L2 of {found.tolerance:g}",
        style="dim",
        soft_wrap=True,
    )
    out.print()
    if found.keep:
        out.print("for the recipe, so that the rest holds:")
        out.print(escape(found.toml()), soft_wrap=True)
    else:
        out.print("[green]nothing has to be kept in floats[/green]")
    out.print()
    out.print("next:")
    out.print(f"  {escape(following)}", soft_wrap=True)
