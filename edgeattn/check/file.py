"""``edgeattn.toml``: which models a repository exports, and what they must hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from edgeattn import device as devices
from edgeattn import targets
from edgeattn.core import schema
from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import TOLERANCES
from edgeattn.pipeline.cells import Cell
from edgeattn.report.checks.data import Place

NAME = "edgeattn.toml"

Path_ = tuple[str | int, ...]
#: What a lint finding fails at: itself and what is worse.
LEVELS = ("note", "warning", "error")
#: Facts that may be allowed to grow by a share over what the lock file holds.
GROWING = ("relative_l2", "size_mb", "parameters", "nodes", "macs", "bytes")


class Latency(schema.Strict):
    """How much slower than the baseline an artifact may be.

    Attributes:
        margin: the share: 0.05 is five percent.
        inconclusive: what comes of a measurement that cannot tell.
        device: where it is measured; ``local`` or the name of a device that can be reached.
        threads: of the runtime.
    """

    margin: float = Field(default=0.05, gt=0, lt=10)
    inconclusive: Literal["pass", "fail"] = "pass"
    device: str = "local"
    threads: int = Field(default=1, ge=1)


class Budgets(schema.Strict):
    """What cells are held to; what is not given is not looked at, but numbers and lint errors always are.

    Attributes:
        numerics: largest relative L2 by precision, in place of the target's own.
        accuracy_drop: of the share of held-out samples that is right, in place of the precision's own.
        size_mb: of the artifact's files. parameters: of the deploy form. nodes, macs: of the artifact's graph.
        peak_memory_mb: resident memory of a process that runs the bundle on this machine. export_memory_mb: of the
            export's largest stage.
        export_time_ratio: seconds of the export's stages over those in the lock file, of the same machine.
        lint: the mildest finding that fails.
        max_fallback: share of operations that the wanted compute unit does not take.
        growth: by fact, the share by which it may be more than in the lock file.
        latency: against the baseline's bundle, measured here and now.
    """

    numerics: dict[str, float] = Field(default_factory=dict)
    accuracy_drop: float | None = Field(default=None, ge=0, le=1)
    size_mb: float | None = Field(default=None, gt=0)
    parameters: int | None = Field(default=None, gt=0)
    nodes: int | None = Field(default=None, gt=0)
    macs: int | None = Field(default=None, gt=0)
    peak_memory_mb: float | None = Field(default=None, gt=0)
    export_memory_mb: float | None = Field(default=None, gt=0)
    export_time_ratio: float | None = Field(default=None, gt=0)
    lint: Literal["error", "warning", "note"] = "error"
    max_fallback: float | None = Field(default=None, ge=0, le=1)
    growth: dict[str, float] = Field(default_factory=dict)
    latency: Latency | None = None

    @field_validator("numerics")
    @classmethod
    def _known_precisions(cls, value: dict[str, float]) -> dict[str, float]:
        return _known(value, tuple(TOLERANCES), "precisions")

    @field_validator("growth")
    @classmethod
    def _known_facts(cls, value: dict[str, float]) -> dict[str, float]:
        return _known(value, GROWING, "facts")


def _known(value: dict[str, float], known: tuple[str, ...], what: str) -> dict[str, float]:
    strangers = [name for name in value if name not in known]
    if strangers:
        raise ValueError(f"{', '.join(strangers)}: known {what} are {', '.join(known)}")
    if any(not 0 <= number < math.inf for number in value.values()):
        raise ValueError("must be a number from 0 on")
    return value


class Model(schema.Strict):
    """A model and what it is exported to: each target in each precision for each device that runs it.

    Attributes:
        model: a recipe's name or file, ``package.module:factory``, ``file.py:factory`` or ``timm:NAME``.
        budgets: in place of the file's, key by key.
        The other fields are the words of ``edgeattn export``.
    """

    model: str
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = Field(default=("fp32",), min_length=1)
    devices: tuple[str, ...] = ()
    layout: str = "nchw"
    options: dict[str, str] = Field(default_factory=dict)
    strict: bool = False
    inputs: tuple[str, ...] = ()
    checkpoint: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    calibration: str | None = None
    samples: int | None = None
    keep: tuple[str, ...] = ()
    budgets: Budgets = Field(default_factory=Budgets)

    @field_validator("precisions")
    @classmethod
    def _precisions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _known(dict.fromkeys(value, 0.0), tuple(TOLERANCES), "precisions")
        return value

    @field_validator("targets", "precisions", "devices")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is there twice")
        return value

    _plain = field_validator("args")(schema.plain)


class File(schema.Strict):
    """The file as a whole."""

    budgets: Budgets = Field(default_factory=Budgets)
    models: dict[str, Model] = Field(min_length=1)

    @field_validator("models")
    @classmethod
    def _plain_names(cls, value: dict[str, Model]) -> dict[str, Model]:
        for name in value:
            if not name or name.startswith(".") or any(c in "/\\@" or not c.isprintable() for c in name):
                raise ValueError(f"{name!r} cannot be a model's name: it becomes a folder's")
        return value


@dataclass(frozen=True)
class Wanted:
    """A cell of the file and what it is held to.

    Attributes:
        suite: the model's name in the file.
        lines: see ``core.schema.lines_of``. file: as it is shown.
    """

    suite: str
    cell: Cell
    budgets: Budgets
    file: str
    lines: dict[Path_, int] = field(repr=False)

    @property
    def name(self) -> str:
        """Target, precision and device."""
        return " ".join([self.cell.target, self.cell.precision, *([self.cell.device] if self.cell.device else [])])

    @property
    def id(self) -> str:
        """The cell's name in the lock file."""
        return f"{self.suite} {self.name}"

    @property
    def folder(self) -> str:
        """Of the cell's bundle: two cells may have bundles of one name."""
        return f"{self.suite}@{self.cell.device}" if self.cell.device else self.suite

    def place(self, *key: str) -> Place:
        """The line of a budget, the model's own before the file's; of the model where neither has it."""
        for path in (("models", self.suite, "budgets", *key), ("budgets", *key)):
            if key and path in self.lines:
                return Place(self.file, self.lines[path])
        return Place(self.file, self.lines.get(("models", self.suite), 0))


def read(path: Path, shown: str) -> list[Wanted]:
    """The cells of a file, in its order; relative paths in it are looked up from the current folder.

    Args:
        shown: the file's name in messages.

    Raises:
        UsageError: no such file, not TOML, an unknown key or a bad value, a target or device that there is none of.
    """
    if not path.is_file():
        raise UsageError(
            "there is no file of checks",
            value=shown,
            why="a folder is in its place" if path.is_dir() else "it does not exist",
            fix="edgeattn check --init writes one",
        )
    try:
        data = schema.read_toml(path)
    except UsageError as error:
        line = re.search(r"at line (\d+)", error.why or "")
        error.where = str(Place(shown, int(line[1]) if line else 0))
        raise
    lines = schema.lines_of(path.read_text(encoding="utf-8"))
    try:
        file = schema.validate(File, data, shown)
    except UsageError as error:
        error.where = str(place_in(shown, lines, error.why or ""))
        raise
    found = []
    for suite, model in file.models.items():
        budgets, place = _merged(file.budgets, model.budgets), Place(shown, lines.get(("models", suite), 0))
        try:
            found += [Wanted(suite, cell, budgets, shown, lines) for cell in _cells(model, budgets)]
        except UsageError as error:
            error.where = f"{place}, models.{suite}"
            raise
    return found


def place_in(file: str, lines: dict[Path_, int], problem: str) -> Place:
    """The line of the key that begins a problem of ``core.schema.validate``, or of the nearest table around it."""
    key = problem.partition(": ")[0] + "."
    # A name may have dots in it: the keys that there are tell where it ends.
    around = {joined: line for path, line in lines.items() if key.startswith(joined := ".".join(map(str, path)) + ".")}
    return Place(file, around[max(around, key=len)] if around else 0)


def _merged(common: Budgets, own: Budgets) -> Budgets:
    """``own`` where it says something; tables key by key."""
    given = {name: getattr(own, name) for name in own.model_fields_set}
    for name in ("numerics", "growth"):
        given[name] = {**getattr(common, name), **getattr(own, name)}
    if common.latency and own.latency:
        latency = {name: getattr(own.latency, name) for name in own.latency.model_fields_set}
        given["latency"] = common.latency.model_copy(update=latency)
    return common.model_copy(update=given)


def _cells(model: Model, budgets: Budgets) -> Iterator[Cell]:
    """Every target in every precision for every device that runs it."""
    places = {name: devices.resolve(name) for name in model.devices}
    chosen = model.targets or tuple(dict.fromkeys(place.targets[0] for place in places.values())) or ("onnx",)
    for target in chosen:
        targets.get(target)
    pairs: list[tuple[str, str | None]] = [(target, None) for target in chosen]
    if places:
        pairs = [(t, d) for t in chosen for d, place in places.items() if t in place.targets]
    for kind, names, at in (("target", chosen, 0), ("device", tuple(places), 1)):
        idle = [name for name in names if name not in {pair[at] for pair in pairs}]
        if idle:
            raise UsageError(
                f"a {kind} goes with none of the {'devices' if at == 0 else 'targets'}",
                value=", ".join(idle),
                why="; ".join(f"{name} runs {', '.join(place.targets)}" for name, place in places.items()),
                fix="take it out, or put it into a model of its own",
            )
    words = model.model_dump(exclude={"budgets", "targets", "precisions", "devices"})
    for target, device in pairs:
        for precision in model.precisions:
            yield Cell(
                **words,
                target=target,
                precision=precision,
                device=device,
                tolerance=budgets.numerics.get(precision),
                accuracy_drop=budgets.accuracy_drop,
            )
