"""The record of a measurement: one JSON schema for the terminal, the history, reports and checks.

``docs/records.md`` describes it. A record holds all that a report shows: nothing else has to be at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgeattn.core.errors import UsageError
from edgeattn.core.hashing import sha256_data

#: Of ``Record``; a reader takes this one alone.
SCHEMA_VERSION = 1
#: Times of a block that are kept at most: enough for its median and for a picture.
KEPT = 40


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Subject(_Part):
    """What was measured.

    Attributes:
        bundle: its name. digest: of its manifest. model: the recipe's name, or the guest's.
        target, backend: what was asked for, and the artifact's own kind.
        weights: "checkpoint" or "random". size_mb: of the artifact's files (1e6 bytes).
        macs, parameters: of the entry's operations, and of the deploy form; None where they are not known.
    """

    bundle: str
    digest: str
    model: str
    target: str
    backend: str
    precision: str
    entry: str
    weights: Literal["checkpoint", "random"]
    size_mb: float
    parameters: int | None = None
    macs: int | None = None


class Place(_Part):
    """Where it was measured, or estimated for.

    Attributes:
        device: a device's name, or an address. description: of its file, "" without.
        cpu, machine, system, python: as the device names them; "" where nothing ran there.
        runtime: distribution and version. gpu: name, driver and engine, where one computes.
        fingerprint: digest of what must be the same for times to be comparable: device, CPU, cores, system, unit.
    """

    device: str
    description: str = ""
    machine: str = ""
    cpu: str = ""
    cores: int | None = None
    system: str = ""
    python: str = ""
    runtime: str = ""
    gpu: str = ""
    fingerprint: str = ""


class Settings(_Part):
    """How it was measured.

    Attributes:
        unit: what computes: "cpu", "gpu", or a compute unit of Core ML. threads: 0 where the runtime chooses.
        batch: size of the first axis of the inputs. timed: what the timed region includes, in words.
        session: of records that were measured together: the blocks of process i of one took turns with those of process
            i of the others, so that their ratio is fair; "" where nothing took turns with it.
        interleaved: labels of those others.
    """

    unit: str = "cpu"
    threads: int = 0
    batch: int = 1
    timed: str = ""
    session: str = ""
    interleaved: tuple[str, ...] = ()


class Latency(_Part):
    """Times in ms.

    Attributes:
        p50, p90, p95, p99, mean, std, min, max: over all runs of all processes.
        low, high: bootstrap interval of the median; processes are drawn, then blocks inside of them.
        confidence: of that interval.
        blocks: the runs, by process and block, at most ``KEPT`` of a block, evenly taken. runs: their number in full.
        warmup: runs before, by process. warm: whether they became stable within the limit, by process.
        first_ms: the first run, by process. load_ms: from the file to a program that is ready, by process.
        clock_ms: what timing an empty run takes, a part of every time.
        load_first_ms: the very first load, where the system compiles the program once; None where it does not.
    """

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    std: float
    min: float
    max: float
    low: float
    high: float
    confidence: float
    runs: int
    blocks: tuple[tuple[tuple[float, ...], ...], ...]
    warmup: tuple[int, ...] = ()
    warm: tuple[bool, ...] = ()
    first_ms: tuple[float, ...] = ()
    load_ms: tuple[float, ...] = ()
    clock_ms: float = 0.0
    load_first_ms: float | None = None


class State(_Part):
    """Of the machine at a moment; None where it does not say.

    Attributes:
        when: "before", "during" or "after". second: since the measurement began.
        temperature_c: of the hottest zone. clock_mhz: of the fastest core, or the GPU. clock_max_mhz: its limit.
        throttled: what it says of being slowed down.
        load: processes that want to run, averaged over a minute. power_w: of a GPU.
    """

    when: Literal["before", "during", "after"]
    second: float = 0.0
    temperature_c: float | None = None
    clock_mhz: float | None = None
    clock_max_mhz: float | None = None
    throttled: tuple[str, ...] | None = None
    load: float | None = None
    power_w: float | None = None


class Memory(_Part):
    """Peaks in MB of 1e6 bytes: resident memory of the process, and the device's own memory."""

    peak_rss_mb: float | None = None
    device_mb: float | None = None


class Operation(_Part):
    """One operation of the artifact.

    Attributes:
        name: as the artifact calls it. module: path of the torch module that it came from, "" if unknown.
        op: its kind. unit: where it runs: "cpu", "gpu", "ne"; "" if unknown.
        ms: measured, under a profiler that slows it; None where nothing measured it.
        share: of the sum of all operations' ms, or of a plan's estimated cost.
        macs, bytes: multiply-accumulates; bytes of inputs, weights and outputs. None where unknown.
        estimate_ms, bound: time on the device's roofline, and what bounds it there: "compute", "memory" or "call".
    """

    name: str
    module: str = ""
    op: str = ""
    unit: str = ""
    ms: float | None = None
    share: float | None = None
    macs: int | None = None
    bytes: int | None = None
    estimate_ms: float | None = None
    bound: Literal["compute", "memory", "call", ""] = ""


class Roofline(_Part):
    """What the device could do at most.

    Attributes:
        tflops: arithmetic per second in 1e12 operations (two for a multiply-accumulate), for the precision.
        gb_s: of memory.
        source: where both are from: "documented", "computed" or "measured".
    """

    tflops: float
    gb_s: float
    source: str = ""


class Breakdown(_Part):
    """Where the time goes.

    Attributes:
        source: what measured the operations, or "" where nothing did. overhead: their sum over the p50, as a ratio.
        fallback: percent of time (or cost) and of operations by unit: ``{"cpu": {"ops": 3.0, "time": 1.2}}``; empty
            where all run on the one that was asked for. wanted: that unit.
        estimate_ms: sum of the operations' estimates, an uncalibrated estimate. roofline: what it was made with.
    """

    operations: tuple[Operation, ...] = ()
    source: str = ""
    overhead: float | None = None
    wanted: str = ""
    fallback: dict[str, dict[str, float]] = Field(default_factory=dict)
    estimate_ms: float | None = None
    roofline: Roofline | None = None


class Proof(_Part):
    """What the bundle's manifest proves, and what it leaves open.

    Attributes:
        worst_relative_l2: on the golden samples, against the training form in float32. tolerance: what was allowed.
        device_relative_l2: of the golden outputs on this device; None where that was not looked at.
        unproven: what is left open, in a sentence; "" where nothing is.
        accuracy, reference_accuracy, samples, metric: on held-out samples, if the recipe has some.
        fused, unfused: blocks that were reparameterized, and that were not. reparam_error: largest relative L2 of a
            block in float64. reparam_model_error: of the whole model in float32. ptq_risk: blocks whose range grew.
        quantized: modules whose weights became integers: ``module``, ``bits``, and ``error``, the relative L2 of the
            rounded weights.
        lint: findings: ``rule``, ``severity``, ``where``, ``text``.
        numerics: by sample and output: ``relative_l2``, ``sqnr_db``, ``max_abs``, ``cosine``.
        versions: of the tools that made the bundle.
        recipe_sha256, created: of the bundle.
    """

    worst_relative_l2: float | None = None
    tolerance: float | None = None
    device_relative_l2: float | None = None
    unproven: str = ""
    metric: str = ""
    accuracy: float | None = None
    reference_accuracy: float | None = None
    samples: int | None = None
    fused: int = 0
    unfused: int = 0
    reparam_error: float | None = None
    reparam_model_error: float | None = None
    ptq_risk: int = 0
    quantized: tuple[dict[str, Any], ...] = ()
    lint: tuple[dict[str, Any], ...] = ()
    numerics: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str | None] = Field(default_factory=dict)
    recipe_sha256: str = ""
    created: str = ""


class Record(_Part):
    """One artifact's entry on one device, with one number of threads and one batch size.

    Attributes:
        kind: "measured", or "estimated" (no calibration: see ``Breakdown.estimate_ms``); then there is no latency.
        id: SHA-256 of everything else. created: UTC, ISO 8601. commit: of the repository that it was run in, "" if
            none; with "+" where that had changes.
        flags: what a reader must know before trusting it: throttling, clocks that fell, a noisy machine, no warm-up.
        partial: why the measurement ended early; "" where it did not.
    """

    schema_version: Literal[1] = 1
    kind: Literal["measured", "estimated"]
    id: str = ""
    created: str
    edgeattn: str
    commit: str = ""
    subject: Subject
    place: Place
    settings: Settings
    latency: Latency | None = None
    memory: Memory = Field(default_factory=Memory)
    states: tuple[State, ...] = ()
    flags: tuple[str, ...] = ()
    breakdown: Breakdown = Field(default_factory=Breakdown)
    proof: Proof = Field(default_factory=Proof)
    partial: str = ""

    def sealed(self) -> Record:
        """A copy whose ``id`` fits the rest."""
        data = self.model_dump(mode="json")
        data.pop("id")
        return self.model_copy(update={"id": sha256_data(data)})

    @property
    def label(self) -> str:
        """What tells it from others in a list: bundle, entry, unit, threads, batch; the backend where it is another."""
        subject, settings = self.subject, self.settings
        parts = [subject.bundle]
        parts += [subject.backend] if subject.backend != subject.target else []
        parts += [subject.entry] if subject.entry != "main" else []
        parts += [settings.unit] if settings.unit not in ("cpu", "gpu") else []
        parts += [f"{settings.threads} threads"] if settings.threads > 1 else []
        parts += [f"batch {settings.batch}"] if settings.batch > 1 else []
        return ", ".join(parts)


def to_json(records: Iterable[Record], ratios: Sequence[Mapping[str, Any]] = ()) -> str:
    """The records as one JSON text: ``{"records": [...]}``.

    Args:
        ratios: of records that took turns, see ``profile.run.pairs``; they can be computed anew from the records.
    """
    data: dict[str, Any] = {"records": [record.model_dump(mode="json") for record in records]}
    data |= {"ratios": list(ratios)} if ratios else {}
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse(data: Any, where: str) -> list[Record]:
    """Records from what JSON holds: ``{"records": [...]}``, a list, or a single one.

    Args:
        where: file, for errors.

    Raises:
        UsageError: no record, one of another schema, or one that was changed.
    """
    items = data.get("records", [data]) if isinstance(data, Mapping) else data
    if not isinstance(items, list) or not items:
        raise UsageError("there is no record", where=where, fix="edgeattn profile BUNDLE --json writes some")
    return [_one(item, f"{where}, record {number}") for number, item in enumerate(items, 1)]


def _one(item: Any, where: str) -> Record:
    version = item.get("schema_version") if isinstance(item, Mapping) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        raise UsageError(
            f"the record is of a{' newer' if newer else 'n older'} EdgeAttn",
            value=f"schema version {version}",
            where=where,
            why=f"this one reads {SCHEMA_VERSION}",
            fix="pip install --upgrade edgeattn" if newer else "measure again",
        )
    try:
        record = Record.model_validate(item)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "(record)"
        fix = "edgeattn profile BUNDLE --json writes records"
        raise UsageError("this is not a record", where=f"{where}, {key}", why=first["msg"], fix=fix) from error
    try:
        whole = record.sealed().id == record.id
    except ValueError:  # a number that is not finite: never written
        whole = False
    if not whole:
        raise UsageError(
            "the record was changed", where=where, why="its id does not fit its content", fix="measure again"
        )
    return record


def read(path: Path) -> list[Record]:
    """The records of a JSON file, see ``parse``.

    Raises:
        UsageError: not readable, not JSON, or as ``parse``.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("records cannot be read", value=path, why=error.strerror or str(error)) from error
    except ValueError as error:
        raise UsageError("records cannot be read", value=path, why=f"not JSON: {error}") from error
    return parse(data, str(path))
