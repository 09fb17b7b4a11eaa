"""Reads an .mlpackage: its manifest, the model's protobuf, and where its weights are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.core.errors import EdgeAttnError, UsageError
from edgeattn.core.files import inside
from edgeattn.core.quiet import quiet

#: Specification versions that can hold an ML program, and the first iOS that reads them.
VERSIONS = {6: "iOS15", 7: "iOS16", 8: "iOS17", 9: "iOS18", 10: "iOS26"}
#: Key of the metadata under which ``lower`` notes the torch module of each value; of one function with its name behind.
MODULES = "edgeattn.modules"
_AGAIN = "copy the package again, or convert the model again"


@dataclass(frozen=True)
class Package:
    """An opened .mlpackage.

    Attributes:
        spec: ``Model`` of Core ML's protobuf, whose type is an ML program.
        root: the folder that ``@model_path`` in names of weight files stands for.
    """

    path: Path
    spec: Any
    root: Path

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of its functions, the default one first."""
        names = list(self.spec.mlProgram.functions)
        default = self.spec.description.defaultFunctionName or "main"
        return tuple(sorted(names, key=lambda name: (name != default, name)))

    @property
    def metadata(self) -> dict[str, str]:
        """What the author wrote into the model."""
        return dict(self.spec.description.metadata.userDefined)

    @property
    def modules(self) -> dict[str, str]:
        """Path of the torch module that each value came from, by the value's name; empty if not made by EdgeAttn."""
        return self.modules_in("")

    def modules_in(self, function: str) -> dict[str, str]:
        """The same of one function, where several were noted."""
        text = self.metadata.get(f"{MODULES}.{function}", self.metadata.get(MODULES))
        if text is None:
            return {}
        held = json.loads(text)
        return {name: held["paths"][number] for name, number in held["values"].items()}


def _refuse(path: Path, why: str, fix: str = _AGAIN) -> UsageError:
    return UsageError("the Core ML package cannot be read", value=path, why=why, fix=fix)


def _model_file(path: Path) -> Path:
    """The model's protobuf inside a package.

    Raises:
        UsageError: there is no package, or its manifest is damaged or leads out of it.
    """
    manifest = path / "Manifest.json"
    if not path.is_dir():
        raise _refuse(
            path, "there is no such folder" if not path.exists() else "it is not a folder", "correct the path"
        )
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        name = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
        file = inside(path / "Data", str(name))
    except OSError as error:
        raise _refuse(path, f"its Manifest.json cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _refuse(path, f"its Manifest.json is damaged: {type(error).__name__} {error}") from error
    except EdgeAttnError as error:
        raise _refuse(path, f"its Manifest.json names a file outside of the package: {error.value}") from error
    if not file.is_file():
        raise _refuse(path, f"{file.relative_to(path)} is missing")
    return file


def open_package(path: Path) -> Package:
    """Read a package's protobuf; weights are read when a program is made of it.

    Raises:
        UsageError: not a package, damaged, of an unknown version, or not an ML program.
    """
    file = _model_file(path)
    with quiet():
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise _refuse(path, f"{file.relative_to(path)} is truncated or damaged: {error}") from error
    kind = spec.WhichOneof("Type")
    if spec.specificationVersion not in VERSIONS:
        known = ", ".join(f"{number} ({system})" for number, system in VERSIONS.items())
        why = f"its specification version is {spec.specificationVersion}; known with ML programs are {known}"
        raise _refuse(path, why, "pip install --upgrade edgeattn, or convert the model for an older system")
    if kind != "mlProgram":
        raise _refuse(path, f"it holds {kind or 'no model'}, not an ML program", "convert it to an ML program")
    if not spec.mlProgram.functions:
        raise _refuse(path, "its ML program has no function")
    return Package(path, spec, file.parent)
