"""The latency gate: whether a bundle is slower than another, from times whose blocks took turns on one machine.

Every round has three fresh processes: the base, the base again, and the head. Base against base is the self-check: what
differs there is the machine's doing. It is looked at first, but measured in the same minutes, for an earlier session
would tell of an earlier machine and take as long. It costs the verdict nothing: the head is held against the mean of
the two bases, and the difference of two values tells nothing of how far a third is from their mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.profile import run
from edgeattn.profile.build import costs, subject_of
from edgeattn.profile.measure import CHANGED, UNPACED, Effort, Job
from edgeattn.profile.record import Record, Subject
from edgeattn.profile.statistics import Blocks, Ratio, over_rounds, paired_logs, paired_ratio
from edgeattn.profile.transports.base import Say, silent

MARGIN = 0.05
#: Rounds before intervals are looked at. Of ten processes the interval is between the smallest and the largest ratio.
LEAST = 10
#: Half the width of an interval that is narrow enough, as a share of the margin; nothing is measured beyond it.
NARROW = 0.5

_REGRESSED = "edgeattn profile BASE HEAD shows which operations take longer; or take HEAD as the new base"

Word = Literal["pass", "regress", "inconclusive", "refused"]


@dataclass(frozen=True)
class Proxy:
    """A figure of both that does not depend on the minute, or hardly. None where it is not known, and ``why``."""

    unit: str
    base: float | None
    head: float | None
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """The head's over the base's."""
        return self.head / self.base if self.base and self.head is not None else None


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        verdict: "pass": slower by no more than the margin, with certainty. "regress": slower by more, with certainty.
            "inconclusive": neither is certain here. "refused": the times are not comparable; never a pass.
        ratio: the head's time over the base's. self_check: the base's over the base's. None where not measured.
        margin: 0.05 is five percent. why, fix: of the verdict, and what to do about it, "" where nothing is.
        base, again, head: records, None where nothing was measured.
        proxies: by name: "MACs", "bytes moved", "operations", "size", "instructions". notes: what a reader must know.
    """

    verdict: Word
    margin: float
    why: str
    fix: str = ""
    ratio: Ratio | None = None
    self_check: Ratio | None = None
    base: Record | None = None
    again: Record | None = None
    head: Record | None = None
    proxies: Mapping[str, Proxy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> list[Record]:
        """Those that there are: base, base again, head."""
        return [record for record in (self.base, self.again, self.head) if record is not None]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; of records what tells them from others, and their medians in ms."""

        def ratio(of: Ratio | None) -> dict[str, Any] | None:
            names = ("value", "low", "high", "confidence", "rounds")
            return None if of is None else {name: getattr(of, name) for name in names}

        def record(of: Record | None) -> dict[str, Any] | None:
            if of is None or of.latency is None:
                return None
            about = {"label": of.label, "digest": of.subject.digest, "record": of.id, "p50_ms": of.latency.p50}
            return {**about, "session": of.settings.session, "fingerprint": of.place.fingerprint}

        return {
            "verdict": self.verdict,
            "margin": self.margin,
            "why": self.why,
            "fix": self.fix,
            "ratio": ratio(self.ratio),
            "self_check": ratio(self.self_check),
            **{name: record(getattr(self, name)) for name in ("base", "again", "head")},
            "proxies": {
                name: {"unit": p.unit, "base": p.base, "head": p.head, "ratio": p.ratio, "why": p.why}
                for name, p in self.proxies.items()
            },
            "notes": list(self.notes),
        }


def enough(blocks: Sequence[Blocks], margin: float = MARGIN) -> bool:
    """Whether no further round is needed: both intervals are narrow. Where they lie is not looked at.

    Args:
        blocks: of the base, of the base again, and of the head; of fewer where one could not go on.
    """
    if len(blocks) < 3:
        return True  # there will be no verdict
    base, again, head = blocks
    return settled(paired_logs(base, head, again), paired_logs(base, again), margin)


def settled(ratios: Sequence[float], checks: Sequence[float], margin: float) -> bool:
    """As ``enough``, from what ``paired_logs`` makes of the blocks."""
    if min(len(ratios), len(checks)) < LEAST:
        return False
    found = map(over_rounds, (ratios, checks))
    return all(ratio.high / ratio.low <= (1 + NARROW * margin) ** 2 for ratio in found)


def judge(base: Blocks, head: Blocks, again: Blocks | None = None, margin: float = MARGIN) -> Verdict:
    """The verdict on times in ms, whose blocks took turns. Nothing but arithmetic.

    Args:
        again: the base in further processes, for the self-check; without it there is none.

    Raises:
        UsageError: the margin is not above 0.
    """
    _check(margin)
    fix = "measure again on a machine that is less busy; or more --rounds, or a larger --margin"
    try:
        ratio = paired_ratio(base, head, again=again)
        check = None if again is None else paired_ratio(base, again)
    except ValueError as error:
        return Verdict("inconclusive", margin, str(error), "more --rounds")
    made = Verdict("pass", margin, "", ratio=ratio, self_check=check)
    if check is None:
        made = replace(made, notes=("there is no self-check: the base was not measured against itself",))
    elif doubt := _doubt(check, margin):
        # What the machine does to equal programs, at the worst, is added to the margin. A pass is out of reach.
        worst = max(check.high, 1 / check.low)
        if not ratio.low > (1 + margin) * worst:
            return replace(made, verdict="inconclusive", why=f"the self-check does not hold: {doubt}", fix=fix)
        why = f"the self-check does not hold: {doubt}; yet the head is slower by more than that and the margin together"
        return replace(made, verdict="regress", why=why, fix=_REGRESSED)
    found = ratio.verdict(margin)
    limit = f"the margin of {margin:.1%}"
    if found == "inconclusive":
        why = f"slower by more than {limit} or not: the interval, {_reach(ratio)}, has both"
        return replace(made, verdict=found, why=why, fix=fix)
    slower, fix = ("slower by more", _REGRESSED) if found == "regress" else ("slower by no more", "")
    why = f"{slower} than {limit}, at {ratio.confidence:.0%} confidence"
    return replace(made, verdict=found, why=why, fix=fix)


def _check(margin: float) -> None:
    if not 0 < margin < math.inf:
        raise UsageError("this is no margin", value=margin, why="it must be above 0", fix="0.05 is five percent")


def _doubt(check: Ratio, margin: float) -> str:
    """Why a machine cannot tell, from what it makes of equal programs; "" where it can."""
    if check.low > 1 + margin or check.high < 1 / (1 + margin):
        return f"the base differs from itself by more than the margin, {_reach(check)}"
    if not check.high / check.low <= (1 + margin) ** 2:
        return f"the base against itself is no more certain than {_reach(check)}"
    return ""


def _reach(ratio: Ratio) -> str:
    return f"{ratio.low:.3f}x to {ratio.high:.3f}x"


def judge_records(base: Record, head: Record, again: Record | None = None, margin: float = MARGIN) -> Verdict:
    """``judge`` for records; refused where their times cannot be compared.

    Raises:
        UsageError: a record without a latency, or as ``judge``.
    """
    records = {"base": base, "base again": again, "head": head} if again else {"base": base, "head": head}
    for record in records.values():
        if record.latency is None:
            why = "it is an estimate: nothing was measured"
            raise UsageError("the record has no latency", value=record.label, why=why, fix="edgeattn profile BASE HEAD")
    proxies = _proxies(_figures_of(base), _figures_of(head))
    if reasons := _incomparable(records):
        fix = "measure both anew, together: edgeattn gate BASE HEAD"
        return Verdict("refused", margin, "; ".join(reasons), fix, None, None, base, again, head, proxies)
    made = judge(_blocks(base), _blocks(head), None if again is None else _blocks(again), margin)
    flags = [f"{name}: {flag}" for name, record in records.items() for flag in record.flags]
    return replace(made, base=base, again=again, head=head, proxies=proxies, notes=(*made.notes, *flags))


def _blocks(record: Record) -> Blocks:
    return record.latency.blocks if record.latency is not None else ()


def _incomparable(named: Mapping[str, Record]) -> list[str]:
    """Why the times of records cannot be compared, the base's in front; none where they can."""
    found, records = [], list(named.values())
    first, places = records[0], [record.place for record in records]
    if len({place.fingerprint for place in places}) > 1 or not first.place.fingerprint:
        seen = dict.fromkeys(
            ", ".join(filter(None, (p.device, p.cpu or p.machine, f"{p.cores or '?'} cores", p.gpu, p.system)))
            for p in places
        )
        where = " / ".join(seen) if len(seen) > 1 else f"{first.place.device}, by their fingerprints"
        found.append(f"they are of different machines: {where}")
    if len({record.settings.session for record in records}) > 1 or not first.settings.session:
        found.append("they are of separate sessions: their blocks did not take turns")
    for name in ("unit", "threads", "batch"):
        values = [str(getattr(record.settings, name)) for record in records]
        if len(set(values)) > 1:
            found.append(f"they differ in {name}: {' / '.join(dict.fromkeys(values))}")
    for name, record in named.items():
        if record.partial:
            found.append(f"{name}: it is partial: {record.partial.splitlines()[0]}")
        found += [f"{name}: {flag}" for flag in record.flags if flag.startswith(("throttled", CHANGED))]
    return found


def gate(
    base: Path,
    head: Path,
    device: str = "local",
    *,
    margin: float = MARGIN,
    backend: str | None = None,
    entry: str | None = None,
    threads: int | None = 1,
    rounds: int | None = None,
    always: bool = False,
    say: Say = silent,
) -> Verdict:
    """Measure two bundles now, in turns, and say whether the head is slower than the base.

    Args:
        base, head: folders of bundles. device: its name or address.
        backend: which artifact; None for the one in front. entry: which graph; None for main, or the first.
        threads: one by default: with several a neighbour on any core delays all. None for the runner's choice.
        rounds: of three processes each; None for as many as it takes until the intervals suit the margin, 40 at most.
        always: measure also where both have the same bytes.

    Raises:
        UsageError: no bundle there, an unknown backend or entry, or as ``judge``. CheckFailed: the numbers of one do
            not hold on the device. ToolchainMissing, DeviceUnreachable, KeyboardInterrupt: it could not be measured.
    """
    _check(margin)
    try:
        bundles = [Bundle.open(base), Bundle.open(head)]
        for bundle in bundles:
            bundle.check_files()
    except CheckFailed as error:
        details = "; ".join(error.details[:3])
        why = f"{error.where}: {error.what}: {details or error.why}"
        return Verdict("refused", margin, why, error.fix or "")
    jobs = [_job(bundle, backend, entry, threads) for bundle in bundles]
    figures = [_figures(bundle, job) for bundle, job in zip(bundles, jobs, strict=True)]
    proxies = _proxies(*figures)
    if jobs[0].entry == jobs[1].entry and not always and _same(bundles, jobs):
        return Verdict("pass", margin, "same bytes: artifact, runner and inputs are equal", proxies=proxies)
    if unpaced := next((job.backend for job in jobs if job.backend in UNPACED), None):
        why = f"runs of {unpaced} measure whole processes, whose blocks cannot take turns"
        return Verdict("refused", margin, why, "edgeattn compare shows two records", proxies=proxies)
    effort = Effort(rounds, operations=False, instructions=True, enough=lambda blocks: enough(blocks, margin))
    outcome = run.measure([jobs[0], jobs[0], jobs[1]], device, effort, say)
    if outcome.stopped is not None:
        raise outcome.stopped
    if outcome.failed:
        raise outcome.failed[0][1]
    first, again, second = outcome.records
    made = judge_records(first, second, again, margin)
    told = _instructions(*(outcome.counts.get(record.id, ([], "")) for record in (first, again, second)))
    return replace(made, proxies={**made.proxies, "instructions": told})


def _job(bundle: Bundle, backend: str | None, entry: str | None, threads: int | None) -> Job:
    wanted = run.Wanted(backend or bundle.manifest.backend, entry, (threads,) if threads else ())
    return run.jobs_of([bundle], wanted)[0]


def _same(bundles: Sequence[Bundle], jobs: Sequence[Job]) -> bool:
    """Whether nothing that can show in a time differs: files but for words and scores, and how the runner takes them.

    Args:
        bundles: whose files were found to be what their manifests say.
    """
    parts = []
    for bundle, job in zip(bundles, jobs, strict=True):
        manifest = bundle.manifest
        info = next(info for info in manifest.artifacts if info.backend == job.backend)
        files = {n: f.sha256 for n, f in manifest.files.items() if n not in ("README.md", "heldout.npz")}
        taken = {name: entry.model_dump(mode="json") for name, entry in info.entries.items()}
        parts.append((files, taken, job.backend, manifest.precision, manifest.decoder))
    return parts[0] == parts[1]


def _figures(bundle: Bundle, job: Job) -> dict[str, float | None]:
    """MACs, bytes, operations and size of an artifact's entry."""
    table = costs(bundle, job.backend, job.entry)
    subject = subject_of(bundle, job, sum(op.macs for op in table) or None)
    return _figured(subject, sum(op.bytes for op in table) if table else None, len(table) or None)


def _figures_of(record: Record) -> dict[str, float | None]:
    """As ``_figures``, of a record; operations that a runtime made of several do not tell."""
    operations = record.breakdown.operations if not record.breakdown.source else ()
    moved = [op.bytes for op in operations if op.bytes is not None]
    return _figured(record.subject, sum(moved) if moved else None, len(operations) or None)


def _figured(subject: Subject, moved: float | None, operations: int | None) -> dict[str, float | None]:
    return {"MACs": subject.macs, "bytes moved": moved, "operations": operations, "size": subject.size_mb}


def _proxies(base: Mapping[str, float | None], head: Mapping[str, float | None]) -> dict[str, Proxy]:
    def proxy(name: str) -> Proxy:
        known = base[name] is not None and head[name] is not None
        why = "" if known else "its target shows no operations, or the record has measured ones"
        return Proxy("MB" if name == "size" else "", base[name], head[name], why)

    return {name: proxy(name) for name in base}


def _instructions(*counts: tuple[list[list[int | None]], str]) -> Proxy:
    """Medians over the runs of the base, the base again, and the head."""
    runs = [[count for process in of for count in process if count is not None] for of, _ in counts]
    why = next((why for _, why in counts if why), "")
    base, head = [*runs[0], *runs[1]], runs[2]
    if not why and not (base and head):
        why = "others wanted the counter at the same time" if any(of for of, _ in counts) else "nothing was counted"
    if why:
        return Proxy("", None, None, f"no counter here: {why}")
    middles = [statistics.median(of) for of in (runs[0] or base, runs[1] or base)]
    spread = math.exp(abs(math.log(middles[1] / middles[0]))) - 1 if all(middles) else math.inf
    words = f"median over {len(base)} and {len(head)} runs; the base differs from itself by {spread:.2%}"
    return Proxy("", statistics.median(base), statistics.median(head), words)
