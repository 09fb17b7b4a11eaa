"""A report as one HTML page."""

from __future__ import annotations

from edgeattn.profile.record import Record
from edgeattn.report.records.charts import detail, metrics, over_time, overview
from edgeattn.report.records.page import Page, Section, render
from edgeattn.report.records.tables import (
    caveat_table,
    lint_table,
    manifest_table,
    proof_table,
    reparam_table,
    summary,
)
from edgeattn.report.records.words import count, names, over_tolerance, p50, plain

#: In a chart of all records; as in ``charts.js``.
_ROWS = 40


def html(records: list[Record]) -> str:
    """One file with everything that the records hold.

    Raises:
        ToolchainMissing: jinja2 or plotly is not installed.
    """
    return render(page(records))


def page(records: list[Record]) -> Page:
    """What is shown of the records, in order; a part that none of them has data for is left away."""
    called = names(records)
    table = summary(records, called)
    made = sorted(record.created for record in records)
    when = plain(made[0] if made[0] == made[-1] else f"{made[0]} to {made[-1]}")
    return Page(
        title=_title(records),
        lead=f"{_counts(records)}. Made {when}.",
        facts=_facts(records),
        sections=[*_of_all(records, called), *_of_one(records)],
        data={
            "records": [
                overview(record, name, searched)
                for record, name, searched in zip(records, called, table.searched, strict=True)
            ],
            "metrics": metrics(records),
        },
        one="One record",
        names=called,
        details=[detail(record, name) for record, name in zip(records, called, strict=True)],
        foot=f"EdgeAttn {', '.join(sorted({plain(r.edgeattn) for r in records}))}. Times in ms, sizes in MB of 1e6 "
        "bytes. This file holds everything that it shows and connects to nothing.",
    )


def _title(records: list[Record]) -> str:
    models = sorted({plain(record.subject.model) for record in records})
    return f"{models[0]}: on devices" if len(models) == 1 else f"{count(len(models), 'model')} on devices"


def _counts(records: list[Record]) -> str:
    measured = sum(record.kind == "measured" for record in records)
    parts = [f"{measured:,} measured"] if measured else []
    parts += [f"{len(records) - measured:,} estimated"] if measured < len(records) else []
    return f"{count(len(records), 'record')}: {', '.join(parts)}"


def _facts(records: list[Record]) -> list[tuple[str, str, str]]:
    found = []
    for name, values in (
        ("models", {r.subject.model for r in records}),
        ("targets", {r.subject.target for r in records}),
        ("precisions", {r.subject.precision for r in records}),
        ("devices", {r.place.device for r in records}),
    ):
        one = plain(next(iter(values)))
        found.append(
            (
                name if len(values) > 1 else name[:-1],
                one if len(values) == 1 and len(one) < 26 else f"{len(values)}",
                "",
            )
        )
    held = [r for r in records if r.proof.worst_relative_l2 is not None and r.proof.tolerance is not None]
    if held:
        bad = sum(map(over_tolerance, held))
        found.append(("numerics within tolerance", f"{len(held) - bad} of {len(held)}", "bad" if bad else ""))
    odd = sum(bool(r.flags or r.partial) for r in records)
    found.append(("flagged or partial", f"{odd} of {len(records)}", "warn" if odd else ""))
    return found


def _of_all(records: list[Record], called: list[str]) -> list[Section]:
    limit = f" The first {_ROWS} that the filter leaves are drawn." if len(records) > _ROWS else ""
    found = [
        Section(
            "summary",
            "Summary",
            "Medians of all runs with their interval; a heading sorts. The filter holds for the charts, too.",
            table=summary(records, called),
            filtered=len(records) > 1,
        )
    ]
    if caution := caveat_table(records, called):
        found.append(Section("caveats", "To know", "What must be known before a figure is trusted.", table=caution))
    if any(record.latency for record in records):
        found.append(
            Section(
                "latency",
                "Latency",
                "How the measured runs are spread, in ms; the box has the middle half of them. "
                f"Estimates have no runs and are not in it.{limit}",
                chart="latency",
                choices=(("violin", "violins"), ("ecdf", "share of runs within a time")),
            )
        )
    if over_time(records):
        words = "Medians with their intervals, in ms, by when they were measured; a label has commit and version."
        found.append(Section("time", "Over time", words, chart="time"))
    if found_metrics := metrics(records):
        found.append(
            Section(
                "pareto",
                "Accuracy, latency, size",
                "A bubble's area is the artifact's size in MB; rings are estimates. The dotted line joins what nothing "
                "on the same device beats. Compare models of the same task alone; the legend hides devices.",
                chart="pareto",
                choices=tuple((metric, metric) for metric, _ in found_metrics),
            )
        )
    if any(r.memory.peak_rss_mb is not None or r.memory.device_mb is not None for r in records):
        words = f"Peaks in MB of 1e6 bytes: of the process, and of the device's own memory.{limit}"
        found.append(Section("memory", "Memory", words, chart="memory"))
    if any(r.latency and (r.latency.load_ms or r.latency.first_ms) for r in records):
        words = (
            f"From the file to a program that is ready, the first run, and the median of those after it, in ms.{limit}"
        )
        found.append(Section("times", "Load and first run", words, chart="times"))
    if any(r.breakdown.fallback for r in records):
        words = f"What ran on another unit than was asked for, in percent, by unit.{limit}"
        found.append(Section("fallback", "Fallback", words, chart="fallback"))
    return found + _tables(records, called)


def _tables(records: list[Record], called: list[str]) -> list[Section]:
    tables = [
        (
            "proof",
            "Proven, and not",
            "Relative L2 against the training form in float32, the score on held-out samples, and what is not shown.",
            proof_table(records, called),
        ),
        (
            "reparam",
            "Reparameterization",
            "Blocks that were fused, and the largest relative L2 between a fused block and its training form.",
            reparam_table(records),
        ),
        ("lint", "Lint", "What is known to go wrong or slow on the target, found in the model.", lint_table(records)),
        ("origin", "Origin", "Bundles, machines and versions that the figures are from.", manifest_table(records)),
    ]
    return [Section(name, title, words, table=table) for name, title, words, table in tables if table]


def _of_one(records: list[Record]) -> list[Section]:
    ops = [op for record in records for op in record.breakdown.operations]
    timed = any(value is not None for op in ops for value in (op.ms, op.estimate_ms, op.share))
    found = []
    if timed:
        found += [
            Section(
                "operations",
                "Time by module",
                "The 25 that take most.",
                chart="operations",
                choices=(
                    ("module", "by torch module"),
                    ("operation", "by operation"),
                    ("kind", "by kind of operation"),
                ),
                one=True,
                more="operations_words",
            ),
            Section(
                "treemap",
                "Where the time goes",
                "Areas are time, colours are kinds of operations; a click goes into a module.",
                chart="treemap",
                one=True,
            ),
        ]
    if any(op.macs and op.bytes and (op.ms or op.estimate_ms) for op in ops):
        words = "Operations against what the device could do at most: slanted for its memory, flat for its arithmetic."
        found.append(Section("roofline", "Roofline", words, chart="roofline", one=True))
    if any(record.proof.quantized for record in records):
        words = "Relative L2 of the rounded weights of each module, the worst ones."
        found.append(Section("quantized", "Quantization error", words, chart="quantized", one=True))
    if any(record.latency and p50(record) for record in records):
        words = "Each run's latency in ms: a slope is drift, a step is throttling."
        found.append(Section("runs", "Runs in order", words, chart="runs", one=True))
    if any(
        s.temperature_c is not None or s.clock_mhz is not None or s.power_w is not None
        for r in records
        for s in r.states
    ):
        words = "What the machine said of itself before, during and after; dashed is the clock's limit."
        found.append(Section("states", "State of the machine", words, chart="states", one=True))
    if timed:
        found.append(Section("ops-table", "Operations", "The 100 that take most.", made="operations", one=True))
    if any(record.proof.numerics for record in records):
        words = (
            "Outputs of the golden samples against the training form in float32, the furthest off first, 60 at most."
        )
        found.append(Section("numerics", "Numerics", words, made="numerics", one=True))
    return found
