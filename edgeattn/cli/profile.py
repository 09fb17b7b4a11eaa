"""``edgeattn profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeattn.cli._options import output_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from edgeattn.profile.record import Record
    from edgeattn.profile.run import Outcome

#: Operations that are shown of each record; all are in the record.
SHOWN = 8


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """Whole numbers above 0 with commas between: 1,2,4."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """See ``click.ParamType``."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(text) for text in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not whole numbers with commas between, such as 1,2,4", param, ctx)
        if min(numbers) < 1:
            self.fail(f"{min(numbers)} is too small: at least 1", param, ctx)
        return tuple(dict.fromkeys(numbers))


@click.command("profile", short_help="Measure bundles' latency, here or on a device, or estimate it.")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path())
@click.option("--device", "-d", default="local", help="A device's name, ssh://user@host, or local. [default: local]")
@click.option("--backend", "-b", help="Which artifact, where a bundle holds several. [default: all]")
@click.option("--entry", "-e", help="Which graph. [default: main, or the first]")
@click.option("--precision", "-p", metavar="P[,P...]", help="Of the bundles, only those of these precisions.")
@click.option("--threads", type=Numbers(), help="CPU threads; not for Core ML. [default: the runner's choice]")
@click.option("--batch", type=Numbers(), help="Sizes of the first axis, where the artifact takes them.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Fresh processes of each. [default: 16 to 40 of several, 4 to 12 of one, until intervals are narrow]",
)
@click.option("--runs", type=click.IntRange(min=1), help="Timed runs of each process. [default: for half a second]")
@click.option("--warmup", type=click.IntRange(min=0), help="Runs before. [default: until the times are stable]")
@click.option("--within", default=2.0, show_default=True, help="Percent of the median that is narrow enough.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds after which no further round begins.")
@click.option("--cooldown", default=60.0, show_default=True, help="Seconds that a hot device may cool down, a round.")
@click.option("--ops/--no-ops", default=True, show_default=True, help="Time each operation too, in a process apart.")
@click.option("--estimate", is_flag=True, help="Run nothing: an uncalibrated estimate from the device file's peaks.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON.")
@click.option("--output", "-o", type=click.Path(), metavar="FILE.json", help="Write the records there too.")
@click.option("--history/--no-history", default=True, show_default=True, help="Add the records to the history.")
def command(
    bundles: tuple[str, ...],
    device: str,
    backend: str | None,
    entry: str | None,
    precision: str | None,
    threads: tuple[int, ...] | None,
    batch: tuple[int, ...] | None,
    estimate: bool,
    as_json: bool,
    output: str | None,
    history: bool,
    **effort: Any,
) -> None:
    """Measure the latency of bundles with their own run.py, in fresh processes on this machine or on a device.

    The golden outputs are compared first: a wrong result has no latency. Several bundles, or several numbers of
    threads, are measured in turns, block by block, so that their ratios are fair. A BUNDLE may be a folder of bundles.

    \b
      edgeattn profile out/fmvit-digits.onnx.fp32
      edgeattn profile out/a.onnx.fp32 out/b.onnx.fp32 --threads 1
      edgeattn profile out --precision fp32,w8a8 --output records.json
      edgeattn profile out/fmvit-digits.tflite.fp32 --estimate --device raspberry-pi-5
    """
    from edgeattn.cli._show import Status
    from edgeattn.core.errors import EdgeAttnError
    from edgeattn.core.files import write_whole
    from edgeattn.profile import run, store
    from edgeattn.profile.measure import Effort
    from edgeattn.profile.record import to_json

    file = output_file(output, ".json")
    precisions = tuple(filter(None, (precision or "").split(",")))
    jobs = run.jobs_of(
        run.select(bundles, precisions),
        run.Wanted(backend, entry, threads or (), batch or (), precisions),
    )

    unkept: list[EdgeAttnError] = []

    def keep(records: Sequence[Record]) -> None:
        """Before anything is shown: what was measured is not lost to whatever comes after."""
        if file is not None:
            write_whole(file, to_json(records).encode())
        try:
            if history:
                store.append(records)
        except EdgeAttnError as error:  # the records are shown all the same
            unkept.append(error)

    if estimate:
        outcome = run.Outcome(run.estimate(jobs, device))
        keep(outcome.records)
    else:
        names = {"within": effort.pop("within") / 100, "limit_s": effort.pop("limit"), "operations": effort.pop("ops")}
        with Status() as status:
            given = Effort(cooldown_s=effort.pop("cooldown"), **names, **effort)
            outcome = run.measure(jobs, device, given, status.say, keep)
    if as_json:
        click.echo(to_json(outcome.records, run.pairs(outcome.records, outcome.ratios)), nl=False)
    else:
        _show(outcome)
        if file is not None:
            click.echo(f"wrote {output}; edgeattn report {output} -o report.html makes a page of it")
    if outcome.stopped is not None:
        if isinstance(outcome.stopped, EdgeAttnError):
            outcome.stopped.details = [*outcome.stopped.details, *_kept(outcome)]
        raise outcome.stopped
    if outcome.failed:
        raise outcome.failed[0][1]
    if unkept:
        raise unkept[0]


def _kept(outcome: Outcome) -> list[str]:
    return [f"kept: {record.label}, {record.latency.runs} runs" for record in outcome.records if record.latency]


def _show(outcome: Outcome) -> None:
    """Tables of times and of operations, and what must be known of them."""
    from rich.markup import escape

    from edgeattn.cli._show import console, table

    out, records = console(), outcome.records
    measured = [record for record in records if record.latency]
    if measured:
        columns = ("p50 ms", "+-", "p90", "p99", "first", "load", "peak MB", "runs")
        # Of a program that the system compiles at its very first load.
        once = ("first load",) if any(record.latency and record.latency.load_first_ms for record in measured) else ()
        ratio = ("ratio",) if outcome.ratios else ()
        rows = table("bundle", *columns, *once, *ratio, right=(*columns, *once, *ratio))
        for record in measured:
            found = record.latency
            assert found is not None
            half = max(found.high - found.p50, found.p50 - found.low) / found.p50
            cells = [f"{found.p50:.4g}", f"{half:.1%}", f"{found.p90:.4g}", f"{found.p99:.4g}"]
            cells += [f"{values[0]:.3g}" if values else "-" for values in (found.first_ms, found.load_ms)]
            cells += [f"{record.memory.peak_rss_mb:.0f}" if record.memory.peak_rss_mb else "-"]
            cells += [f"{found.runs} in {len(found.blocks)}"]
            cells += [f"{found.load_first_ms:.4g}" if found.load_first_ms else "-"] * len(once)
            if ratio:
                of = outcome.ratios.get(record.id)
                cells += [
                    f"{of.value:.3f}x [{of.low:.3f}-{of.high:.3f}]" if of else "1" if record is measured[0] else ""
                ]
            rows.add_row(escape(record.label), *cells)
        out.print(rows)
        out.print()
        if ratio:
            words = f"ratio: of the medians, to {measured[0].label}, whose blocks took turns; with its 95 % interval"
            out.print(words, markup=False, soft_wrap=True, style="dim")
        for line in dict.fromkeys(line for record in measured for line in _about(record)):
            out.print(line, markup=False, soft_wrap=True, style="dim")
        clock, least = (
            max(r.latency.clock_ms for r in measured if r.latency),
            min(r.latency.p50 for r in measured if r.latency),
        )
        out.print(
            f"+-: 95 % interval of the median; timing an empty run takes {clock * 1e6:.0f} ns, "
            f"{clock / least:.2%} of the shortest p50",
            style="dim",
            soft_wrap=True,
        )
    for record in records:
        _operations(out, record)
    for record in measured:
        for flag in (*record.flags, *((f"partial: {record.partial}",) if record.partial else ())):
            out.print(f"[yellow]{escape(record.label)}: {escape(flag)}[/yellow]", soft_wrap=True)
        if record.subject.weights == "random":
            out.print(f"[yellow]{escape(record.label)}: the weights are random[/yellow]", soft_wrap=True)
    for label, why in outcome.unmeasured:
        out.print(f"[red]{escape(label)}: not measured: {escape(why)}[/red]", soft_wrap=True)
    for name, error in outcome.failed:
        out.print(f"[red]{escape(name)}: not measured: {escape(error.what)}[/red]", soft_wrap=True)


def _about(record: Record) -> list[str]:
    """Where and how it was measured."""
    place = record.place
    state = [s for s in record.states if s.when == "after"] or list(record.states[-1:])
    words = [place.cpu or place.machine, place.gpu, place.runtime]
    words += [f"threads {record.settings.threads}"] if record.settings.threads else []
    if state:
        words += [f"{state[-1].temperature_c:.0f} °C"] if state[-1].temperature_c is not None else []
        words += [f"{state[-1].clock_mhz:.0f} MHz"] if state[-1].clock_mhz is not None else []
    return [", ".join(word for word in words if word), f"timed: {record.settings.timed}"]


def _operations(out: Console, record: Record) -> None:
    """The slowest operations, by module; and what falls back."""
    from rich.markup import escape

    from edgeattn.cli._show import table

    found = record.breakdown
    if record.kind == "estimated":
        roof = found.roofline
        assert roof is not None
        out.print(
            f"[bold]{escape(record.label)} on {escape(record.place.device)}: uncalibrated estimate "
            f"{found.estimate_ms:.4g} ms[/bold]"
        )
        out.print(
            f"from {roof.tflops * 1e3:.4g} GFLOPS and {roof.gb_s:.4g} GB/s, {roof.source}: a bound, not a measurement",
            style="dim",
            soft_wrap=True,
        )
    if not found.operations:
        return
    measured = bool(found.source)
    taken = sorted(found.operations, key=lambda op: -(op.ms or op.share or 0.0 if measured else op.estimate_ms or 0.0))
    numbers = (
        ("ms", "share", "MMAC", "kB", "GFLOP/s", "roofline") if measured else ("estimate ms", "MMAC", "kB", "bound")
    )
    rows = table("module", "operation", *numbers, right=numbers)
    for op in taken[:SHOWN]:
        size = [f"{op.macs / 1e6:.2f}" if op.macs else "-", f"{op.bytes / 1e3:.0f}" if op.bytes is not None else "-"]
        if measured:
            rate = f"{2e-6 * op.macs / op.ms:.1f}" if op.macs and op.ms else "-"
            roof_share = f"{op.estimate_ms / op.ms:.0%} {op.bound}" if op.estimate_ms and op.ms else "-"
            cells = [f"{op.ms:.4f}" if op.ms is not None else "-", f"{op.share or 0:.1%}", *size, rate, roof_share]
        else:
            cells = [f"{op.estimate_ms:.4g}" if op.estimate_ms is not None else "-", *size, op.bound]
        rows.add_row(escape(op.module or op.name), escape(op.op), *cells)
    out.print()
    if measured:
        out.print(f"[bold]{escape(record.label)}: slowest operations[/bold] of {len(taken)}", soft_wrap=True)
    out.print(rows)
    if not measured:
        return
    overhead = f"; their sum is {found.overhead:.2f}x the p50 measured without it" if found.overhead else ""
    out.print(f"by {found.source}{overhead}", markup=False, style="dim", soft_wrap=True)
    shares = [f"{u}: {v['ops']:.1f} % of operations, {v['time']:.1f} % of time" for u, v in found.fallback.items()]
    fell = "; ".join(shares) if shares else "nothing"
    out.print(f"off {found.wanted or 'the unit asked for'}: {fell}", markup=False, style="dim", soft_wrap=True)
