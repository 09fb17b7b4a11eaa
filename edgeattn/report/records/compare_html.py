"""A comparison as one HTML page."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgeattn.report.records.charts import KEPT, evenly, pooled, short
from edgeattn.report.records.compare import Comparison, Pair, lines, times
from edgeattn.report.records.page import Page, Section, render
from edgeattn.report.records.tables import Badge, Cell, Column, Table, figure, text
from edgeattn.report.records.words import NONE, caveats, count, error, number, p50, plain, score

#: Modules of a pair that are listed.
MODULES = 100


def html(found: Comparison) -> str:
    """One file with every pair.

    Raises:
        ToolchainMissing: jinja2 or plotly is not installed.
    """
    return render(page(found))


def page(found: Comparison) -> Page:
    """What is shown of the pairs, in order."""
    many = Counter(pair.label for pair in found.pairs)
    names = [p.label if many[p.label] == 1 else f"{p.label}, {plain(p.b.created)}" for p in found.pairs]
    rest = len(found.only_a) + len(found.only_b)
    left = f", {count(rest, 'record')} without their like" if rest else ""
    older = f", {count(found.older, 'older record')} left out" if found.older else ""
    notes = [found.drift.replace("`", "")] if found.drift else []
    if any(pair.across for pair in found.pairs):
        notes.insert(0, "Across places: some of these records are from different machines, systems or units.")
    return Page(
        title="A against B",
        lead=f"{count(len(found.pairs), 'pair')} of records{left}{older}. Ratios are B over A: below 1, B is faster.",
        notes=notes,
        sections=_sections(found, names),
        data={"records": [_overview(p, name) for p, name in zip(found.pairs, names, strict=True)], "metrics": []},
        one="One pair",
        names=names,
        details=[_detail(pair) for pair in found.pairs],
        foot="Times in ms, sizes in MB of 1e6 bytes. This file holds everything that it shows and connects to nothing.",
    )


def _sections(found: Comparison, names: list[str]) -> list[Section]:
    made = [
        Section("summary", "Pairs", "Figures of B, those of A below; a heading sorts.", table=_summary(found, names))
    ]
    if any(pair.p50_ratio is not None for pair in found.pairs):
        words = "B's median latency over A's, with its interval where both were measured."
        made.append(Section("ratios", "Ratio of the medians", words, chart="ratios"))
    if found.only_a or found.only_b:
        made.append(Section("rest", "Without their like", "Records that only one side has.", table=_rest(found)))
    made.append(Section("figures", "All figures", "", made="figures", one=True, more="notes"))
    if any(pair.a.latency or pair.b.latency for pair in found.pairs):
        words = "The runs of both, in ms. The histogram ends at the 99th percentile; a double click shows the rest."
        choices = (("histogram", "histogram"), ("violin", "violins"), ("ecdf", "share of runs within a time"))
        made.append(Section("overlay", "Latency", words, chart="overlay", choices=choices, one=True))
    if any(pair.changes for pair in found.pairs):
        words = "B minus A by torch module, the largest differences first."
        made.append(Section("changes", "What changed", words, chart="changes", made="changes", one=True))
    return made


def _summary(found: Comparison, names: list[str]) -> Table:
    columns = [
        Column("#", figure=True),
        Column("pair"),
        Column("p50", "ms", True),
        Column("B/A", "", True, "ratio of the medians, with its interval"),
        Column("p99", "ms", True),
        Column("load", "ms", True),
        Column("peak", "MB", True),
        Column("size", "MB", True),
        Column("accuracy", "", True),
        Column("rel. L2", "", True),
    ]
    rows = [_row(i, pair, name) for i, (pair, name) in enumerate(zip(found.pairs, names, strict=True), 1)]
    return Table(columns, rows, label="pairs").trimmed()


def _row(index: int, pair: Pair, name: str) -> list[Cell]:
    known = {line.name: line for line in lines(pair)}

    def cell(of: str) -> Cell:
        line = known.get(of)
        return Cell(line.b_text, line.b, f"A: {line.a_text}") if line else Cell(NONE)

    interval = f"{times(pair.ratio.low)} to {times(pair.ratio.high)}" if pair.ratio else ""
    a, b = pair.a.proof, pair.b.proof
    return [
        Cell(str(index), index),
        Cell(name, name, badges=_badges(pair)),
        Cell(number(p50(pair.b)), p50(pair.b), f"A: {number(p50(pair.a))}"),
        Cell(times(pair.p50_ratio) or NONE, pair.p50_ratio, interval),
        cell("p99"),
        cell("load"),
        cell("peak, process"),
        cell("size"),
        Cell(score(b.accuracy, b.metric), b.accuracy, f"A: {score(a.accuracy, a.metric)}" if a.accuracy else ""),
        figure(b.worst_relative_l2, error, f"A: {error(a.worst_relative_l2)}" if a.worst_relative_l2 else ""),
    ]


def _badges(pair: Pair) -> tuple[Badge, ...]:
    found = (
        [Badge("across places", "warn", "; ".join(f"{w}: {a}, {b}" for w, a, b in pair.differs))] if pair.across else []
    )
    for side, record in (("A", pair.a), ("B", pair.b)):
        found += [Badge(f"{side}: {brief}", "warn", full) for brief, full in caveats(record)]
    return tuple(found)


def _rest(found: Comparison) -> Table:
    sides = [*(("A", record) for record in found.only_a), *(("B", record) for record in found.only_b)]
    rows = [[text(side), text(record.label), text(record.place.device), figure(p50(record))] for side, record in sides]
    return Table([Column("side"), Column("record"), Column("device"), Column("p50", "ms", True)], rows, label="rest")


def _overview(pair: Pair, name: str) -> dict[str, Any]:
    ratio = pair.ratio
    return {
        "name": name,
        "short": f"{plain(pair.b.subject.model)} {plain(pair.b.subject.precision)}",
        "searched": "",
        "ratio": short(pair.p50_ratio),
        "low": short(ratio.low) if ratio else None,
        "high": short(ratio.high) if ratio else None,
    }


def _detail(pair: Pair) -> dict[str, Any]:
    figures = Table(
        [Column("figure"), Column("A", "", True), Column("B", "", True), Column("change", "", True)],
        [
            [
                text(f"{line.name}, {line.unit}" if line.unit else line.name),
                Cell(line.a_text, line.a),
                Cell(line.b_text, line.b),
                Cell(line.change or NONE, line.change or None),
            ]
            for line in lines(pair)
        ]
        + [[text(what), text(a), text(b), Cell("other")] for what, a, b in pair.differs],
        label="figures",
    )
    changes = Table(
        [Column("module"), *(Column(name, "ms", True) for name in ("A", "B", "B minus A"))],
        [
            [text(x.module), figure(x.a), figure(x.b), Cell(f"{x.change:+.3g}", x.change)]
            for x in pair.changes[:MODULES]
        ],
        label="changes by module",
    )
    return {
        "figures": figures.as_dict(),
        "notes": "; ".join(pair.notes),
        "sides": [
            {
                "name": f"{side}: {plain(record.label)}",
                "place": place,
                "values": [short(v) for v in evenly(pooled(record.latency), KEPT)] if record.latency else [],
            }
            for place, (side, record) in enumerate((("A", pair.a), ("B", pair.b)))
        ],
        "changes": [
            {"module": x.module, "a": short(x.a), "b": short(x.b), "change": x.change} for x in pair.changes[:40]
        ],
        "basis": pair.basis,
        "table": changes.as_dict() if pair.changes else None,
    }
