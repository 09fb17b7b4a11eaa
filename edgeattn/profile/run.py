"""From bundles to records: what is to be measured or estimated, and what comes of it."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.core.errors import EdgeAttnError, UsageError, unknown
from edgeattn.core.interrupt import interruptible
from edgeattn.device import Device
from edgeattn.profile.build import Builder
from edgeattn.profile.measure import Effort, Job, Session
from edgeattn.profile.record import Record
from edgeattn.profile.roofline import Roof, roof_of
from edgeattn.profile.statistics import Ratio, paired_ratio
from edgeattn.profile.transports import open_transport
from edgeattn.profile.transports.base import Say, silent


@dataclass(frozen=True)
class Wanted:
    """What is asked for of every bundle; empty stands for the bundle's own.

    Attributes:
        backend, entry: one of the bundle's. threads, batches: each is a record of its own.
        precisions: only bundles of these.
    """

    backend: str | None = None
    entry: str | None = None
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What came of a session.

    Attributes:
        records: in the order of the jobs. ratios: B over A of each further record against the first, by the record's
            id, of those whose blocks took turns.
        counts: instructions of single runs by process, and "" or why there are none, by the record's id.
        failed: (bundle, error) of jobs that could not be measured. unmeasured: (label, why) of compute units.
        stopped: the error that ended it early, with what was measured before in ``records``.
    """

    records: list[Record] = field(default_factory=list)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    counts: dict[str, tuple[list[list[int | None]], str]] = field(default_factory=dict)
    failed: list[tuple[str, EdgeAttnError]] = field(default_factory=list)
    unmeasured: list[tuple[str, str]] = field(default_factory=list)
    stopped: BaseException | None = None


def select(paths: Sequence[str | Path], precisions: Sequence[str] = ()) -> list[Bundle]:
    """Bundles by their folders, or by a folder that holds some.

    Raises:
        UsageError: no bundle there, or none of a precision that is asked for.
    """
    found: list[Bundle] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*/manifest.json")) if not (path / "manifest.json").is_file() else []
        found += [Bundle.open(file.parent) for file in inside] or [Bundle.open(path)]
    found = list({bundle.path.resolve(): bundle for bundle in found}.values()) if len(paths) == 1 else found
    for precision in precisions:
        known = sorted({bundle.manifest.precision for bundle in found})
        if precision not in known:
            first = found[0].manifest
            offered = targets.get(first.target).precisions(None)
            raise UsageError(
                "there is no bundle of this precision",
                value=precision,
                where="--precision",
                why=f"the bundles are of {', '.join(known)}",
                fix=f"edgeattn export {first.recipe['name']} --target {first.target} --precision {precision}"
                if precision in offered
                else f"target {first.target} has {', '.join(offered)}",
            )
    return [bundle for bundle in found if not precisions or bundle.manifest.precision in precisions]


def jobs_of(bundles: Sequence[Bundle], wanted: Wanted) -> list[Job]:
    """What is to be measured of each bundle: every backend, for every number of threads and every batch.

    Raises:
        UsageError: an unknown backend or entry.
    """
    jobs = []
    for bundle in bundles:
        files = bundle.manifest.files
        if "run.py" in files and "run_profile.py" not in files:
            why = "its run.py knows no blocks that take turns"
            raise UsageError("the bundle is of an older EdgeAttn", value=bundle.path, why=why, fix="export anew")
        infos = {info.backend: info for info in bundle.manifest.artifacts}
        if wanted.backend is not None and wanted.backend not in infos:
            raise unknown("backend", wanted.backend, infos, where=str(bundle.path))
        for name, info in infos.items():
            if wanted.backend not in (None, name):
                continue
            entry = wanted.entry or ("main" if "main" in info.entries else next(iter(info.entries)))
            if entry not in info.entries:
                raise unknown("entry", entry, info.entries, where=str(bundle.path))
            jobs += [
                Job(bundle.path, name, entry, threads, batch)
                for threads in wanted.threads or (None,)
                for batch in wanted.batches or (None,)
            ]
    return jobs


def described(device: str) -> Device | None:
    """A device's file; None for an address."""
    if "://" in device:
        return None
    return devices.resolve("host" if device == "local" else device)


def roofs_of(place: Device | None, precisions: Sequence[str], threads: int | None) -> dict[str, Roof]:
    """What a device can do at most, for those precisions that its file tells something of."""
    found = {}
    for precision in dict.fromkeys(precisions):
        try:
            if place is not None:
                found[precision] = roof_of(place, precision, threads or 0)
        except UsageError:
            continue
    return found


def estimate(jobs: Sequence[Job], device: str) -> list[Record]:
    """Records of estimates: nothing runs.

    Raises:
        UsageError: the device's file does not tell its peak or bandwidth, or an artifact has no table of operations.
    """
    place = described(device)
    if place is None:
        known = ", ".join(name for name in ("host", "raspberry-pi-5"))
        raise UsageError(
            "an address has no documented peaks", value=device, where="--device", fix=f"name a device, such as {known}"
        )
    records = []
    for job in jobs:
        bundle = Bundle.open(job.bundle)
        targets.get(job.backend).operations(bundle.artifact(job.backend), job.entry)  # a damaged file says so itself
        precision = bundle.manifest.precision
        roof = roof_of(place, precision, job.threads or 0)
        record = Builder(place.name, place, {precision: roof}).estimated(job)
        if record.breakdown.estimate_ms is None:
            raise UsageError(
                "there is nothing to estimate from",
                value=f"backend {job.backend}",
                where=str(job.bundle),
                why="its artifact shows no operations here",
                fix="edgeattn optics show BUNDLE" if job.backend == "optical" else "edgeattn doctor",
            )
        records.append(record)
    return records


def measure(
    jobs: Sequence[Job],
    device: str,
    effort: Effort,
    say: Say = silent,
    keep: Callable[[Sequence[Record]], None] = lambda records: None,
) -> Outcome:
    """Measure jobs on a device, in turns.

    Args:
        keep: is given the records once, also after an error or Ctrl-C: whatever was measured is in them.

    Raises:
        EdgeAttnError: nothing at all was measured.
    """
    transport, place = open_transport(device), described(device)
    threads = {job.threads for job in jobs}
    precisions = [Bundle.open(job.bundle).manifest.precision for job in jobs]
    with tempfile.TemporaryDirectory(prefix="edgeattn-") as folder, interruptible(say) as say:
        given = [_with_operations(job, Path(folder), n) for n, job in enumerate(jobs)] if effort.operations else jobs
        session, outcome = Session(given, transport, effort, say), Outcome()
        try:
            session.run()
        except (EdgeAttnError, KeyboardInterrupt) as error:
            outcome.stopped = error
    name = place.name if place is not None and place.kind != "host" else "host" if device == "local" else device
    roofs = roofs_of(place, precisions, next(iter(threads)) if len(threads) == 1 else None)
    for group in session.groups:
        builder = Builder(name, place, roofs, secrets.token_hex(8))
        labels = [_label(one.job) for one in group]
        base: tuple[int, Record] | None = None
        for number, one in enumerate(group):
            if one.failed is not None:
                outcome.failed.append((one.job.bundle.name, one.failed))
            others = [label for place_, label in enumerate(labels) if place_ != number]
            partial = session.stopped or (one.failed.what if one.failed else "")
            made = builder.measured(one, others, partial)
            outcome.records += made
            if len(made) != 1:
                continue
            said = one.ready[-1].get("uncounted", "the runner of this bundle has no counter") if one.ready else ""
            outcome.counts[made[0].id] = (one.counts, said)
            if base is None:
                base = (number, made[0])
                continue
            try:
                outcome.ratios[made[0].id] = paired_ratio(group[base[0]].blocks, one.blocks)
            except ValueError:
                pass  # too few rounds for an interval
        outcome.unmeasured += builder.unmeasured
    if outcome.records:
        keep(outcome.records)
    elif isinstance(outcome.stopped, EdgeAttnError):
        raise outcome.stopped
    elif outcome.failed and outcome.stopped is None:
        raise outcome.failed[0][1]
    return outcome


def _label(job: Job) -> str:
    parts = [job.bundle.name, *([f"{job.threads} threads"] if job.threads else [])]
    return ", ".join([*parts, *([f"batch {job.batch}"] if job.batch else [])])


def _with_operations(job: Job, folder: Path, number: int) -> Job:
    """The job with a program of its operations, where its runtime has no profiler."""
    try:
        bundle = Bundle.open(job.bundle)
        data = targets.get(job.backend).alone(bundle.artifact(job.backend), job.entry)
    except (EdgeAttnError, ImportError):
        return job
    if data is None:
        return job
    file = folder / f"operations-{number}.tflite"
    file.write_bytes(data)
    return replace(job, operations=file)


def pairs(records: Sequence[Record], ratios: Mapping[str, Ratio]) -> list[dict[str, object]]:
    """The ratios as plain data: B over A of the records by their ids."""
    first = {r.settings.session: r.id for r in reversed(records) if r.settings.session and r.id not in ratios}
    return [
        {
            "a": first.get(record.settings.session, ""),
            "b": record.id,
            "value": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "confidence": ratio.confidence,
            "rounds": ratio.rounds,
        }
        for record in records
        if (ratio := ratios.get(record.id)) is not None
    ]
