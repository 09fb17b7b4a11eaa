"""Records in words and numbers: what every kind of report shares."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

from edgeattn.profile.record import Record

#: What an estimate is called wherever one is shown.
ESTIMATE = "uncalibrated estimate"
#: In place of a figure that is not known.
NONE = "–"
#: Control characters, and those that turn the direction of writing: they could show a name as another one.
_HIDDEN = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}
_TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(value: Any) -> str:
    """A name as one line of text: what is not to be seen in it is replaced by U+FFFD, line ends and tabs by a space."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char in "\t\n\r":
        return " "
    return "\ufffd" if char in _TURNING or unicodedata.category(char) in _HIDDEN else char


def number(value: float | None) -> str:
    """Three digits or so, never an exponent above a thousandth."""
    if value is None:
        return NONE
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def error(value: float | None) -> str:
    """A relative error."""
    if value is None:
        return NONE
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.1e}"


def count(number_of: int, name: str, plural: str = "") -> str:
    """A number with its noun: "1 record", "2 records"."""
    return f"{number_of:,} {name if number_of == 1 else plural or name + 's'}"


def lower_is_better(metric: str) -> bool:
    """Of a metric's name: whether a smaller figure is the better one."""
    return any(word in metric.lower() for word in ("perplexity", "loss", "error", "kl"))


def score(value: float | None, metric: str) -> str:
    """An accuracy as percent, another metric's figure as it is."""
    if value is None:
        return NONE
    if not lower_is_better(metric) and 0 <= value <= 1:
        return f"{value:.2%}"
    return f"{value:.4g}"


def drop(value: float | None, reference: float | None, metric: str) -> str:
    """How far a score is from its reference, signed: in points of percent for an accuracy."""
    if value is None or reference is None:
        return ""
    if not lower_is_better(metric) and 0 <= value <= 1 and 0 <= reference <= 1:
        return f"{(value - reference) * 100:+.2f} points"
    return f"{value - reference:+.3g}"


def interval(record: Record) -> str:
    """Of the median, in ms."""
    latency = record.latency
    return "" if latency is None else f"{number(latency.low)} to {number(latency.high)}"


def middle(values: Iterable[float]) -> float | None:
    """The median, None of nothing."""
    found = sorted(values)
    if not found:
        return None
    half = len(found) // 2
    return found[half] if len(found) % 2 else (found[half - 1] + found[half]) / 2


def p50(record: Record) -> float | None:
    """Measured, in ms; an estimate of an estimated record."""
    return record.latency.p50 if record.latency else record.breakdown.estimate_ms


def over_tolerance(record: Record) -> bool:
    """Whether its numbers, on the golden samples or on the device, are further off than was allowed."""
    proof = record.proof
    found = [value for value in (proof.worst_relative_l2, proof.device_relative_l2) if value is not None]
    return proof.tolerance is not None and any(value > proof.tolerance for value in found)


def fallback(record: Record) -> float | None:
    """Percent of time, or of operations where the time is not known, that other units than the wanted one take."""
    units = record.breakdown.fallback
    if not units:
        return 0.0 if record.breakdown.wanted else None
    timed = [unit["time"] for unit in units.values() if "time" in unit]
    return sum(timed) if timed else sum(unit.get("ops", 0.0) for unit in units.values())


def merge(groups: Iterable[Iterable[Record]]) -> list[Record]:
    """All records in the order of their files, each id once."""
    found = {record.id: record for group in groups for record in group}
    return list(found.values())


def names(records: list[Record]) -> list[str]:
    """A name for each that no other has: label, the device where there are several, then when it was made."""
    several = len({record.place.device for record in records}) > 1
    found = [plain(r.label) + (f" on {plain(r.place.device)}" if several else "") for r in records]
    many = Counter(found)
    dated = [f"{name}, {plain(r.created)}" if many[name] > 1 else name for name, r in zip(found, records, strict=True)]
    many = Counter(dated)
    return [f"{name}, {r.id[:8]}" if many[name] > 1 else name for name, r in zip(dated, records, strict=True)]


def caveats(record: Record) -> list[tuple[str, str]]:
    """Pairs (short, in full) of what a reader must know before trusting it."""
    found = []
    if record.kind == "estimated":
        found.append((ESTIMATE, "computed from the device file's peaks: nothing ran, and nothing calibrated it"))
    if record.partial:
        found.append(("partial", plain(record.partial)))
    if record.subject.weights == "random":
        found.append(("random weights", "the weights are random: accuracy and numerics of a trained model differ"))
    if over_tolerance(record):
        found.append(("over tolerance", "its numbers are further from the training form than was allowed"))
    for flag in map(plain, record.flags):
        head = flag.partition(":")[0].strip()
        found.append((head if 0 < len(head) <= 28 else f"{flag[:27]}…" if len(flag) > 28 else flag, flag))
    return found
