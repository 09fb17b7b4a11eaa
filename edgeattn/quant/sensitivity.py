"""Sensitivity: which module loses the accuracy when it is quantized, and what has to be kept so that the rest holds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgeattn.capture import tensors_of
from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import Array
from edgeattn.quant.simulate import Site, Unit

#: So many units are measured in one pass over the samples: the reference is computed once for all of them.
TOGETHER = 4


class Simulated(Protocol):
    """A model whose sites can be rounded: ``Simulation`` or ``Operations``."""

    model: nn.Module
    sites: frozenset[Site]
    units: tuple[Unit, ...]

    def rounded(self, sites: Collection[Site]) -> AbstractContextManager[None]:
        """The model computes with these sites rounded while the body runs."""

    def without(self, units: Collection[str]) -> frozenset[Site]:
        """The sites that are left where these units are kept in floats."""


@dataclass(frozen=True)
class Error:
    """Distance of a rounded model from the same model in floats, over all samples.

    Attributes:
        relative_l2: ||y - r|| / ||r|| over the entries that are finite, of the output where it is largest.
        nonfinite: entries that are not finite, of all outputs.
        samples: rows of the first output that were scored, 0 without labels; of these ``agree`` have the reference's
            class and ``correct`` the right one, and ``reference_correct`` the reference gets right.
        kl: mean Kullback-Leibler divergence of the classes' probabilities from the reference's, in nats.
    """

    relative_l2: float
    nonfinite: int = 0
    samples: int = 0
    agree: int = 0
    correct: int = 0
    reference_correct: int = 0
    kl: float = 0.0

    @property
    def finite(self) -> bool:
        """Nothing is NaN or infinite."""
        return self.nonfinite == 0 and math.isfinite(self.relative_l2)

    @property
    def sqnr_db(self) -> float:
        """-20 log10 of the relative L2; infinite when equal."""
        return -20.0 * math.log10(self.relative_l2) if self.relative_l2 > 0 else math.inf

    @property
    def gain(self) -> float:
        """Change of top-1 accuracy, as a share of the scored samples; 0 without labels."""
        return (self.correct - self.reference_correct) / self.samples if self.samples else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite error is None."""
        data = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Error:
        """The inverse of ``as_dict``."""
        known: dict[str, Any] = {k: math.inf if v is None else v for k, v in data.items()}
        return Error(**known)


class _Sum:
    """An error while samples pass; nothing of them is kept."""

    def __init__(self) -> None:
        self.energy: dict[int, list[float]] = {}
        self.nonfinite = self.samples = self.agree = self.correct = self.reference_correct = 0
        self.kl = 0.0

    def add(self, reference: Sequence[Tensor], outputs: Sequence[Tensor], labels: Array | None) -> None:
        for i, (r, y) in enumerate(zip(reference, outputs, strict=True)):
            if not r.is_floating_point():
                continue
            finite = y.isfinite() & r.isfinite()
            self.nonfinite += int(y.numel() - y.isfinite().sum())
            exact, off = r[finite].double(), (y[finite].double() - r[finite].double())
            sums = self.energy.setdefault(i, [0.0, 0.0])
            sums[0] += float(exact.square().sum())
            sums[1] += float(off.square().sum())
        if labels is not None:
            self._score(reference[0][: len(labels)], outputs[0][: len(labels)], torch.from_numpy(labels))

    def _score(self, r: Tensor, y: Tensor, labels: Tensor) -> None:
        self.samples += len(labels)
        ours, theirs = y.nan_to_num().argmax(-1), r.argmax(-1)
        self.agree += int((ours == theirs).sum())
        self.correct += int((ours == labels).sum())
        self.reference_correct += int((theirs == labels).sum())
        log_r, log_y = r.double().log_softmax(-1), y.double().log_softmax(-1)
        self.kl += float((log_r.exp() * (log_r - log_y)).sum())

    def error(self) -> Error:
        relative = [
            math.sqrt(off / exact) if exact else (0.0 if not off else math.inf) for exact, off in self.energy.values()
        ]
        kl = self.kl / max(1, self.samples)
        return Error(
            max(relative, default=0.0),
            self.nonfinite,
            self.samples,
            self.agree,
            self.correct,
            self.reference_correct,
            kl if math.isfinite(kl) else math.inf,
        )


@dataclass(frozen=True)
class Row:
    """A unit of a simulation and what rounding costs: it alone, and all but it."""

    name: str
    kind: str
    parameters: int
    alone: Error
    without: Error

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = {"name": self.name, "kind": self.kind, "parameters": self.parameters}
        return own | {"alone": self.alone.as_dict(), "without": self.without.as_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Row:
        """The inverse of ``as_dict``."""
        return Row(
            data["name"],
            data["kind"],
            data["parameters"],
            Error.from_dict(data["alone"]),
            Error.from_dict(data["without"]),
        )


@dataclass(frozen=True)
class Kept:
    """What is left of the error where the ``count`` worst units stay in floats."""

    count: int
    error: Error


class Journal:
    """Finished measurements as JSON lines in a file, so that a run that was killed goes on where it stopped.

    Args:
        path: of the file; None keeps nothing. A last line that was cut off does not count.

    Attributes:
        known: what was read and written, by name.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        try:
            lines = path.read_bytes().split(b"\n") if path else []
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Note a measurement, on the disk before this returns."""
        self.known[key] = value
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The line feed goes first: it ends a line that was cut off.
        line = b"\n" + json.dumps({"key": key, "value": value}, allow_nan=False).encode()
        with self.path.open("ab") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())


def _forward(model: nn.Module, feeds: Mapping[str, Array]) -> tuple[Tensor, ...]:
    return tensors_of(model(*(torch.from_numpy(value.copy()) for value in feeds.values())))


def measure(
    simulation: Simulated,
    runs: Sequence[Collection[Site]],
    samples: Iterable[Mapping[str, Array]],
    labels: Sequence[Array] = (),
) -> list[Error]:
    """The error of each run, in which its sites are rounded, against the model in floats; one pass over the samples.

    Args:
        labels: class numbers of the rows of the first output, an array for each sample; none where it has no labels.

    Raises:
        UsageError: there are no samples.
    """
    sums = [_Sum() for _ in runs]
    seen = False
    with torch.no_grad():
        for i, feeds in enumerate(samples):
            seen = True
            reference = _forward(simulation.model, feeds)
            for sites, total in zip(runs, sums, strict=True):
                with simulation.rounded(sites):
                    outputs = _forward(simulation.model, feeds)
                total.add(reference, outputs, labels[i] if labels else None)
    if not seen:
        raise UsageError("there are no samples to measure on", fix="give --calibration, or held-out samples")
    return [total.error() for total in sums]


def rank(rows: Iterable[Row]) -> list[Row]:
    """The worst first: what is not finite, then by the error of each alone; ties stay in the model's order."""
    return sorted(rows, key=lambda row: (row.alone.finite, -row.alone.relative_l2 if row.alone.finite else 0.0))


def sensitivity(
    simulation: Simulated,
    samples: Iterable[Mapping[str, Array]],
    labels: Sequence[Array] = (),
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Each unit rounded alone, and all but it; the worst first.

    Args:
        samples: gone through again and again. labels: as of ``measure``.
        journal: of what is known already, and where rows go. It has to be for the same model, plan and samples.
        progress: told what is going on.
    """
    journal = journal or Journal()
    rows = {u.name: Row.from_dict(journal.known[u.name]) for u in simulation.units if u.name in journal.known}
    todo = [unit for unit in simulation.units if unit.name not in rows]
    for start in range(0, len(todo), TOGETHER):
        part = todo[start : start + TOGETHER]
        progress(f"{len(rows)} of {len(simulation.units)} measured; {part[0].name}")
        runs = [sites for unit in part for sites in (unit.alone, simulation.without([unit.name]))]
        errors = measure(simulation, runs, samples, labels)
        for unit, alone, without in zip(part, errors[::2], errors[1::2], strict=True):
            rows[unit.name] = Row(unit.name, unit.kind, unit.parameters, alone, without)
            journal.put(unit.name, rows[unit.name].as_dict())
    return rank(rows[unit.name] for unit in simulation.units)


def fewest(
    simulation: Simulated,
    ranked: Sequence[Row],
    holds: Callable[[Error], bool],
    samples: Iterable[Mapping[str, Array]],
    labels: Sequence[Array] = (),
    journal: Journal | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Kept]:
    """How the error falls while more and more of the worst units stay in floats, until it holds.

    Counts double until it holds; then the gap is halved. Measured on the way, by count; the last one that holds is the
    advice, and its count is 0 where nothing has to be kept.
    """
    journal = journal or Journal()
    found: dict[int, Kept] = {}

    def at(count: int) -> bool:
        names = [row.name for row in ranked[:count]]
        key = f"keep {' '.join(sorted(names))}"
        if key not in journal.known:
            progress(f"all but the {count} worst" if count else "all quantized")
            (error,) = measure(simulation, [simulation.without(names)], samples, labels)
            journal.put(key, error.as_dict())
        found[count] = Kept(count, Error.from_dict(journal.known[key]))
        return holds(found[count].error)

    low, high = -1, 0
    while not at(high) and high < len(ranked):
        low, high = high, min(len(ranked), max(1, high * 2))
    while high - low > 1:
        middle = (low + high) // 2
        if at(middle):
            high = middle
        else:
            low = middle
    return [found[count] for count in sorted(found) if count <= high]
