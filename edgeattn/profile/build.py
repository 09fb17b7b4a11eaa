"""Records of what was measured: what the device said, joined with what the bundle and the device's file say."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import edgeattn
from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.core.errors import EdgeAttnError
from edgeattn.core.hashing import sha256_data
from edgeattn.device import Device
from edgeattn.profile.measure import Job, Measured, slowed
from edgeattn.profile.record import (
    KEPT,
    Breakdown,
    Latency,
    Memory,
    Operation,
    Place,
    Proof,
    Record,
    Roofline,
    Settings,
    State,
    Subject,
)
from edgeattn.profile.roofline import Estimate, Roof, estimate
from edgeattn.profile.statistics import summarize
from edgeattn.targets.base import OpCost

#: A clock that is so far below the highest that was seen means that the machine was slowed down.
CLOCK_FALL = 0.10
#: Spread of the times within blocks, p90 over p50, above which something else kept the machine busy.
NOISY = 1.25
#: What a runtime's optimizer adds to the name of an operation.
_ADDED = re.compile(r"(_token_\d+|_nchwc|_nhwc|_fused|_quant|/fused|^fused )")
#: Operations that a runtime makes one of, at most.
_FUSED = 4
#: Units of Core ML: what each asks for.
_UNITS = {"CPU_ONLY": "cpu", "CPU_AND_GPU": "gpu", "CPU_AND_NE": "ne", "ALL": "ne"}


def commit() -> str:
    """Of the repository that this is run in, with "+" where files that it knows have changed; "" outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


class Builder:
    """Makes the records of one session.

    Args:
        device: its name or address. described: its file, None where it has none.
        roof: what it can do at most by precision, see ``roofline.roof_of``; without, operations have no estimate.
    """

    def __init__(self, device: str, described: Device | None, roofs: Mapping[str, Roof], session: str = "") -> None:
        self._device, self._described, self._roofs, self._session = device, described, roofs, session
        self._commit, self._created = commit(), now()
        #: (label, why) of compute units that could not be measured.
        self.unmeasured: list[tuple[str, str]] = []

    def measured(self, one: Measured, others: Sequence[str] = (), partial: str = "") -> list[Record]:
        """The records of a job: one, or one for each of its compute units; none where nothing was measured.

        Args:
            others: labels of what took turns with it. partial: why it ended early.
        """
        bundle = Bundle.open(one.job.bundle)
        if one.results and "compute_units" in one.results[0]:
            return self._units(one, bundle, partial)
        if not any(block for process in one.blocks for block in process):
            return []
        last = one.results[-1] if one.results else {}
        first = {**one.ready[0], **last}
        table = costs(bundle, one.job.backend, one.job.entry)
        target = targets.get(one.job.backend)
        units = target.units(bundle.artifact(one.job.backend), one.job.entry) if one.operations else {}
        rows = [(name, op, units.get(name, target.unit), ms) for name, op, _, ms in one.operations]
        rows += [(layer["layer"], "", "gpu", layer["ms"]) for layer in first.get("layers", ())]
        source = one.operations_by or ("TensorRT's layer profile" if rows else "")
        gpu = bundle.manifest.target == "tensorrt" or one.job.backend == "tensorrt"
        latency = latency_of(one.blocks, one.ready)
        record = self._record(
            "measured",
            bundle,
            one.job,
            place=self._place(first),
            settings=Settings(
                unit="gpu" if gpu else "cpu",
                threads=int(first.get("threads", 0)),
                batch=int(first.get("batch", 1)),
                timed=str(first.get("timed", "")),
                session=self._session if others else "",
                interleaved=tuple(others),
            ),
            latency=latency,
            memory=Memory(
                peak_rss_mb=max((r["peak_rss_mb"] or 0.0 for r in one.results), default=0.0) or None,
                device_mb=first.get("device_mb"),
            ),
            states=states_of(one),
            flags=flags_of(one, latency),
            breakdown=self._breakdown(bundle, table, rows, source, "gpu" if gpu else target.unit, latency.p50),
            device_relative_l2=(first.get("golden") or {}).get("worst_relative_l2")
            if isinstance(first.get("golden"), dict)
            else None,
            partial=partial,
        )
        return [record]

    def estimated(self, job: Job) -> Record:
        """A record that was not measured: operations on the device's roofline."""
        bundle = Bundle.open(job.bundle)
        table = costs(bundle, job.backend, job.entry)
        breakdown = self._breakdown(bundle, table, [], "", "", None)
        described = self._described
        unit = (
            "cpu" if described is None else str(described.peak_unit or ("cpu" if described.kind == "host" else "gpu"))
        )
        place = Place(
            device=self._device,
            description=described.description if described else "",
            machine=described.machine if described else platform.machine(),
            cpu=(described.chip or described.cpu or "") if described else "",
            cores=described.cores if described else None,
        )
        settings = Settings(unit="ne" if unit == "npu" else unit, threads=job.threads or 0, timed="nothing was run")
        return self._record("estimated", bundle, job, place=place, settings=settings, breakdown=breakdown)

    def _record(
        self, kind: str, bundle: Bundle, job: Job, device_relative_l2: float | None = None, **given: Any
    ) -> Record:
        table = costs(bundle, job.backend, job.entry)
        made = Record(
            kind=cast(Any, kind),
            created=self._created,
            edgeattn=edgeattn.__version__,
            commit=self._commit,
            subject=subject_of(bundle, job, sum(op.macs for op in table) or None),
            proof=proof_of(bundle, job.backend).model_copy(update={"device_relative_l2": device_relative_l2}),
            **given,
        )
        return made.sealed()

    def _place(self, said: Mapping[str, Any]) -> Place:
        same = {key: said.get(key) for key in ("cpu", "cores", "machine")}
        same["system"] = str(said.get("system", "")).split(" ")[0]
        gpu = ", ".join(str(said[key]) for key in ("gpu", "driver", "engine") if said.get(key))
        return Place(
            device=self._device,
            description=self._described.description if self._described else "",
            machine=str(said.get("machine", "")),
            cpu=str(said.get("cpu", "")),
            cores=said.get("cores"),
            system=str(said.get("system", "")),
            python=str(said.get("python", "")),
            runtime=str(said.get("runtime", "")),
            gpu=gpu,
            fingerprint=sha256_data({**same, "device": self._device, "gpu": said.get("gpu")}),
        )

    def _breakdown(
        self,
        bundle: Bundle,
        table: Sequence[OpCost],
        rows: Sequence[tuple[str, str, str, float]],
        source: str,
        wanted: str,
        p50: float | None,
    ) -> Breakdown:
        """The operations with their times, costs and estimates.

        Args:
            rows: name, kind, unit and ms of what was measured.
        """
        roof = self._roofs.get(bundle.manifest.precision)
        # By the rows themselves: a name may be there twice.
        found = zip(map(id, table), estimate(table, roof), strict=True) if roof else ()
        estimates: dict[int, Estimate] = dict(found)
        joined = joiner(table)
        total = sum(ms for *_, ms in rows)
        operations = []
        if rows:
            for name, op, unit, ms in rows:
                parts = joined(name, op)
                of = [estimates[id(part)] for part in parts if id(part) in estimates]
                longest = max(of, key=lambda each: each.ms, default=None)
                operations.append(
                    Operation(
                        name=name,
                        # Of what is fused, the one that has the weights.
                        module=next((part.module for part in sorted(parts, key=_less) if part.module), ""),
                        op=op or (parts[0].op if parts else ""),
                        unit=unit,
                        ms=ms,
                        share=ms / total if total else None,
                        macs=sum(part.macs for part in parts) if parts else None,
                        bytes=sum(part.bytes for part in parts) if parts else None,
                        estimate_ms=sum(each.ms for each in of) if of else None,
                        bound=longest.bound if longest else "",
                    )
                )
        else:
            for part in table:
                one = estimates.get(id(part))
                operations.append(
                    Operation(
                        name=part.name,
                        module=part.module,
                        op=part.op,
                        macs=part.macs,
                        bytes=part.bytes,
                        estimate_ms=one.ms if one else None,
                        bound=one.bound if one else "",
                    )
                )
        return Breakdown(
            operations=tuple(operations),
            source=source,
            overhead=total / p50 if total and p50 else None,
            wanted=wanted,
            estimate_ms=sum(each.ms for each in estimates.values()) if estimates else None,
            roofline=Roofline(tflops=roof.peak(_dtype(bundle.manifest.precision)), gb_s=roof.gb_s, source=roof.source)
            if roof
            else None,
            fallback=fallback_of(operations, wanted) if rows else {},
        )

    def _units(self, one: Measured, bundle: Bundle, partial: str) -> list[Record]:
        """A record for each of Core ML's compute units that was measured."""
        records = []
        table = costs(bundle, one.job.backend, one.job.entry)
        for name, wanted in _UNITS.items():
            found = [unit for result in one.results for unit in result["compute_units"] if unit["compute_unit"] == name]
            held = [unit for unit in found if unit["holds"]]
            if not held:
                self.unmeasured.append((f"{bundle.manifest.name}, {name}", str(found[0]["why"])))
                continue
            first = one.results[0]
            latency = latency_of([[unit["latencies"]] for unit in held], held)
            each: list[list[Any]] = next((unit["each"] for unit in found if unit.get("each")), [])
            by_name = joiner(table)
            spent = sum(weight for *_, weight in each) or 1.0
            operations = tuple(
                Operation(
                    name=op_name,
                    module=next((part.module for part in by_name(op_name, "") if part.module), ""),
                    op=op,
                    unit=device.lower(),
                    share=weight / spent,
                    macs=sum(part.macs for part in by_name(op_name, "")) or None,
                    bytes=sum(part.bytes for part in by_name(op_name, "")) or None,
                )
                for op_name, op, device, weight in each
            )
            breakdown = Breakdown(
                operations=operations,
                source="Core ML's plan: estimated shares of the cost, not times" if each else "",
                wanted=wanted,
                fallback=fallback_of(operations, wanted),
            )
            notes = [f"{name}: its plan cannot be told: {unit['plan_why']}" for unit in found[:1] if unit["plan_why"]]
            records.append(
                self._record(
                    "measured",
                    bundle,
                    one.job,
                    place=self._place(first),
                    settings=Settings(unit=name, batch=one.job.batch or 1, timed=str(first["timed"])),
                    latency=latency.model_copy(update={"load_first_ms": held[0].get("load_first_ms")}),
                    memory=Memory(peak_rss_mb=max(unit.get("peak_rss_mb") or 0.0 for unit in held) or None),
                    states=states_of(one),
                    flags=(*flags_of(one, latency), *notes),
                    breakdown=breakdown,
                    device_relative_l2=held[0].get("worst_relative_l2"),
                    partial=partial,
                )
            )
        return records


def costs(bundle: Bundle, backend: str, entry: str) -> list[OpCost]:
    """The operations of an artifact's entry; none where its target does not tell, or its toolchain is not here."""
    try:
        return targets.get(backend).operations(bundle.artifact(backend), entry)
    except (EdgeAttnError, ImportError):
        return []


def joiner(table: Sequence[OpCost]) -> Callable[[str, str], list[OpCost]]:
    """A function from a runtime's name and kind of an operation to the rows of the table that it is made of.

    TensorRT lists the nodes that it fused. ONNX Runtime calls what it fused after the output of the last one, and by
    the kind of the first: between those two is what it is made of.
    """
    known: dict[str, OpCost] = {}
    for op in table:
        for name in (*op.outputs, op.name):
            known[name] = op
    makers = {output: op for op in table for output in op.outputs}

    def back(last: OpCost, kind: str) -> list[OpCost]:
        """From ``last`` to the nearest row of that kind that it comes from."""
        paths = [[last]]
        for _ in range(_FUSED):
            paths = [[*path, makers[name]] for path in paths for name in path[-1].inputs if name in makers]
            if found := next((path for path in paths if path[-1].op == kind), None):
                return found
        return [last]

    def find(name: str, kind: str) -> list[OpCost]:
        words = [name, _ADDED.sub("", name), name.partition("/")[0], *re.split(r"[.]{3}|[^\w./:-]+", name)]
        found = list({id(known[word]): known[word] for word in words if word in known}.values())
        plain = kind.removeprefix("Fused").removeprefix("QLinear")
        if len(found) == 1 and plain and found[0].op not in (kind, plain):
            return back(found[0], plain)
        return found

    return find


def _less(part: OpCost) -> int:
    return -part.macs


def _dtype(precision: str) -> str:
    """What an artifact of that precision multiplies with."""
    return "fp32" if precision in ("w8", "w4") else precision


def fallback_of(operations: Sequence[Operation], wanted: str) -> dict[str, dict[str, float]]:
    """Percent of the operations, and of their time or cost, on other units than the one that was asked for."""
    found: dict[str, dict[str, float]] = {}
    spent = sum(op.ms if op.ms is not None else op.share or 0.0 for op in operations)
    for unit in sorted({op.unit for op in operations} - {wanted, ""}):
        mine = [op for op in operations if op.unit == unit]
        time = sum(op.ms if op.ms is not None else op.share or 0.0 for op in mine)
        found[unit] = {"ops": 100 * len(mine) / len(operations), "time": 100 * time / spent if spent else 0.0}
    return found


def latency_of(blocks: Sequence[Sequence[Sequence[float]]], ready: Sequence[Mapping[str, Any]]) -> Latency:
    """Percentiles of the times in ms, by process and block; what each process said of its start."""
    found = summarize(blocks)

    def kept(block: Sequence[float]) -> tuple[float, ...]:
        step = max(1, -(-len(block) // KEPT))
        return tuple(float(f"{ms:.5g}") for ms in block[::step])

    return Latency(
        **{name: getattr(found, name) for name in ("p50", "p90", "p95", "p99", "mean", "std", "min", "max")},
        low=found.low,
        high=found.high,
        confidence=found.confidence,
        runs=found.runs,
        blocks=tuple(tuple(kept(block) for block in process) for process in blocks),
        warmup=tuple(int(each["warmup"]) for each in ready),
        warm=tuple(bool(each["warm"]) for each in ready),
        first_ms=tuple(float(each["first_ms"]) for each in ready),
        load_ms=tuple(float(each["load_ms"]) for each in ready),
        clock_ms=max((float(each.get("clock_ms", 0.0)) for each in ready), default=0.0),
    )


def states_of(one: Measured) -> tuple[State, ...]:
    """The states of the machine: before the first run, after the last, and those between."""
    names = ("temperature_c", "clock_mhz", "clock_max_mhz", "load", "power_w")
    return tuple(
        State(
            when=cast(Any, when if not (when == "after" and place < len(one.states) - 1) else "during"),
            second=round(second, 3),
            throttled=None if state["throttled"] is None else tuple(state["throttled"]),
            **{name: state.get(name) for name in names},
        )
        for place, (second, when, state) in enumerate(one.states)
    )


def flags_of(one: Measured, latency: Latency) -> tuple[str, ...]:
    """What a reader must know before trusting the times."""
    flags = []
    slow = sorted({text for _, _, state in one.states for text in slowed(state)})
    if slow:
        flags.append(f"throttled: {', '.join(slow)}")
    counts = [state["throttle_count"] for *_, state in one.states if state.get("throttle_count") is not None]
    if counts and counts[-1] > counts[0]:
        flags.append(f"throttled: cores were slowed down {counts[-1] - counts[0]} times")
    clocks = [state["clock_mhz"] for _, when, state in one.states if when != "before" and state["clock_mhz"]]
    if clocks and min(clocks) < (1 - CLOCK_FALL) * max(clocks):
        flags.append(f"the clock fell from {max(clocks):.0f} to {min(clocks):.0f} MHz")
    if not all(latency.warm):
        cold = sum(not warm for warm in latency.warm)
        flags.append(f"not stable: {cold} of {len(latency.warm)} processes were still drifting after the warm-up")
    if latency.p50 and latency.p90 > NOISY * latency.p50:
        flags.append(f"noisy: the p90 is {latency.p90 / latency.p50:.2f}x the median; other processes run here?")
    return (*flags, *one.notes)


def subject_of(bundle: Bundle, job: Job, macs: int | None) -> Subject:
    """What a record is about."""
    manifest = bundle.manifest
    info = next(info for info in manifest.artifacts if info.backend == job.backend)
    folders = {entry.file.split("/")[0] for entry in info.entries.values()}
    size = sum(
        file.size for name, file in manifest.files.items() if name.split("/")[0] in folders or _beside(name, folders)
    )
    return Subject(
        bundle=manifest.name,
        digest=manifest.digest,
        model=str(manifest.recipe["name"]),
        target=manifest.target,
        backend=job.backend,
        precision=manifest.precision,
        entry=job.entry,
        weights=manifest.weights.kind,
        size_mb=size / 1e6,
        parameters=(manifest.reparam.get("after") or {}).get("parameters"),
        macs=macs,
    )


def _beside(name: str, files: set[str]) -> bool:
    """Whether a file holds the weights of an artifact's file: ``model.onnx.data``."""
    return any(name.startswith(f"{file}.") or name.startswith(f"{file}_") for file in files)


def proof_of(bundle: Bundle, backend: str) -> Proof:
    """What the manifest proves of an artifact."""
    manifest = bundle.manifest
    info = next(info for info in manifest.artifacts if info.backend == backend)
    outputs = {k: v for k, v in info.numerics.items() if isinstance(v, dict)}
    worst = [
        one["relative_l2"]
        for sample in outputs.values()
        for one in sample.values()
        if isinstance(one, dict) and one.get("relative_l2") is not None
    ]
    task, reparam = info.task or {}, manifest.reparam
    fused = reparam.get("fused") or []
    errors = [
        error for block in fused for key, error in (block.get("errors") or {}).items() if key.startswith("float64")
    ]
    quantized = (info.facts.get("quantize") or {}).get("weights") or ()
    return Proof(
        worst_relative_l2=max(worst, default=None),
        tolerance=manifest.tolerance,
        unproven=info.unproven,
        metric=str(task.get("metric", "")),
        accuracy=task.get("artifact_accuracy"),
        reference_accuracy=task.get("reference_accuracy"),
        samples=task.get("samples"),
        fused=len(fused),
        unfused=len(reparam.get("not_fused") or []),
        reparam_error=max((e for e in errors if e is not None), default=None),
        reparam_model_error=reparam.get("float32"),
        ptq_risk=sum(bool(block.get("ptq_risk")) for block in fused),
        quantized=tuple(quantized),
        lint=tuple(info.lint),
        numerics=outputs,
        versions=dict(info.tools),
        recipe_sha256=manifest.recipe_sha256,
        created=manifest.created,
    )
