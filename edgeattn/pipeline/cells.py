"""Cells: exports as plain data, each made in a process of its own, and what came of it as plain data again.

``check`` and ``sweep`` make many of them. A cell is all that ``make_job`` takes; its outcome never is an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgeattn.bundle import Bundle
from edgeattn.bundle.manifest import FileInfo, Manifest
from edgeattn.core.errors import Crashed, EdgeAttnError
from edgeattn.core.hashing import sha256_data
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.child import as_data
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.plan import known_key, make_plan

#: How a cell is run, as an executor's task names it.
CALL = "edgeattn.pipeline.cells:run_cell"
#: Errors that another time may not come, whatever goes into a cell.
_PASSING = ("Crashed", "ToolchainMissing", "UsageError", "DeviceUnreachable")


@dataclass(frozen=True)
class Cell:
    """One export; the fields are ``make_job``'s.

    Attributes:
        tolerance, accuracy_drop: bounds in place of the target's own, see ``Job``.
    """

    model: str
    target: str
    precision: str = "fp32"
    device: str | None = None
    layout: str = "nchw"
    options: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    inputs: tuple[str, ...] = ()
    checkpoint: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    samples: int | None = None
    keep: tuple[str, ...] = ()
    tolerance: float | None = None
    accuracy_drop: float | None = None

    @property
    def label(self) -> str:
        """For a list of cells."""
        return " ".join([self.model, self.target, self.precision, *([self.device] if self.device else [])])

    @property
    def sha256(self) -> str:
        """Digest of the cell's words, not of the files that they name."""
        return sha256_data(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "inputs": list(self.inputs), "keep": list(self.keep)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Cell:
        """The inverse of ``to_dict``."""
        known = {f.name for f in fields(Cell)}
        lists = {name: tuple(data.get(name, ())) for name in ("inputs", "keep")}
        return Cell(**{**{k: v for k, v in data.items() if k in known}, **lists})

    def job(self) -> Job:
        """Raises as ``make_job``."""
        from edgeattn.pipeline.export import make_job

        words = self.to_dict()
        bounds = {name: words.pop(name) for name in ("tolerance", "accuracy_drop")}
        return replace(make_job(**words), **bounds)


def planned_key(cell: Cell) -> str | None:
    """Digest of all that goes into a cell's bundle, as far as that is known before the model is built; else None.

    Reads files and package metadata, and imports nothing heavy.
    """
    try:
        return known_key(cell.job(), Cache.default())
    except EdgeAttnError:
        return None


class _Stages:
    """A ``Progress`` that remembers at which stage a run is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.now = ""

    def start(self, stage: str) -> None:
        """See ``Progress``."""
        self.now = stage
        self.say(stage)

    def done(self, stage: str, seconds: float, peak_mb: float, cached: bool) -> None:
        """See ``Progress``."""


def run_cell(argument: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Export a cell; a stage whose process is killed is run once more.

    Args:
        argument: ``{"cell": Cell.to_dict(), "output": folder}``.

    Returns:
        ``held``; ``stage`` and ``error`` of what did not, "resolve" before any stage; ``folder``, which files of
        findings are relative to; ``bundle`` (its folder),
        ``digest`` (its manifest's), ``key``, ``artifacts`` (SHA-256 by file), ``lint`` (findings with their target),
        ``facts``, and the ``stages`` with their keys and whether they ran now.
    """
    cell = Cell.from_dict(argument["cell"])
    outcome = no_outcome(cell, None)
    watch, begun = _Stages(say), time.perf_counter()
    try:
        job = cell.job()
        outcome |= {"stage": "build", "folder": job.resolved.folder}
        try:
            outcome |= _export(cell, job, Path(argument["output"]), watch)
        except Crashed:
            say("its process died; once more")
            outcome |= _export(cell, job, Path(argument["output"]), watch)
    except EdgeAttnError as error:
        outcome["stage"] = watch.now or outcome["stage"]
        outcome["error"] = as_data(error)
        outcome["facts"] = {"wall_s": time.perf_counter() - begun}
        if outcome["stage"] != "resolve":
            # It need not be looked for again, if it is a failure of the files as they are now.
            cache = Cache.default()
            built = all(make_plan(part, cache, "build")[-1].record is not None for part in job.parts)
            outcome["key"] = (known_key(job, cache) or "") if built else ""
            outcome["lint"] = _findings(job)
    return outcome


def stands(outcome: Mapping[str, Any], planned: str | None) -> bool:
    """Whether an outcome is what its cell would come to again, so that it need not be run.

    Args:
        planned: see ``planned_key``.
    """
    if planned is None or outcome["key"] != planned:
        return False
    return _whole(outcome) if outcome["held"] else outcome["error"]["kind"] not in _PASSING


def _whole(outcome: Mapping[str, Any]) -> bool:
    """Whether the bundle is there, with every byte as it was written."""
    try:
        bundle = Bundle.open(outcome["bundle"])
        bundle.check_files()
    except EdgeAttnError:
        return False
    return (bundle.manifest.key, bundle.manifest.digest) == (outcome["key"], outcome["digest"])


def no_outcome(cell: Cell, error: Mapping[str, Any] | None) -> dict[str, Any]:
    """An outcome before there is one, or of a cell whose process gave none but an error."""
    found: dict[str, Any] = {"cell": cell.to_dict(), "held": False, "stage": "resolve", "error": error, "bundle": ""}
    found["folder"] = ""
    return found | {"digest": "", "key": "", "artifacts": {}, "lint": [], "facts": {}, "stages": []}


def _findings(job: Job) -> list[dict[str, Any]]:
    """What lint found before the export ended, where it came so far."""
    found = []
    for part in job.parts:
        record = make_plan(part, Cache.default(), "lint")[-1].record
        found += [] if record is None else [{"target": part.target, **f} for f in record.facts["findings"]]
    return found


def _export(cell: Cell, job: Job, output: Path, watch: _Stages) -> dict[str, Any]:
    """The outcome of an export that held."""
    from edgeattn.pipeline.export import export_job

    begun = time.perf_counter()
    exported = export_job(job, output, force=True, progress=watch)
    manifest = exported.bundle.manifest
    artifacts = {name: info.sha256 for name, info in _artifact_files(manifest).items()}
    stages = [
        {
            "target": target,
            "name": name,
            "key": record.key,
            "seconds": record.seconds,
            "peak_mb": record.peak_mb,
            "fresh": name in run.fresh,
        }
        for target, run in exported.runs.items()
        for name, record in run.records.items()
    ]
    return {
        "held": True,
        "stage": "",
        "bundle": str(exported.bundle.path),
        "digest": manifest.digest,
        "key": manifest.key,
        "artifacts": artifacts,
        "lint": [{"target": info.backend, **finding} for info in manifest.artifacts for finding in info.lint],
        "facts": {**facts_of(exported.bundle, cell.device), "wall_s": time.perf_counter() - begun},
        "stages": stages,
    }


def facts_of(bundle: Bundle, device: str | None = None) -> dict[str, Any]:
    """What a bundle says of itself in numbers; None what it does not say. Nothing is measured.

    ``relative_l2``, ``tolerance``; ``accuracy``, ``reference_accuracy``; ``size_mb`` of the artifacts' files and
    ``parameters`` of the deploy form; ``macs``, ``bytes`` moved, ``nodes`` and ``fallback`` (the share of operations
    that the wanted compute unit does not take) of all entries of the artifact in front; ``seconds`` and ``peak_mb`` of
    the stages; ``estimate_ms`` on ``device``, uncalibrated.
    """
    manifest = bundle.manifest
    worst = [n["relative_l2"] for i in manifest.artifacts for n in _each(i.numerics) if n["relative_l2"] is not None]
    return {
        "relative_l2": max(worst, default=None),
        "tolerance": manifest.tolerance,
        "accuracy": manifest.task and manifest.task["artifact_accuracy"],
        "reference_accuracy": manifest.task and manifest.task["reference_accuracy"],
        "size_mb": sum(info.size for info in _artifact_files(manifest).values()) / 1e6,
        "parameters": (manifest.reparam.get("after") or {}).get("parameters"),
        **_costs(bundle),
        "seconds": sum(stage.seconds for stage in manifest.stages),
        "peak_mb": max((stage.peak_mb for stage in manifest.stages), default=None),
        "weights": manifest.weights.kind,
        "unproven": "; ".join(dict.fromkeys(info.unproven for info in manifest.artifacts if info.unproven)),
        "estimate_ms": _estimate(bundle, device),
    }


def _artifact_files(manifest: Manifest) -> dict[str, FileInfo]:
    """The files of the artifacts themselves; of a format that is a folder, or has weights beside, all of them."""
    models = {entry.file for info in manifest.artifacts for entry in info.entries.values()}
    return {name: info for name, info in manifest.files.items() if name.startswith(tuple(models))}


def _each(numerics: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [n for sample in numerics.values() if isinstance(sample, dict) for n in sample.values()]


def _costs(bundle: Bundle) -> dict[str, Any]:
    """Counts over the operations of all entries of the artifact in front."""
    from edgeattn import targets

    artifact, info = bundle.artifact(), bundle.manifest
    target, found, off = targets.get(info.backend), [], 0
    told = not info.unproven  # else only the device knows what its units take
    for entry in artifact.entries:
        operations = target.operations(artifact, entry)
        units = target.units(artifact, entry) if operations else {}
        found += operations
        off += sum(unit != target.unit for unit in units.values())
        told = told or bool(units)
    if not found:
        return dict.fromkeys(("macs", "bytes", "nodes", "fallback"))
    return {
        "macs": sum(op.macs for op in found),
        "bytes": sum(op.bytes for op in found),
        "nodes": len(found),
        "fallback": off / len(found) if told else None,
    }


def _estimate(bundle: Bundle, device: str | None) -> float | None:
    """In ms, of one entry of the artifact in front; None where the device's file or the artifact does not tell."""
    from edgeattn.profile.run import Wanted, estimate, jobs_of

    if device is None:
        return None
    try:
        jobs = jobs_of([bundle], Wanted(backend=bundle.manifest.backend))
        return estimate(jobs, device)[0].breakdown.estimate_ms
    except (EdgeAttnError, ImportError):
        return None
