"""Two sets of records against each other: which belong together, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeattn.core.errors import UsageError
from edgeattn.profile.record import Latency, Record
from edgeattn.report.records.words import (
    NONE,
    caveats,
    drop,
    error,
    fallback,
    lower_is_better,
    middle,
    number,
    p50,
    plain,
    score,
)

if TYPE_CHECKING:
    from edgeattn.profile.statistics import Ratio

#: What a ratio of two records is worth.
DRIFT = (
    "Records of separate sessions carry what the machine did differently in between: the interval does not cover that. "
    "A ratio from interleaved runs comes from `edgeattn profile A B`."
)
ESTIMATES = "the ratio is of two uncalibrated estimates"

Key = Callable[[Record], tuple[Any, ...]]


@dataclass(frozen=True)
class Line:
    """A figure of both. change: in words. a, b: as numbers; a_text, b_text: as they are shown."""

    name: str
    unit: str
    a: float | None
    b: float | None
    a_text: str
    b_text: str
    change: str


@dataclass(frozen=True)
class Change:
    """Time of a module's operations in both, in ms; None where one has no such module."""

    module: str
    a: float | None
    b: float | None

    @property
    def change(self) -> float:
        """B minus A in ms."""
        return (self.b or 0.0) - (self.a or 0.0)


@dataclass(frozen=True)
class Pair:
    """Two records of the same thing.

    Attributes:
        ratio: B's p50 over A's with its interval; None where one of them was not measured.
        differs: triples (what, of A, of B) of the places that they are from. across: whether these make times
            incomparable, and it was asked for all the same.
        changes: by module, the largest first. basis: what these are of. notes: what a reader must know.
    """

    a: Record
    b: Record
    ratio: Ratio | None
    differs: list[tuple[str, str, str]]
    across: bool
    changes: list[Change]
    basis: str
    notes: list[str]

    @property
    def label(self) -> str:
        """What both are, or A's and B's names."""
        one, other = (f"{plain(r.label)} on {plain(r.place.device)}" for r in (self.a, self.b))
        return one if one == other else f"{one} → {other}"

    @property
    def together(self) -> bool:
        """Whether their blocks took turns, so that the machine's drift is in both alike."""
        return bool(self.a.settings.session) and self.a.settings.session == self.b.settings.session

    @property
    def p50_ratio(self) -> float | None:
        """B over A, also of two estimates."""
        if self.ratio:
            return self.ratio.value
        one, other = p50(self.a), p50(self.b)
        return other / one if self.a.kind == self.b.kind == "estimated" and one and other is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        ratio = self.ratio
        interval = {"low": ratio.low, "high": ratio.high, "confidence": ratio.confidence} if ratio else {}
        return {
            "label": self.label,
            "a": self.a.id,
            "b": self.b.id,
            "ratio": {"p50": self.p50_ratio, **interval},
            "interleaved": self.together,
            "figures": [{"name": x.name, "unit": x.unit, "a": x.a, "b": x.b} for x in lines(self)],
            "differs": [{"what": what, "a": a, "b": b} for what, a, b in self.differs],
            "across": self.across,
            "notes": self.notes,
            "operations": {
                "basis": self.basis,
                "changes": [{"module": x.module, "a": x.a, "b": x.b, "change": x.change} for x in self.changes],
            },
        }


@dataclass(frozen=True)
class Comparison:
    """All pairs, and what found no other. older: records that a newer one of the same file stands for."""

    pairs: list[Pair]
    only_a: list[Record] = field(default_factory=list)
    only_b: list[Record] = field(default_factory=list)
    older: int = 0

    @property
    def drift(self) -> str:
        """What the ratios are worth where some are of records that were measured apart; else ""."""
        return "" if all(pair.together for pair in self.pairs) else DRIFT

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "pairs": [pair.as_dict() for pair in self.pairs],
            "only_a": [record.id for record in self.only_a],
            "only_b": [record.id for record in self.only_b],
            "older": self.older,
            "drift": self.drift,
        }


def _key(record: Record) -> tuple[Any, ...]:
    subject, settings = record.subject, record.settings
    where = (record.place.device, subject.entry, settings.unit, settings.threads, settings.batch)
    return (subject.model, subject.target, subject.backend, subject.precision, *where)


def _with_bundle(record: Record) -> tuple[Any, ...]:
    return (record.subject.bundle, *_key(record))


def _anywhere(record: Record) -> tuple[Any, ...]:
    subject, settings = record.subject, record.settings
    return (subject.model, subject.target, subject.backend, subject.precision, subject.entry, settings.batch)


def compare(a: Iterable[Record], b: Iterable[Record], across: bool = False) -> Comparison:
    """Pairs of the same model, target, precision, device, entry, unit, threads and batch; single records in any case.

    Args:
        across: compare records of different places, too.

    Raises:
        UsageError: nothing belongs together, or records are of different places.
    """
    ours, older = _newest(a)
    theirs, more = _newest(b)
    pairs: list[tuple[Record, Record]] = []
    rest_a, rest_b = ours, theirs
    keys: list[Key] = [_with_bundle, _key, *([_anywhere] if across else [])]
    for key in keys:
        found = _match(rest_a, rest_b, key)
        pairs += found
        rest_a = [record for record in rest_a if all(record is not one for one, _ in found)]
        rest_b = [record for record in rest_b if all(record is not other for _, other in found)]
    if not pairs and len(ours) == len(theirs) == 1:
        pairs, rest_a, rest_b = [(ours[0], theirs[0])], [], []
    if not pairs:
        raise UsageError(
            "no record of A has its like in B",
            why="none agree in model, target, precision, device, entry, unit, threads and batch",
            fix="pass one record in each file to compare those two; --across pairs records of different devices",
            details=[f"{side}: {plain(r.label)} on {plain(r.place.device)}" for side, r in _sides(ours, theirs)],
        )
    return Comparison([_pair(one, other, across) for one, other in pairs], rest_a, rest_b, older + more)


def _sides(ours: list[Record], theirs: list[Record]) -> list[tuple[str, Record]]:
    return [*(("A", record) for record in ours), *(("B", record) for record in theirs)]


def _newest(records: Iterable[Record]) -> tuple[list[Record], int]:
    """Of records of the same thing the newest alone, and how many were left out."""
    given = list({record.id: record for record in records}.values())
    found: dict[tuple[Any, ...], Record] = {}
    for record in sorted(given, key=lambda record: record.created):
        found[_with_bundle(record)] = record
    kept = {id(record) for record in found.values()}
    return [record for record in given if id(record) in kept], len(given) - len(kept)


def _match(ours: list[Record], theirs: list[Record], key: Key) -> list[tuple[Record, Record]]:
    """Those that are the only ones of their key on both sides."""

    def alone(records: list[Record]) -> dict[tuple[Any, ...], Record]:
        keys = [key(record) for record in records]
        return {k: record for k, record in zip(keys, records, strict=True) if keys.count(k) == 1}

    others = alone(theirs)
    return [(record, others[k]) for k, record in alone(ours).items() if k in others]


def place_differs(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """Triples (what, of A, of B) of what is not the same of the places."""
    fields = ("device", "machine", "cpu", "cores", "gpu", "system", "runtime", "python")
    found = [(name, getattr(a.place, name), getattr(b.place, name)) for name in fields]
    found.append(("unit", a.settings.unit, b.settings.unit))
    return [(name, plain(x or NONE), plain(y or NONE)) for name, x, y in found if x != y]


def _pair(a: Record, b: Record, across: bool) -> Pair:
    differs = place_differs(a, b)
    foreign = a.place.fingerprint != b.place.fingerprint
    if foreign and not across:
        raise UsageError(
            "the records are of different places",
            value=f"{plain(a.label)} and {plain(b.label)}",
            why="; ".join(f"{what}: {x} and {y}" for what, x, y in differs) or "their fingerprints differ",
            fix="--across compares them all the same, and says so",
        )
    notes = [f"different places ({', '.join(what for what, *_ in differs) or 'fingerprint'})"] if foreign else []
    for side, record in (("A", a), ("B", b)):
        notes += [f"{side}: {full if short in full else f'{short}: {full}'}" for short, full in caveats(record)]
    if a.kind != b.kind:
        notes.append("one is measured and the other is estimated: they have no ratio")
    elif a.kind == "estimated":
        notes.append(ESTIMATES)
    changes, basis = _changes(a, b)
    return Pair(a, b, _ratio(a, b), differs, foreign, changes, basis, notes)


def _ratio(a: Record, b: Record) -> Ratio | None:
    if a.latency is None or b.latency is None:
        return None
    try:
        if a.settings.session and a.settings.session == b.settings.session:
            return paired(a.latency, b.latency)
        return ratio(a.latency, b.latency)
    except (ValueError, ZeroDivisionError):  # too few runs were kept, or a clock too coarse for them
        return None


def ratio(a: Latency, b: Latency) -> Ratio:
    """B's p50 over A's, of records that were measured apart."""
    from edgeattn.profile.statistics import ratio_of

    return ratio_of(a.blocks, b.blocks)


def paired(a: Latency, b: Latency) -> Ratio:
    """B's times over A's, of records whose blocks took turns."""
    from edgeattn.profile.statistics import paired_ratio

    return paired_ratio(a.blocks, b.blocks)


def _changes(a: Record, b: Record) -> tuple[list[Change], str]:
    for attribute, basis in (("ms", "ms under the profiler"), ("estimate_ms", "ms, uncalibrated estimate")):
        ours, theirs = (_by_module(record, attribute) for record in (a, b))
        if ours and theirs:
            found = [Change(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]
            return sorted(found, key=lambda one: -abs(one.change)), basis
    return [], ""


def _by_module(record: Record, attribute: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for op in record.breakdown.operations:
        value = getattr(op, attribute)
        if value is not None:
            name = plain(op.module or op.name or "(unknown)")
            sums[name] = sums.get(name, 0.0) + value
    return sums


def times(value: float | None) -> str:
    """A ratio as "0.93x"."""
    return "" if value is None else f"{value:.3f}x" if value < 10 else f"{value:,.1f}x"


def _of_latency(pick: Callable[[Latency], float | None]) -> Callable[[Record], float | None]:
    return lambda record: pick(record.latency) if record.latency else None


def lines(pair: Pair) -> list[Line]:
    """Every figure that one of both has."""
    a, b = pair.a, pair.b
    made = [_scaled("p50", "ms", p50(a), p50(b), _interval(pair))]
    scaled: list[tuple[str, str, Callable[[Record], float | None]]] = [
        ("p90", "ms", _of_latency(lambda latency: latency.p90)),
        ("p99", "ms", _of_latency(lambda latency: latency.p99)),
        ("load", "ms", _of_latency(lambda latency: middle(latency.load_ms))),
        ("first run", "ms", _of_latency(lambda latency: middle(latency.first_ms))),
        ("peak, process", "MB", lambda record: record.memory.peak_rss_mb),
        ("peak, device", "MB", lambda record: record.memory.device_mb),
        ("size", "MB", lambda record: record.subject.size_mb),
    ]
    made += [_scaled(name, unit, read(a), read(b)) for name, unit, read in scaled]
    metric = b.proof.metric or a.proof.metric
    one, other = a.proof.accuracy, b.proof.accuracy
    label = plain(metric) or "accuracy"
    label += ", less is better" if metric and lower_is_better(metric) else ""
    made.append(Line(label, "", one, other, score(one, metric), score(other, metric), drop(other, one, metric)))
    for name, l2_a, l2_b in (
        ("rel. L2, golden", a.proof.worst_relative_l2, b.proof.worst_relative_l2),
        ("rel. L2, on the device", a.proof.device_relative_l2, b.proof.device_relative_l2),
        ("tolerance", a.proof.tolerance, b.proof.tolerance),
    ):
        change = times(l2_b / l2_a) if l2_a and l2_b is not None else ""
        made.append(Line(name, "", l2_a, l2_b, error(l2_a), error(l2_b), change))
    made.append(_apart("fallback", "%", fallback(a), fallback(b)))
    return [line for line in made if line.a is not None or line.b is not None]


def _interval(pair: Pair) -> str | None:
    if pair.ratio:
        return f"{times(pair.ratio.value)}, {times(pair.ratio.low)} to {times(pair.ratio.high)}"
    return times(pair.p50_ratio) if pair.p50_ratio is not None else ""


def _scaled(name: str, unit: str, a: float | None, b: float | None, change: str | None = None) -> Line:
    if change is None:
        change = times(b / a) if a and b is not None else ""
    return Line(name, unit, a, b, number(a), number(b), change)


def _apart(name: str, unit: str, a: float | None, b: float | None) -> Line:
    change = f"{b - a:+.3g} points" if a is not None and b is not None else ""
    return Line(name, unit, a, b, number(a), number(b), change)
