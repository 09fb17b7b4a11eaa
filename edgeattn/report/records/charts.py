"""What the charts of a report are drawn from: plain data, which the page's script turns into pictures."""

from __future__ import annotations

from typing import Any

from edgeattn.profile.record import Latency, Operation, Record
from edgeattn.report.records.tables import numerics_table
from edgeattn.report.records.words import (
    ESTIMATE,
    count,
    error,
    fallback,
    lower_is_better,
    middle,
    number,
    p50,
    plain,
    score,
)

#: Latencies of a record that a distribution is drawn from, at even ranks of all that it holds.
KEPT = 300
#: Runs of a process that are drawn in the order of time.
RUNS = 400
#: Modules of a record whose quantization error is drawn, the worst ones.
MODULES = 60


def evenly(values: list[float], most: int) -> list[float]:
    """At most so many of ``values``, at even places, the first and the last among them."""
    if len(values) <= most:
        return values
    step = (len(values) - 1) / (most - 1)
    return [values[round(i * step)] for i in range(most)]


def short(value: float | None) -> float | None:
    """Five digits, for a smaller page."""
    return None if value is None else float(f"{value:.5g}")


def pooled(latency: Latency) -> list[float]:
    """All latencies that the record holds, in ms, ascending."""
    return sorted(run for process in latency.blocks for block in process for run in block)


def group(record: Record) -> str:
    """The curve of a chart that a record belongs to: device, entry, and whether it is an estimate."""
    parts = [plain(record.place.device)]
    parts += [plain(record.subject.entry)] if record.subject.entry != "main" else []
    parts += [ESTIMATE] if record.kind == "estimated" else []
    return ", ".join(parts)


def series_of(record: Record) -> str:
    """The curve over time that a record belongs to: what was measured, how and where, whatever the version."""
    parts = [
        plain(record.subject.bundle),
        *([plain(record.subject.backend)] * (record.subject.backend != record.subject.target)),
    ]
    settings = record.settings
    how = f"{settings.unit}, {count(settings.threads, 'thread')}" if settings.threads else settings.unit
    return ", ".join([*parts, plain(record.subject.entry), how, f"batch {settings.batch}", plain(record.place.device)])


def over_time(records: list[Record]) -> bool:
    """Whether something was measured more than once, so that a curve over time says something."""
    found = [series_of(record) for record in records if record.latency]
    return len(set(found)) < len(found)


def overview(record: Record, name: str, searched: str = "") -> dict[str, Any]:
    """One record's part in the charts of all records."""
    latency, proof, subject = record.latency, record.proof, record.subject
    values = evenly(pooled(latency), KEPT) if latency else []
    return {
        "name": name,
        "short": f"{plain(subject.model)} {plain(subject.precision)}",
        "group": group(record),
        "series": series_of(record),
        "created": record.created,
        "commit": plain(record.commit[:10]),
        "version": plain(record.edgeattn),
        "estimated": record.kind == "estimated",
        "searched": searched,
        "p50": short(p50(record)),
        "low": short(latency.low) if latency else None,
        "high": short(latency.high) if latency else None,
        "size": short(subject.size_mb),
        "accuracy": short(proof.accuracy),
        "score": score(proof.accuracy, proof.metric),
        "metric": plain(proof.metric) or "accuracy",
        "values": [short(value) for value in values],
        "peak": short(record.memory.peak_rss_mb),
        "device_mb": short(record.memory.device_mb),
        "load": short(middle(latency.load_ms)) if latency else None,
        "load_first": short(latency.load_first_ms) if latency else None,
        "first": short(middle(latency.first_ms)) if latency else None,
        "wanted": plain(record.breakdown.wanted),
        "fallback": {plain(unit): shares for unit, shares in record.breakdown.fallback.items()},
        "fallback_percent": short(fallback(record)),
    }


def detail(record: Record, name: str) -> dict[str, Any]:
    """What is shown of one record alone."""
    breakdown = record.breakdown
    numerics = numerics_table(record)
    roof = breakdown.roofline
    return {
        "name": name,
        "bundle": plain(record.subject.bundle),
        "operations": {"fields": _FIELDS, "rows": [_operation(op) for op in breakdown.operations]},
        "operations_words": _operations_words(record),
        "roofline": {"gflops": roof.tflops * 1e3, "gb_s": roof.gb_s, "source": plain(roof.source)} if roof else None,
        "quantized": _quantized(record),
        "states": [
            [state.second, state.temperature_c, state.clock_mhz, state.clock_max_mhz, state.power_w, state.when]
            for state in record.states
        ],
        "runs": [
            [short(run) for run in evenly([run for block in process for run in block], RUNS)]
            for process in (record.latency.blocks if record.latency else ())
        ],
        "numerics": numerics.as_dict() if numerics else None,
    }


#: Of an operation, in the order of ``_operation``.
_FIELDS = ("name", "module", "op", "unit", "ms", "share", "macs", "bytes", "estimate", "bound")


def _operation(op: Operation) -> tuple[Any, ...]:
    figures = (short(op.ms), short(op.share), op.macs, op.bytes, short(op.estimate_ms))
    return (*map(plain, (op.name, op.module, op.op, op.unit)), *figures, op.bound)


def _operations_words(record: Record) -> str:
    breakdown = record.breakdown
    if not breakdown.operations:
        return ""
    words = [f"{len(breakdown.operations):,} operations"]
    words += [f"times from {plain(breakdown.source)}, which slows what it measures"] if breakdown.source else []
    if breakdown.overhead is not None:
        words.append(f"together {breakdown.overhead:.2f} times the median latency")
    if breakdown.estimate_ms is not None:
        words.append(f"{ESTIMATE} of all: {number(breakdown.estimate_ms)} ms")
    return "; ".join(words) + "."


def _quantized(record: Record) -> list[dict[str, Any]]:
    found: list[tuple[float, dict[str, Any]]] = []
    for item in record.proof.quantized:
        value = item.get("error")
        if isinstance(value, int | float):
            bits = plain(item.get("bits", ""))
            name = plain(item.get("module", ""))
            found.append((value, {"module": name, "bits": bits, "error": value, "text": error(value)}))
    return [item for _, item in sorted(found, key=lambda pair: -pair[0])[:MODULES]]


def metrics(records: list[Record]) -> list[tuple[str, bool]]:
    """Pairs (metric, whether less is better) that can be set against latency."""
    found = {
        plain(r.proof.metric) or "accuracy": lower_is_better(r.proof.metric)
        for r in records
        if r.proof.accuracy is not None and p50(r) is not None
    }
    return list(found.items())
