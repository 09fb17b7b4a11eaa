"""``edgeattn debug``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import model_options, parse_args, read_feeds

if TYPE_CHECKING:
    from rich.console import Console

    from edgeattn.pipeline.debug import Debugged
    from edgeattn.pipeline.meeting import Met

#: Rows of the table before the first divergence and after it, unless all are asked for.
_BEFORE, _AFTER = 12, 6
#: Modules that were fused with the one to blame are named up to so many.
_NAMED = 8
#: How many of the largest errors are named where no single module is to blame.
_JUMPS = 5


@click.command("debug", short_help="Find the first module at which two programs of a model part.")
@click.argument("a")
@click.argument("b")
@click.option("--input-file", "files", multiple=True, metavar="NAME=FILE.npy", help="The model's input; once for each.")
@click.option("--tolerance", type=click.FloatRange(min=0, min_open=True), help="Relative L2. [default: by precision]")
@click.option("--model", "-m", "witness", metavar="MODEL", help="What A and B, both files, were made of: a witness.")
@click.option("--all", "every", is_flag=True, help="Show every module, not only those around the first divergence.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    a: str,
    b: str,
    files: tuple[str, ...],
    tolerance: float | None,
    witness: str | None,
    every: bool,
    as_json: bool,
    args: tuple[str, ...],
    **given: Any,
) -> None:
    """Compare two programs of one model, A and B, module by module, and name the first one at which they part.

    Each is MODEL or MODEL@training (the model in PyTorch), MODEL@deploy (reparameterized), a bundle's folder
    (FOLDER@BACKEND for one of its artifacts), or a file: .onnx, .tflite, .mlpackage. Errors are relative to A. MODEL is
    as for edgeattn export. Inputs are those of --input-file, else the golden samples of a bundle, else random ones.

    Where neither is a model in PyTorch, --model names the one that both were made of: then it is also known which of
    the two is wrong, and what each module should make of its own inputs.

    \b
      edgeattn debug fmvit-digits@deploy fmvit-digits.onnx.w8a8
      edgeattn debug fmvit-digits.onnx.fp32 edited.onnx
      edgeattn debug net.py:build net.tflite.fp32 --input x=1x3x32x32 --input-file x=photo.npy

    Exit code 0 if the outputs agree within the tolerance, 1 if they do not.
    """
    import json
    import sys

    from edgeattn.cli._show import Status, console
    from edgeattn.pipeline.debug import debug

    feeds = read_feeds(files, "--input-file") if files else None
    with Status() as status:
        limits: dict[str, Any] = {"tolerance": tolerance, "witness": witness}
        found = debug(a, b, **given, **limits, args=parse_args(args), feeds=feeds, say=status.say)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=1))
    else:
        _show(console(), found, every)
    if not found.holds:
        sys.exit(1)


def _number(value: float | None) -> float | None:
    """What JSON has no number for is None."""
    return value if value is not None and math.isfinite(value) else None


def _row(met: Met) -> dict[str, Any]:
    return {
        "module": met.module,
        "place": "output" if met.output else "input",
        "op": met.op,
        "tensor": met.tensor,
        "error": _number(met.error),
        "own_error": _number(met.own),
    }


def _plain(found: Debugged) -> dict[str, Any]:
    """Plain data for JSON; errors that are not finite are null."""
    from dataclasses import asdict

    from edgeattn.pipeline.meeting import growth

    first = found.first
    data: dict[str, Any] = {
        "a": found.a,
        "b": found.b,
        "inputs": found.sample,
        "tolerance": found.tolerance,
        "holds": found.holds,
        "outputs": {name: n.as_dict() for name, n in found.outputs.items()},
        "first": None,
        "modules": [_row(met) for met in found.comparison.met],
        "passed_over": dict(found.comparison.passed),
        "jumps": [{**_row(m), "jump": _number(growth(m))} for m in found.comparison.jumps(_JUMPS)],
        "runs": found.comparison.windows[0],
        "held_bytes": found.comparison.windows[1],
        "notes": found.notes,
    }
    if first is not None:
        data["first"] = {**_row(first), "module": found.comparison.culprit, "at": first.module}
        data["first"]["with"] = found.others
        data["first"]["sure"] = found.comparison.sure
        data["first"]["reaches_outputs"] = found.comparison.reaches
    if first is not None and found.cause is not None:
        cause = asdict(found.cause)
        data["first"]["cause"] = {k: _number(v) if isinstance(v, float) else v for k, v in cause.items()}
    if first is not None and found.extents is not None:
        data["first"]["ranges"] = [
            {"program": words, **{k: _number(v) for k, v in asdict(extent).items()}}
            for words, extent in zip(found.sides, found.extents, strict=True)
        ]
    return data


def _figure(value: float | None) -> str:
    return "" if value is None else "not finite" if not math.isfinite(value) else f"{value:.1e}"


def _table(out: Console, found: Debugged, every: bool) -> None:
    """The modules in order; the first divergence is marked."""
    from rich.markup import escape

    from edgeattn.cli._show import table

    met, first = found.comparison.met, found.comparison.first
    start, end = (0, len(met)) if every or first is None else (max(0, first - _BEFORE), first + _AFTER + 1)
    if not every and first is None and len(met) > _BEFORE + _AFTER:
        start = len(met) - _BEFORE - _AFTER
    rows = table("", "module", "error", "own error", "operation", "tensor", right=("error", "own error"))
    for i, item in list(enumerate(met))[start:end]:
        mark, style = (">", "bold red") if i == first else ("", "")
        place = f"{item.module or '(model)'}{'' if item.output else ' (its input)'}"
        cells = (mark, place, _figure(item.error), _figure(item.own), item.op, item.tensor)
        rows.add_row(*map(escape, cells), style=style)
    out.print(rows)
    left = len(met) - len(met[start:end])
    if left:
        out.print(f"{left} more places compared; --all shows them", style="dim")
    out.print(
        "error: relative L2 from the other program; own error: from what the model in PyTorch makes of the other's "
        "tensors before"
        if found.comparison.shadows
        else "error: relative L2 between both programs",
        style="dim",
        soft_wrap=True,
    )


def _show(out: Console, found: Debugged, every: bool) -> None:
    from rich.markup import escape

    from edgeattn.cli._show import table
    from edgeattn.pipeline.meeting import growth

    _table(out, found, every)
    out.print()
    facts = table("", "")
    worst = max((n.relative_l2 for n in found.outputs.values()), default=0.0)
    bad = sum(n.nonfinite for n in found.outputs.values())
    state = "[bold green]agree[/bold green]" if found.holds else "[bold red]diverge[/bold red]"
    finite = f", {bad} values of B not finite" if bad else ""
    facts.add_row(state, f"outputs are {worst:.2e} apart, allowed {found.tolerance:g}{finite}; {escape(found.sample)}")
    first, cause = found.first, found.cause
    if first is not None:
        sure = "" if found.comparison.sure else ", though not proven"
        name = f"[bold]{escape(found.comparison.culprit or '(model)')}[/bold]"
        gone = "" if found.comparison.reaches else "; what follows levels its error out before the outputs"
        if len(found.others) > _NAMED:
            words = f"one of {len(found.others)} modules before it: no tensor between them could be compared"
            facts.add_row(
                "module", f"{name} diverges{sure}, or {escape(f'{words}; {first.op}, tensor {first.tensor}')}"
            )
        else:
            fused = f", fused with {', '.join(found.others)}" if found.others else ""
            words = f"the first module to diverge{sure}{fused}: {first.op}, tensor {first.tensor}{gone}"
            facts.add_row("module", f"{name} is {escape(words)}")
    elif not found.holds:
        facts.add_row("module", "no single module: it builds up. The largest jumps:")
        for item in found.comparison.jumps(_JUMPS):
            facts.add_row("", escape(f"{item.module or '(model)'}: {growth(item):.1e} ({item.op}, {item.tensor})"))
    if found.extents is not None:
        for side, extent in zip(found.sides, found.extents, strict=True):
            ends = f", {extent.ends:.1%} of the values at an end" if extent.ends > 0.001 else ""
            values = f"{extent.low:.4g} to {extent.high:.4g}, {extent.nonfinite} not finite{ends}"
            facts.add_row("values", f"{values}: {escape(side)}")
    if cause is not None:
        facts.add_row("cause", f"{cause.name} ({cause.confidence}): {escape(cause.evidence)}")
        facts.add_row("try", escape(cause.fix))
    for reason, count in found.comparison.passed.items():
        if count:
            facts.add_row("passed over", f"{count} modules: {reason}")
    for note in found.notes:
        facts.add_row("note", f"[yellow]{escape(note)}[/yellow]")
    out.print(facts)
