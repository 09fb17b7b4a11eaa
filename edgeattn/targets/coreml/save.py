"""Writes a model as an .mlpackage that is the same, byte for byte, whenever and wherever it is made."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from edgeattn.core.hashing import sha256_file
from edgeattn.core.quiet import quiet

#: What coremltools notes of the day.
DATE = "com.github.apple.coremltools.conversion_date"
#: A listing for a debugger of another project, which coremltools leaves in the package.
DEBUG = "executorch_debug_handle_mapping.json"
#: What the identifiers of a package's items are made under.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "edgeattn:coreml")


def save(model: Any, path: Path) -> None:
    """Write ``path``, without the date, without a debugger's listing, and with identifiers made of what is inside.

    coremltools draws the identifiers of the items in ``Manifest.json`` at random. Their only use is to tell items
    apart: here each is a UUID of version 5 over the item's name and bytes.
    """
    model.user_defined_metadata.pop(DATE, None)
    with quiet():
        model.save(str(path))
    (path / DEBUG).unlink(missing_ok=True)
    _write_in_order(path / "Data" / "com.apple.CoreML" / "model.mlmodel")
    _name_items(path)


def _write_in_order(file: Path) -> None:
    """Write the protobuf anew with its maps in the order of their keys: as it is, the order is the library's affair."""
    with quiet():
        from coremltools.proto import Model_pb2
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    file.write_bytes(spec.SerializeToString(deterministic=True))


def _name_items(path: Path) -> None:
    """Give the items of ``Manifest.json`` identifiers that follow from their names and bytes."""
    manifest = path / "Manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    known = {old: _identifier(path / "Data", item["path"]) for old, item in content["itemInfoEntries"].items()}
    content["itemInfoEntries"] = {known[old]: item for old, item in content["itemInfoEntries"].items()}
    content["rootModelIdentifier"] = known[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _identifier(data: Path, name: str) -> str:
    place = data / name
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    words = [name, *(f"{file.relative_to(data).as_posix()} {sha256_file(file)}" for file in files)]
    return str(uuid.uuid5(_NAMESPACE, "\n".join(words)))
