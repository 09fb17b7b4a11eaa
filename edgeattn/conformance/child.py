"""An artifact as plain data, for another process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeattn.targets.base import Artifact, ArtifactEntry, Tensor


def describe(artifact: Artifact) -> dict[str, Any]:
    """Plain data."""
    return {
        "folder": str(artifact.folder),
        "precision": artifact.precision,
        "facts": dict(artifact.facts),
        "entries": {
            name: [entry.file, *([vars(tensor) for tensor in side] for side in (entry.inputs, entry.outputs))]
            for name, entry in artifact.entries.items()
        },
    }


def described(data: Mapping[str, Any]) -> Artifact:
    """The inverse of ``describe``, as a bundle's manifest gives artifacts back."""

    def tensor(fields: Mapping[str, Any]) -> Tensor:
        lists = {name: tuple(map(tuple, fields[name])) for name in ("pixels", "dynamic")}
        return Tensor(**{**fields, **lists, "shape": tuple(fields["shape"])})

    entries = {
        name: ArtifactEntry(file, tuple(map(tensor, inputs)), tuple(map(tensor, outputs)))
        for name, (file, inputs, outputs) in data["entries"].items()
    }
    return Artifact(Path(data["folder"]), data["precision"], entries, data["facts"])
