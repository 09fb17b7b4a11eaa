"""An optical bundle looked at: what it costs, when what happens, and its accuracy under the effects of hardware."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.bundle import Bundle
from edgeattn.bundle.bundle import SCORED
from edgeattn.core import schema
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.files import inside
from edgeattn.core.numerics import Array
from edgeattn.core.specs import batches
from edgeattn.device import Effects
from edgeattn.pipeline.stages.reference import check_logits, heldout_samples
from edgeattn.recipe import Recipe, Resolved
from edgeattn.targets.base import Artifact
from edgeattn.targets.feeds import own_feeds
from edgeattn.targets.optical.cost import Cost, cost, plans_of
from edgeattn.targets.optical.lower import operations
from edgeattn.targets.optical.program import Operation, OpticalProgram
from edgeattn.targets.optical.runtime import OpticalRuntime

#: Runs whose tiles share the planes while a bundle is scored.
BATCH = 64
#: Held-out samples of a sweep unless another number is asked for.
SAMPLES = 32
#: Electrons of read-out noise in the sweep of the full well.
READ_NOISE_E = 3.0
#: Of a normal distribution's two sides, for intervals of 95 %.
_Z = 1.959964
#: A batch that is asked for at most, where planes are larger than anything.
_MOST = 1 << 20


@dataclass(frozen=True)
class Opened:
    """An entry of an optical bundle."""

    bundle: Bundle
    artifact: Artifact
    entry: str
    folder: Path
    program: OpticalProgram

    @property
    def title(self) -> str:
        """The bundle's name."""
        return self.bundle.manifest.name

    @property
    def random(self) -> bool:
        """Whether its weights are."""
        return self.bundle.manifest.weights.kind == "random"

    def operation(self, name: str | None) -> Operation:
        """The operation of that name or module; the one with the most multiply-accumulates without a name.

        Raises:
            UsageError: there is none, with the closest name; or a module has several.
        """
        known = self.program.operations
        if name is None:
            return max(known, key=lambda op: op.work.macs)
        found = [op for op in known if op.name == name] or [op for op in known if op.module == name]
        if not found:
            names = dict.fromkeys(op.module or op.name for op in known)
            raise unknown("operation", name, names, where=str(self.bundle.path))
        if len(found) > 1:
            raise UsageError(
                "a module has several operations",
                value=name,
                where=str(self.bundle.path),
                fix=f"choose one of {', '.join(op.name for op in found)}",
            )
        return found[0]


def open_optical(bundle: Bundle, entry: str | None = None) -> Opened:
    """An entry of a bundle of target optical; the first one without a name.

    Raises:
        UsageError: the bundle is of another target, or has no such entry. CheckFailed: its files were changed.
    """
    manifest = bundle.manifest
    if "optical" not in {info.backend for info in manifest.artifacts}:
        raise UsageError(
            "the bundle is not of target optical",
            value=f"target {manifest.target}",
            where=str(bundle.path),
            why="it holds no planes and masks",
            fix="export the model with --target optical",
        )
    artifact = bundle.artifact("optical")
    if entry is not None and entry not in artifact.entries:
        raise unknown("entry", entry, artifact.entries, where=str(bundle.path))
    bundle.check_files()
    name = entry or next(iter(artifact.entries))
    folder = bundle.path / artifact.entries[name].file
    return Opened(bundle, artifact, name, folder, OpticalProgram.read(folder))


# What it costs


@dataclass(frozen=True)
class Costs:
    """Of one input, and of as many as fill the planes; an input is what one run of the entry takes.

    Attributes:
        filled: with the largest power of two of inputs for which no operation needs more frames than for one.
        doubled: with twice as many, which need more.
    """

    one: Cost
    filled: Cost
    doubled: Cost

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: getattr(self, name).as_dict() for name in ("one", "filled", "doubled")}


def find_costs(program: OpticalProgram) -> Costs:
    """What a program costs on its device."""
    ops, optics = program.operations, program.optics
    works, signed = [op.work for op in ops], [op.signed for op in ops]

    def of(batch: int) -> Cost:
        return cost(plans_of(works, signed, optics, batch), optics, batch, program.electronic_ops)

    def frames(batch: int) -> list[int]:
        return [plan.frames for plan in plans_of(works, signed, optics, batch)]

    batch, least = 1, frames(1)
    while batch < _MOST and frames(2 * batch) == least:
        batch *= 2
    return Costs(of(1), of(batch), of(2 * batch))


@dataclass(frozen=True)
class Span:
    """What takes time in a run: ``electronics`` of a turn, or ``masks``, ``frames`` or ``readout`` of an operation.

    Attributes:
        count: of frames, masks, read frames, or electronic operations.
    """

    kind: str
    name: str
    count: int
    seconds: float


def timeline(opened: Opened) -> list[Span]:
    """One run in order, with nothing at the same time: what takes none has a span too, of no length."""
    optics, found = opened.program.optics, []
    after = 0  # biases, and sums of several frames, which electronics add to what the camera saw
    for number, turn in enumerate(opened.program.turns):
        ops = after
        if turn.electronics:
            ops += sum(operations(node) for node in ir.load(inside(opened.folder, turn.electronics)).graph)
        seconds = ops / optics.electronics_ops_s if optics.electronics_ops_s else 0.0
        if ops:
            found.append(Span("electronics", f"turn {number}", ops, seconds))
        after = 0
        for op in turn.optics:
            spent, name = cost([op.plan], optics), op.module or op.name
            found.append(Span("masks", name, spent.mask_writes, spent.seconds["masks"]))
            found.append(Span("frames", name, spent.frames, spent.seconds["frames"]))
            found.append(Span("readout", name, spent.frames, spent.seconds["readout"]))
            useful, work = op.plan.useful_pixels, op.work
            after += useful - useful // op.plan.blocks[3]
            after += work.rows * work.groups * work.kernels * math.prod(work.out) if op.bias else 0
    return found


# Accuracy under effects


def wilson(correct: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen ``correct`` times ``of``: Wilson's score interval."""
    share, square = correct / of, _Z * _Z / of
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Point:
    """Held-out samples that were right under one setting."""

    setting: float
    correct: int
    of: int

    @property
    def accuracy(self) -> float:
        """Share of the samples."""
        return self.correct / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, see ``wilson``."""
        return wilson(self.correct, self.of)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"accuracy": self.accuracy, "interval": self.interval}


@dataclass(frozen=True)
class Kind:
    """A switch of ``Effects`` that is gone through.

    Attributes:
        title, unit: in words. log: whether settings are powers. none: the setting that has no effect, if there is one.
        field: of ``Effects``. pair: whether it is given down and right. more: what goes with it.
        alone: whether each run has frames of its own, for the runs of a frame would have a draw of chance in common.
    """

    title: str
    unit: str
    field: str
    settings: tuple[float, ...]
    log: bool = False
    none: float | None = None
    pair: bool = False
    alone: bool = False
    more: tuple[tuple[str, float], ...] = ()

    def effects(self, sign: str, setting: float) -> Effects:
        """These and the sign scheme alone."""
        value: Any = int(setting) if self.field.endswith("_bits") else setting
        given = {"sign": sign, self.field: (value, value) if self.pair else value, **dict(self.more)}
        return schema.validate(Effects, given, f"sweep of {self.field}")


#: What is gone through unless something else is asked for; what needs whole planes has fewer settings, it takes long.
KINDS = (
    Kind(
        "Camera: full well",
        f"electrons, {READ_NOISE_E:g} of read-out noise",
        "full_well_e",
        (1e2, 1e3, 1e4, 1e5, 1e6),
        log=True,
        more=(("read_noise_e", READ_NOISE_E),),
    ),
    Kind("Camera: ADC", "bits", "adc_bits", (4.0, 6.0, 8.0, 10.0, 12.0, 14.0)),
    Kind(
        "Laser: drift from frame to frame",
        "share of the power",
        "laser_drift",
        (0.03, 0.1, 0.3),
        log=True,
        alone=True,
    ),
    Kind("Input modulator: amplitude", "bits", "input_amplitude_bits", (2.0, 3.0, 4.0, 6.0, 8.0, 10.0)),
    Kind("Mask modulator: amplitude", "bits", "mask_amplitude_bits", (2.0, 4.0, 6.0, 8.0)),
    Kind("Mask modulator: phase", "bits", "mask_phase_bits", (2.0, 4.0, 6.0, 8.0)),
    Kind("Mask: shift, down and right", "mask pixels", "mask_shift_px", (0.0, 1.0, 2.0, 4.0), none=0, pair=True),
    Kind(
        "Camera: shift, down and right",
        "camera pixels",
        "camera_shift_px",
        (0.0, 0.05, 0.1, 0.25),
        none=0,
        pair=True,
    ),
)


@dataclass(frozen=True)
class Sweep:
    """Accuracy over the settings of a switch.

    Attributes:
        ideal: of the ideal correlator, on the same samples. whole: whether whole planes had to be computed.
    """

    kind: Kind
    points: tuple[Point, ...]
    ideal: Point
    whole: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        kind = asdict(self.kind) | {"more": dict(self.kind.more)}
        points = [point.as_dict() for point in self.points]
        return kind | {"points": points, "ideal": self.ideal.as_dict(), "whole_planes": self.whole}


@dataclass(frozen=True)
class Curves:
    """Accuracy under effects, one switch at a time.

    Attributes:
        sign: scheme that all but the ideal ones were computed with. batch: samples that shared the planes at most; none
            did where the laser drifts.
        reference: of the PyTorch model, on all held-out samples. ideal: of the ideal correlator, whose field is read.
        scheme: of the sign scheme alone. device: of all effects of the bundle's device; None where it has none beside
            the scheme.
    """

    sign: str
    batch: int
    reference: Point
    ideal: Point
    scheme: Point
    device: Point | None
    sweeps: tuple[Sweep, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("reference", "ideal", "scheme")
        known = {name: getattr(self, name).as_dict() for name in names}
        device = self.device.as_dict() if self.device else None
        sweeps = [sweep.as_dict() for sweep in self.sweeps]
        return {"sign": self.sign, "batch": self.batch, **known, "device": device, "sweeps": sweeps}


def samples_of(bundle: Bundle) -> tuple[Array, Array]:
    """Held-out samples that travel with a bundle: preprocessed inputs (N, ...) in float32, class numbers (N,).

    Raises:
        UsageError: it has none that can be scored.
    """
    manifest = bundle.manifest
    if manifest.task is None or SCORED not in manifest.files:
        raise UsageError(
            "the bundle has no held-out samples",
            value=manifest.name,
            where=str(bundle.path),
            why="accuracy needs samples with their classes",
            fix="export a recipe with [heldout], whose file has x and y",
        )
    recipe = schema.validate(Recipe, manifest.recipe, f"{bundle.path}, recipe")
    resolved = Resolved(recipe=recipe, folder="", heldout=str(inside(bundle.path, SCORED)))
    x, y = heldout_samples(resolved, manifest.entries["main"].inputs[0].shape)
    if y is None:
        raise UsageError("the held-out samples have no classes", where=f"{bundle.path / SCORED}, y")
    return x, y


def hits(bundle: Bundle, effects: Effects | None, on: int, batch: int = BATCH) -> Array:
    """Which of the first ``on`` held-out samples are right, (N,) of bool.

    Args:
        effects: of the hardware; ideal planes, whose field is read, without. batch: runs that share the planes.

    Raises:
        UsageError: the bundle has no held-out samples, or gives nothing that can be scored.
    """
    x, y = samples_of(bundle)
    x, y = x[:on], y[:on]
    artifact = bundle.artifact("optical")
    entry = artifact.entries["main"]
    name, first = entry.inputs[0].name, entry.outputs[0].name
    feeds = [own_feeds(entry.inputs, {name: part}) for part in batches(x, entry.inputs[0].shape[0])]
    runtime, found = OpticalRuntime(artifact, effects), []
    for start in range(0, len(feeds), batch):
        found += [outputs[first] for outputs in runtime.run_many("main", feeds[start : start + batch])]
    logits = np.concatenate(found)[: len(y)]
    if effects is None:
        check_logits(logits, y)
    # What is not a number is no answer.
    right: Array = (logits.argmax(-1) == y) & np.isfinite(logits).all(-1)
    return right


def scored(bundle: Bundle, effects: Effects | None, on: int, batch: int = BATCH) -> tuple[int, int]:
    """Top-1 accuracy on the first ``on`` held-out samples of the bundle: (correct, of). See ``hits``."""
    right = hits(bundle, effects, on, batch)
    return int(right.sum()), len(right)


def curves(
    bundle: Bundle,
    on: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    *,
    on_planes: int | None = None,
    kinds: Sequence[Kind] = KINDS,
    batch: int = BATCH,
) -> Curves:
    """Accuracy under each of ``kinds``, one at a time, and under all effects of the bundle's device.

    Args:
        on: the first so many held-out samples. say: is told how far it is.
        on_planes: samples for effects that need whole planes; as many as for the others without. Such planes take
            long, but samples cost little as long as they share one.

    Raises:
        UsageError: the bundle is of another target, or has no held-out samples.
    """
    opened = open_optical(bundle)
    total, optics = len(samples_of(bundle)[1]), opened.program.optics
    many = min(on or SAMPLES, total)
    few = min(on_planes or many, total)
    # A camera sees no sign; a device whose field is read has none, and is given the literature's scheme.
    sign = "kernel_split" if optics.effects.sign == "field" else optics.effects.sign
    alone = Effects(sign=sign)

    def point(effects: Effects, words: str, setting: float = 0.0, alone: bool = False) -> Point:
        count = few if effects.of_plane else many
        say(f"{words}: {count} samples")
        return Point(setting, *scored(bundle, effects, count, 1 if alone else batch))

    say(f"ideal planes: {max(many, few)} samples")
    right = hits(bundle, None, max(many, few), batch)
    ideal = {count: Point(0.0, int(right[:count].sum()), count) for count in (many, few)}
    right = hits(bundle, alone, max(many, few), batch)
    scheme = {count: Point(0.0, int(right[:count].sum()), count) for count in (many, few)}
    device = None
    if optics.effects != Effects(sign=optics.effects.sign):
        device = point(optics.effects, "all effects of the device", alone=optics.effects.laser_drift is not None)
    sweeps = []
    for kind in kinds:
        whole = kind.effects(sign, kind.settings[-1]).of_plane
        count, points = few if whole else many, []
        for setting in kind.settings:
            if setting == kind.none:
                points.append(replace(scheme[count], setting=setting))
            else:
                points.append(point(kind.effects(sign, setting), f"{kind.title}, {setting:g}", setting, kind.alone))
        sweeps.append(Sweep(kind, tuple(points), ideal[count], whole))
    task = bundle.manifest.task or {}
    reference = Point(0.0, task["reference_correct"], task["samples"])
    return Curves(sign, batch, reference, ideal[many], scheme[many], device, tuple(sweeps))
