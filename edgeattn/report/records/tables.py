"""Tables of a report: rows of cells, each with its text and what it is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from edgeattn.profile.record import Record
from edgeattn.report.records.words import (
    ESTIMATE,
    NONE,
    caveats,
    drop,
    error,
    fallback,
    interval,
    middle,
    number,
    over_tolerance,
    p50,
    plain,
    score,
)

#: Badges that say more than that something is worth knowing.
_BAD = ("over tolerance",)


@dataclass(frozen=True)
class Badge:
    """A word in a frame. kind: "warn", "bad" or "info". title: what it means."""

    text: str
    kind: str = "warn"
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """Text, what it is sorted by (a number or a text; None comes last), a second line, badges."""

    text: str
    sort: float | str | None = None
    small: str = ""
    badges: tuple[Badge, ...] = ()


@dataclass(frozen=True)
class Column:
    """A heading. unit: "" for none. figure: whether its cells are numbers. title: what it means."""

    name: str
    unit: str = ""
    figure: bool = False
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Columns and rows. searched: of each row what a filter looks at, "" without one."""

    columns: list[Column]
    rows: list[list[Cell]]
    searched: list[str] = field(default_factory=list)
    label: str = ""

    def trimmed(self) -> Table:
        """Without the columns that no row has anything in."""
        kept = [
            i
            for i in range(len(self.columns))
            if any(row[i].text not in ("", NONE) or row[i].badges for row in self.rows)
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table([self.columns[i] for i in kept], rows, self.searched, self.label)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the tables that a browser makes."""
        return {
            "label": self.label,
            "columns": [[c.name, c.unit, c.figure] for c in self.columns],
            "rows": [[[cell.text, cell.sort] for cell in row] for row in self.rows],
        }


def text(value: Any, small: str = "") -> Cell:
    """A cell of a name."""
    shown = plain(value)
    return Cell(shown or NONE, shown or None, small)


def figure(value: float | None, write: Callable[[float | None], str] = number, small: str = "") -> Cell:
    """A cell of a number."""
    return Cell(write(value), value, small)


def badges(record: Record) -> tuple[Badge, ...]:
    """What a reader must know at a glance."""
    kinds = {ESTIMATE: "info"} | dict.fromkeys(_BAD, "bad")
    found = [Badge(short, kinds.get(short, "warn"), full) for short, full in caveats(record)]
    if record.proof.unproven:
        found.append(Badge("unproven", "info", plain(record.proof.unproven)))
    return tuple(found)


def setting(record: Record) -> str:
    """Entry, unit, threads and batch, as far as they are not the plain ones."""
    s = record.settings
    parts = [plain(record.subject.entry)] if record.subject.entry != "main" else []
    parts += [plain(s.unit)] if s.unit else []
    parts += [f"{s.threads} thread{'s' * (s.threads != 1)}"] if s.threads else []
    parts += [f"batch {s.batch}"] if s.batch != 1 else []
    return ", ".join(parts)


def target(record: Record) -> str:
    """The target, and the artifact's kind where it is another."""
    subject = record.subject
    return plain(subject.target if subject.target == subject.backend else f"{subject.target}/{subject.backend}")


SUMMARY = [
    Column("#", figure=True),
    Column("model"),
    Column("target"),
    Column("precision"),
    Column("device"),
    Column("run", title="entry, unit, threads, batch"),
    Column("p50", "ms", True, "median of all runs, with its interval"),
    Column("p90", "ms", True),
    Column("p99", "ms", True),
    Column("load", "ms", True, "from the file to a program that is ready, median of the processes"),
    Column("first", "ms", True, "the first run, median of the processes"),
    Column("peak", "MB", True, "resident memory of the process, and the device's own"),
    Column("size", "MB", True, "the artifact's files"),
    Column("accuracy", "", True, "on held-out samples, and how far from the training form"),
    Column(
        "rel. L2", "", True, "worst of the golden samples against the training form in float32, and what is allowed"
    ),
    Column("fallback", "%", True, "of the time, or of the operations, on another unit than was asked for"),
]


def summary(records: list[Record], names: list[str]) -> Table:
    """A row for each record."""
    rows = [_summary_row(i, record) for i, record in enumerate(records, 1)]
    searched = [
        " ".join([name, target(r), setting(r), r.kind, *(short for short, _ in caveats(r))]).lower()
        for name, r in zip(names, records, strict=True)
    ]
    searched = [
        f"{words} {plain(r.place.device)} {plain(r.subject.model)}".lower()
        for words, r in zip(searched, records, strict=True)
    ]
    return Table(SUMMARY, rows, searched, "records").trimmed()


def _summary_row(index: int, record: Record) -> list[Cell]:
    latency, memory, proof, subject = record.latency, record.memory, record.proof, record.subject
    if latency:
        median = figure(latency.p50, small=interval(record))
    else:
        estimate = p50(record)
        median = Cell(NONE if estimate is None else f"≈ {number(estimate)}", estimate, "estimate" if estimate else "")
    peak = memory.peak_rss_mb
    device_memory = f"+ {number(memory.device_mb)} on it" if memory.device_mb is not None else ""
    metric = proof.metric
    return [
        Cell(str(index), index),
        replace(text(subject.model), badges=badges(record)),
        Cell(target(record), target(record)),
        text(subject.precision),
        text(record.place.device),
        Cell(setting(record), setting(record)),
        median,
        figure(latency.p90 if latency else None),
        figure(latency.p99 if latency else None),
        figure(middle(latency.load_ms) if latency else None),
        figure(middle(latency.first_ms) if latency else None),
        figure(peak, small=device_memory),
        figure(subject.size_mb),
        Cell(score(proof.accuracy, metric), proof.accuracy, drop(proof.accuracy, proof.reference_accuracy, metric)),
        figure(proof.worst_relative_l2, error, f"of {proof.tolerance:g}" if proof.tolerance is not None else ""),
        figure(fallback(record)),
    ]


def _artifacts(records: list[Record]) -> list[Record]:
    """The first record of each artifact: what its export says is the same in all of them."""
    found: dict[tuple[str, str, str], Record] = {}
    for record in records:
        found.setdefault((record.subject.digest, record.subject.bundle, record.subject.backend), record)
    return list(found.values())


def caveat_table(records: list[Record], names: list[str]) -> Table | None:
    """What must be known of each record, in full."""
    rows = []
    for index, (record, name) in enumerate(zip(records, names, strict=True), 1):
        kinds = {badge.text: badge for badge in badges(record)}
        rows += [
            [Cell(str(index), index), text(name), Cell("", short, badges=(kinds[short],)), Cell(full, full)]
            for short, full in caveats(record)
        ]
    columns = [Column("#", figure=True), Column("record"), Column("what"), Column("in full")]
    return Table(columns, rows, label="what to know") if rows else None


def proof_table(records: list[Record], names: list[str]) -> Table | None:
    """What was proven of each record's artifact, and what was not."""
    columns = [
        Column("#", figure=True),
        Column("record"),
        Column("golden", "rel. L2", True, "worst output, against the training form in float32"),
        Column("allowed", "", True),
        Column("on the device", "rel. L2", True, "the golden outputs as this device computed them"),
        Column("score", "", True),
        Column("training form", "", True),
        Column("samples", "", True),
        Column("metric"),
        Column("not proven"),
    ]
    rows = []
    for index, (record, name) in enumerate(zip(records, names, strict=True), 1):
        p = record.proof
        if not (p.unproven or p.worst_relative_l2 is not None or p.accuracy is not None):
            continue
        rows.append(
            [
                Cell(str(index), index),
                text(name),
                figure(p.worst_relative_l2, error),
                figure(p.tolerance, lambda value: NONE if value is None else f"{value:g}"),
                figure(p.device_relative_l2, error),
                Cell(score(p.accuracy, p.metric), p.accuracy),
                Cell(score(p.reference_accuracy, p.metric), p.reference_accuracy),
                figure(p.samples, lambda value: NONE if value is None else f"{value:,.0f}"),
                text(p.metric),
                Cell(_open(record), _open(record)),
            ]
        )
    return Table(columns, rows, label="proofs").trimmed() if rows else None


def _open(record: Record) -> str:
    left = ["the numbers are over the tolerance"] if over_tolerance(record) else []
    left += [plain(record.proof.unproven)] if record.proof.unproven else []
    return "; ".join(left) or "nothing is left open"


def reparam_table(records: list[Record]) -> Table | None:
    """Of each bundle with fused blocks."""
    columns = [
        Column("bundle"),
        Column("fused", "blocks", True),
        Column("not fused", "blocks", True),
        Column("worst block", "rel. L2, float64", True),
        Column("whole model", "rel. L2, float32", True),
        Column("PTQ risk", "blocks", True, "blocks whose range of weights grew: harder to quantize"),
    ]
    rows = []
    for record in _artifacts(records):
        p = record.proof
        if p.fused or p.unfused:
            counts = [Cell(f"{value:,}", value) for value in (p.fused, p.unfused)]
            errors = [figure(p.reparam_error, error), figure(p.reparam_model_error, error)]
            rows.append([text(record.subject.bundle), *counts, *errors, Cell(f"{p.ptq_risk:,}", p.ptq_risk)])
    return Table(columns, rows, label="reparameterization") if rows else None


_SEVERITIES = {"error": "bad", "warning": "warn"}


def lint_table(records: list[Record]) -> Table | None:
    """Findings of all bundles."""
    rows = []
    for record in _artifacts(records):
        for finding in record.proof.lint:
            severity = plain(finding.get("severity", ""))
            badge = (Badge(severity, _SEVERITIES.get(severity, "info")),) if severity else ()
            where = plain(finding.get("where", ""))
            rows.append(
                [
                    text(record.subject.bundle),
                    Cell("", severity, badges=badge),
                    text(finding.get("rule", "")),
                    Cell(where or "(model)", where),
                    text(finding.get("text", "")),
                ]
            )
    columns = [Column("bundle"), Column("severity"), Column("rule"), Column("where"), Column("what")]
    return Table(columns, rows, label="lint findings") if rows else None


def manifest_table(records: list[Record]) -> Table:
    """Where each record is from: bundle, machine, versions."""
    columns = [
        Column("#", figure=True),
        Column("bundle"),
        Column("digest"),
        Column("recipe"),
        Column("exported", "UTC"),
        Column("device"),
        Column("machine"),
        Column("system"),
        Column("runtime"),
        Column("GPU"),
        Column("timed"),
        Column("runs", "", True),
        Column("measured", "UTC"),
        Column("EdgeAttn"),
        Column("commit"),
        Column("made with"),
    ]
    return Table(columns, [_manifest_row(i, r) for i, r in enumerate(records, 1)], label="origin").trimmed()


def _manifest_row(index: int, record: Record) -> list[Cell]:
    place, subject = record.place, record.subject
    cores = f", {place.cores} cores" if place.cores else ""
    tools = ", ".join(f"{plain(k)} {plain(v)}" for k, v in record.proof.versions.items() if v)
    values: Iterable[Any] = (
        subject.bundle,
        subject.digest[:12],
        record.proof.recipe_sha256[:12],
        record.proof.created,
        place.device,
        f"{place.cpu}{cores}" if place.cpu else place.machine,
        f"{place.system}, Python {place.python}" if place.python else place.system,
        place.runtime,
        place.gpu,
        record.settings.timed,
    )
    runs = record.latency.runs if record.latency else None
    cells = [text(value) for value in values]
    cells.append(Cell(NONE if runs is None else f"{runs:,}", runs))
    cells += [text(value) for value in (record.created, record.edgeattn, record.commit, tools)]
    return [Cell(str(index), index), *cells]


def numerics_table(record: Record, most: int = 60) -> Table | None:
    """The outputs of a record's golden samples, the furthest off first."""
    columns = [
        Column("sample"),
        Column("output"),
        Column("rel. L2", "", True),
        Column("SQNR", "dB", True),
        Column("max abs", "", True),
        Column("cosine", "", True),
    ]
    rows = []
    for sample, outputs in record.proof.numerics.items():
        for name, n in outputs.items() if isinstance(outputs, dict) else ():
            if not isinstance(n, dict):
                continue
            l2, sqnr, largest, cosine = (_float(n.get(key)) for key in ("relative_l2", "sqnr_db", "max_abs", "cosine"))
            rows.append(
                [
                    text(sample),
                    text(name),
                    figure(l2, error),
                    Cell("equal" if l2 == 0 and sqnr is None else number(sqnr), sqnr),
                    figure(largest, error),
                    figure(cosine, lambda value: NONE if value is None else f"{value:.8f}"),
                ]
            )
    # A value that is not finite is stored as null: the worst of all.
    rows.sort(key=lambda row: -(row[2].sort if isinstance(row[2].sort, float) else float("inf")))
    return Table(columns, rows[:most], label="numerics") if rows else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
