"""``edgeattn gate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeattn.cli._options import output_file

if TYPE_CHECKING:
    from edgeattn.profile.gate import Verdict
    from edgeattn.profile.record import Record

_COLOURS = {"pass": "green", "regress": "red", "inconclusive": "yellow", "refused": "red"}


@click.command("gate", short_help="Say whether a bundle is slower than another, measured in turns.")
@click.argument("base", type=click.Path())
@click.argument("head", type=click.Path(), required=False)
@click.option("--margin", default=0.05, show_default=True, help="How much slower still passes: 0.05 is five percent.")
@click.option("--device", "-d", default="local", help="A device's name, ssh://user@host, or local. [default: local]")
@click.option("--backend", "-b", help="Which artifact, where a bundle holds several. [default: the one in front]")
@click.option("--entry", "-e", help="Which graph. [default: main, or the first]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")
@click.option("--rounds", type=click.IntRange(min=2), help="Of three processes each. [default: 10 to 40, as it takes]")
@click.option("--always", is_flag=True, help="Measure also where both have the same bytes.")
@click.option(
    "--inconclusive",
    type=click.Choice(("pass", "fail")),
    default="pass",
    show_default=True,
    help="What the exit code makes of times that tell neither.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE.json", help="Write the records that it is from.")
def command(
    base: str,
    head: str | None,
    margin: float,
    device: str,
    backend: str | None,
    entry: str | None,
    threads: int,
    rounds: int | None,
    always: bool,
    inconclusive: str,
    as_json: bool,
    output: str | None,
) -> None:
    """Measure the bundles BASE and HEAD in turns, and fail where HEAD is slower by more than the margin.

    Every round has fresh processes of the base, the base again and the head. Base against base is the self-check.
    Bundles of the same bytes pass at once. In place of both bundles a file of records will do, which "edgeattn profile
    BASE BASE HEAD --json" wrote: the first is the base's and the last the head's; or a file for each.

    Exit code 0: pass, or inconclusive. 1: regress, or refused as the times are not comparable; inconclusive with
    --inconclusive fail.

    \b
      edgeattn gate main/fmvit-digits.onnx.fp32 out/fmvit-digits.onnx.fp32
      edgeattn gate main/fmvit-digits.onnx.fp32 out/fmvit-digits.onnx.fp32 --device ssh://pi@board --margin 0.1
      edgeattn gate records.json
    """
    import json

    from edgeattn.cli._show import Status
    from edgeattn.core.errors import UsageError
    from edgeattn.core.files import write_whole
    from edgeattn.profile import gate
    from edgeattn.profile.record import to_json

    file = output_file(output, ".json")
    given = [path for path in (base, head) if path is not None]
    files = [Path(path).is_file() for path in given]
    if all(files):
        chosen = _chosen([Path(path) for path in given])
        verdict = gate.judge_records(chosen[0], chosen[-1], chosen[1] if len(chosen) > 2 else None, margin)
    elif any(files):
        raise UsageError("a bundle and a file of records cannot be compared", value=" ".join(given), where="BASE, HEAD")
    elif head is None:
        why = "a file of records stands alone, a bundle does not"
        raise UsageError("there is nothing to compare with", value=base, where="HEAD", why=why)
    else:
        with Status() as status:
            verdict = gate.gate(
                Path(base),
                Path(head),
                device,
                margin=margin,
                backend=backend,
                entry=entry,
                threads=threads,
                rounds=rounds,
                always=always,
                say=status.say,
            )
    if file is not None and verdict.records:
        write_whole(file, to_json(verdict.records).encode())
    if as_json:
        click.echo(json.dumps(verdict.as_dict(), indent=1, allow_nan=False, ensure_ascii=False))
    else:
        _show(verdict)
        if file is not None:
            click.echo(f"wrote {file}" if verdict.records else "nothing was measured: no records to write")
    if verdict.verdict in ("regress", "refused") or (verdict.verdict == "inconclusive" and inconclusive == "fail"):
        sys.exit(1)
    if verdict.verdict == "inconclusive":
        words = "warning: inconclusive, which passes; --inconclusive fail makes it fail"
        click.echo(words, err=True)


def _chosen(files: list[Path]) -> list[Record]:
    """Of files of records the base, its repetition if there is one, and the head.

    Raises:
        UsageError: other records are among them.
    """
    from edgeattn.core.errors import UsageError
    from edgeattn.profile.record import read

    found = [read(file) for file in files]
    records = [record for each in found for record in each]
    if len(records) < 2:
        raise UsageError("there is nothing to compare with", value=files[0], why="it holds one record")
    first, *between, _ = records
    same = all((r.label, r.subject.digest) == (first.label, first.subject.digest) for r in between)
    if len(records) > 3 or not same or (len(files) > 1 and len(found[1]) > 1):
        raise UsageError(
            "which records to compare cannot be told",
            value=f"{len(records)} records",
            where=", ".join(map(str, files)),
            why="there may be the base, the base again, and the head",
            fix="edgeattn profile BASE BASE HEAD --json",
        )
    return records


def _show(verdict: Verdict) -> None:
    """The times, what does not depend on them, the verdict, and why."""
    from rich.markup import escape

    from edgeattn.cli._show import console, table

    out = console()
    if verdict.ratio is not None or verdict.self_check is not None:
        rows = table("", "ratio", "95 % interval", "rounds", right=("ratio", "rounds"))
        for name, ratio in (("self-check, base / base", verdict.self_check), ("head / base", verdict.ratio)):
            if ratio is not None:
                reach = f"{ratio.low:.3f}x to {ratio.high:.3f}x"
                rows.add_row(name, f"{ratio.value:.3f}x", reach, str(ratio.rounds))
        rows.add_row("passes", "", f"up to {1 + verdict.margin:.3f}x", "")
        out.print(rows)
        out.print()
    rows = table("", "base", "head", "head / base", right=("base", "head", "head / base"))
    p50s = [record.latency.p50 for record in (verdict.base, verdict.head) if record and record.latency]
    if len(p50s) == 2:
        rows.add_row("p50, ms", *(f"{p50:.4g}" for p50 in p50s), "")
    for name, proxy in verdict.proxies.items():
        if proxy.base is None or proxy.head is None:
            rows.add_row(name, "-", "-", "")
            continue
        values = [f"{value:,.3f}" if proxy.unit else f"{value:,.0f}" for value in (proxy.base, proxy.head)]
        ratio_text = f"{proxy.ratio:.4f}x" if proxy.ratio is not None else ""
        rows.add_row(f"{name}, {proxy.unit}" if proxy.unit else name, *values, ratio_text)
    if verdict.proxies:
        out.print(rows)
        out.print()
    for name, proxy in verdict.proxies.items():
        if proxy.why:
            out.print(f"{name}: {escape(proxy.why)}", style="dim", soft_wrap=True)
    for note in verdict.notes:
        out.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    colour = _COLOURS[verdict.verdict]
    out.print(f"[bold {colour}]{verdict.verdict}[/bold {colour}]  {escape(verdict.why)}", soft_wrap=True)
    if verdict.fix:
        out.print(f"  {escape(verdict.fix)}", soft_wrap=True)
