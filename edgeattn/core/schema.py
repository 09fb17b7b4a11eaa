"""TOML files read into pydantic models, with errors that name the file, the key and the closest spelling."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from edgeattn.core.errors import UsageError, closest
from edgeattn.core.hashing import canonical_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Strict(BaseModel):
    """Base of all file schemas: unknown keys are errors, values are never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _array(cls, value: Any, info: ValidationInfo) -> Any:
        """TOML and JSON have arrays where Python has tuples; nothing else is converted."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        return tuple(value) if isinstance(value, list) and get_origin(wanted) is tuple else value


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """For validators of tables that anything may be in: whether JSON can hold it, which dates and nan cannot be.

    Raises:
        ValueError: it cannot.
    """
    try:
        canonical_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must be text, finite numbers, true, false, lists and tables of them: {error}") from None
    return value


Model = TypeVar("Model", bound=BaseModel)


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Keys allowed at the place of ``path[:-1]`` in ``model``."""
    current: Any = model
    for step in path[:-1]:
        field = getattr(current, "model_fields", {}).get(step)
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
        current = nested[0] if nested else current
    return list(getattr(current, "model_fields", {}))


def validate(model: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """``data`` as ``model``; every mistake is listed.

    Raises:
        UsageError: unknown key (with the closest known one), missing key or bad value, naming ``source`` and the key.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(step) for step in item["loc"]) or "(file)"
            if item["type"] == "extra_forbidden":
                known = _known_keys(model, item["loc"])
                near = closest(str(item["loc"][-1]), known)
                hint = f"did you mean {near!r}?" if near else f"known keys here: {', '.join(known)}"
                problems.append(f"{key}: unknown key; {hint}")
            elif item["type"] == "missing":
                problems.append(f"{key}: missing")
            else:
                message = item["msg"].removeprefix("Value error, ")
                problems.append(f"{key}: given {item['input']!r}; {message}")
        # A misspelt key also is the one that is missing.
        first, *more = sorted(problems, key=lambda problem: ": unknown key" not in problem)
        raise UsageError(
            f"{model.__name__.lower()} is not valid",
            where=source,
            why=first,
            fix="mend the key in the file",
            details=more,
        ) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        UsageError: not readable, or not TOML.
    """
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return data
    except FileNotFoundError as error:
        raise UsageError(
            "there is no such file", value=path, where=f"folder {Path.cwd()}", fix="give the path of one that exists"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "a file cannot be read", value=path, why=str(error), fix="give a UTF-8 file that you may read"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError("a file is not TOML", value=path, why=str(error), fix="mend the file there") from error


def lines_of(text: str) -> dict[tuple[str | int, ...], int]:
    """The line, from 1, at which each key of a TOML text stands, tables and members of arrays of tables too.

    Found by reading ever longer beginnings: what a further line adds stands at that line, or at the first of those
    lines that make no sense without it. Keys of an inline table stand at its line.
    """
    found: dict[tuple[str | int, ...], int] = {}
    lines, begin = text.splitlines(), 0
    for end, line in enumerate(lines, 1):
        if begin == end - 1 and not line.split("#")[0].strip():
            begin = end
            continue
        try:
            data = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        for path in _paths(data):
            found.setdefault(path, begin + 1)
        begin = end
    return found


def _paths(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def folders(kind: str) -> list[Path]:
    """Where files of ``kind`` (recipes, devices) are looked for: the user's own folder, then the shipped one."""
    home = os.environ.get("EDGEATTN_HOME")
    own = Path(home) if home else Path.home() / ".config" / "edgeattn"
    package = Path(__file__).resolve().parent.parent
    shipped = package / kind if (package / kind).is_dir() else package.parent / kind
    return [own / kind, shipped]


def find(kind: str) -> dict[str, Path]:
    """Name -> TOML file of every recipe or device; a user's own hides a shipped one of the same name."""
    found: dict[str, Path] = {}
    for folder in reversed(folders(kind)):
        found.update({path.stem: path for path in sorted(folder.glob("*.toml"))})
    return dict(sorted(found.items()))
