"""``matrix.toml``: models, targets, precisions and devices, and the cells that they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from edgeattn import device as devices
from edgeattn import recipe as recipes
from edgeattn import targets
from edgeattn.core import schema
from edgeattn.core.errors import ToolchainMissing, UsageError, unknown
from edgeattn.core.hashing import sha256_data
from edgeattn.core.numerics import TOLERANCES
from edgeattn.pipeline.cells import Cell
from edgeattn.pipeline.child import as_data
from edgeattn.quant.plan import BITS

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_AXES = ("targets", "precisions", "devices")


class Model(schema.Strict):
    """A model of the matrix.

    Attributes:
        model: a recipe's name or file, ``package.module:factory``, ``file.py:factory`` or ``timm:NAME``.
        targets, precisions, devices: in place of the matrix's own.
        calibration, samples, keep: for the precisions that quantize.
        The other fields are the words of ``edgeattn export``.
    """

    model: str
    inputs: tuple[str, ...] = ()
    checkpoint: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    calibration: str | None = None
    samples: int | None = Field(default=None, ge=1)
    keep: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    _plain = field_validator("args")(schema.plain)


class Exclude(schema.Strict):
    """Cells that are left out: those that are all of this. ``model`` is a name of the matrix."""

    model: str | None = None
    target: str | None = None
    precision: str | None = None
    device: str | None = None


class Matrix(schema.Strict):
    """The file as a whole.

    Attributes:
        models: by name. A plain list of models in the file has their own names.
    """

    name: str
    models: dict[str, Model] = Field(min_length=1)
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    devices: tuple[str, ...] = ()
    exclude: tuple[Exclude, ...] = ()

    @field_validator("name")
    @classmethod
    def _as_folder(cls, value: str) -> str:
        if not _PLAIN.fullmatch(value):
            raise ValueError("must be of letters, digits and . _ -, since it becomes a folder's name")
        return value


@dataclass(frozen=True)
class Entry:
    """A cell of the matrix.

    Attributes:
        name: the model's name in the file.
        folder: that its bundle is made in, relative to those of all.
        state: "" if it can be run, "unsupported" or "toolchain" if that is known not to go. error: why, as plain data.
    """

    name: str
    cell: Cell
    folder: str
    state: str = ""
    error: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """For a list of cells."""
        cell = self.cell
        return " ".join([self.name, cell.target, cell.precision, *([cell.device] if cell.device else [])])


def read(path: Path) -> Matrix:
    """The file; relative paths in it are looked up from the current folder.

    Raises:
        UsageError: not readable, not TOML, an unknown key, or a target, precision or device that there is none of.
    """
    data = schema.read_toml(path)
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem).lstrip("_.-") or "matrix"
    models = data.get("models")
    if isinstance(models, list) and all(isinstance(model, str) for model in models):
        _once(models, f"{path}, models")
        data["models"] = {model: {"model": model} for model in models}
    matrix = schema.validate(Matrix, {"name": stem, **data}, str(path))
    _check_names(matrix, str(path))
    for name, model in matrix.models.items():
        _check_names(model, f"{path}, models.{name}")
    for index, excluded in enumerate(matrix.exclude):
        place = f"{path}, exclude.{index}"
        if not excluded.model_fields_set:
            raise UsageError("an exclusion is empty", where=place, why="it would leave out every cell", fix="remove it")
        if excluded.model is not None and excluded.model not in matrix.models:
            raise unknown("model", excluded.model, matrix.models, where=f"{place}.model")
        for kind in _AXES:
            own = getattr(excluded, kind[:-1])
            _check_known(kind, () if own is None else (own,), f"{place}.{kind[:-1]}")
    return matrix


def _check_names(axes: Matrix | Model, place: str) -> None:
    for kind in _AXES:
        names = getattr(axes, kind)
        _once(names, f"{place}, {kind}")
        _check_known(kind, names, f"{place}, {kind}")


def _check_known(kind: str, names: Iterable[str], where: str) -> None:
    for name in names:
        if kind == "devices":
            try:
                devices.resolve(name)
            except UsageError as error:
                error.where = where
                raise
        else:
            known = tuple(TOLERANCES) if kind == "precisions" else targets.names()
            if name not in known:
                raise unknown(kind[:-1], name, known, where=where)


def _once(names: Iterable[str], where: str) -> None:
    found = list(names)
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UsageError("a name is given twice", value=", ".join(twice), where=where, fix="give each once")


def _plain(name: str) -> str:
    """A name as a folder's, another one for each."""
    return name if _PLAIN.fullmatch(name) else f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}-{sha256_data(name)[:6]}"


def _folder(name: str, device: str | None) -> str:
    """Bundles of one model for several devices have the same name."""
    return _plain(name) if device is None else f"{_plain(name)}@{_plain(device)}"


def combinations(matrix: Matrix) -> Iterator[Entry]:
    """Every target, precision and device of every model, those that are excluded left out. Nothing is looked up."""
    for name, model in matrix.models.items():
        for target in model.targets or matrix.targets:
            for precision in model.precisions or matrix.precisions:
                for device in model.devices or matrix.devices or (None,):
                    own = {"model": name, "target": target, "precision": precision, "device": device}
                    wanted = [e.model_dump(exclude_none=True).items() for e in matrix.exclude]
                    if any(items <= own.items() for items in wanted):
                        continue
                    words = model.model_dump(exclude=set(_AXES))
                    if precision not in BITS:
                        words |= {"calibration": None, "samples": None, "keep": ()}
                    cell = Cell(**words, target=target, precision=precision, device=device)
                    yield Entry(name, cell, _folder(name, device))


def entries(matrix: Matrix, source: str) -> list[Entry]:
    """The cells in order, and of each whether it can be run at all; no model is built for it.

    Args:
        source: the file's name in messages.

    Raises:
        UsageError: no target, no cell is left, two cells are one, or a model that cannot be resolved.
    """
    if not matrix.targets and not all(model.targets for model in matrix.models.values()):
        raise UsageError(
            "there are no targets", where=source, fix=f"targets = ['onnx'], of {', '.join(targets.names())}"
        )
    for name, model in matrix.models.items():
        try:
            checkpoint = None if model.checkpoint is None else Path(model.checkpoint)
            # What only some precisions have is looked at here too: a mistake in it is none of a target's.
            fields = {"source": model.calibration} | ({} if model.samples is None else {"samples": model.samples})
            named = schema.validate(recipes.CalibrationSpec, fields, source) if model.calibration else None
            resolved = recipes.resolve(
                model.model,
                inputs=model.inputs,
                checkpoint=checkpoint,
                args=model.args,
                calibration=named,
                keep=model.keep,
            )
            if model.samples is not None and named is None:
                recipes.with_samples(resolved, model.samples)
        except UsageError as error:
            error.where = f"{source}, models.{name}{f': {error.where}' if error.where else ''}"
            raise
    found: dict[str, Entry] = {}
    for entry in combinations(matrix):
        if other := found.get(entry.cell.sha256):
            raise UsageError(
                "two cells are the same", value=f"{other.label}; {entry.label}", where=source, fix="take one out"
            )
        found[entry.cell.sha256] = _looked_at(entry)
    if not found:
        raise UsageError("no cell is left", where=source, why="all are excluded", fix="exclude less")
    return list(found.values())


def _looked_at(entry: Entry) -> Entry:
    """The entry, with why it cannot be run if that can be known already."""
    try:
        entry.cell.job()
    except (UsageError, ToolchainMissing) as error:
        state = "unsupported" if isinstance(error, UsageError) else "toolchain"
        return Entry(entry.name, entry.cell, entry.folder, state, as_data(error))
    return entry
