"""A ``Program``: what targets lower, one exported graph for each entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: (min, opt, max) of dimensions that may vary, or (min, opt, max, step), by input and axis.
Dynamic = Mapping[str, Mapping[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Entry:
    """One named graph of a program.

    Attributes:
        graph: the exported program; it returns a flat tuple of tensors.
        inputs, outputs: names, in the order of the graph.
        dynamic: (min, opt, max), or with a step, of the inputs' dimensions that may vary, by input and axis.
    """

    graph: torch.export.ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Dynamic = field(default_factory=dict)


@dataclass(frozen=True)
class Caches:
    """What a decoder's entries take for what came before: inputs (1, P, width), new rows as outputs ``new_NAME``.

    Attributes:
        context: rows of a whole cache. rows: name and width of every tensor.
        config: the model's own configuration, for formats that hold weights by name instead of graphs.
    """

    context: int
    rows: tuple[tuple[str, int], ...]
    config: Any = None


@dataclass(frozen=True)
class Program:
    """What targets lower: the entries of a model by name (``main``; ``prefill_128``, ``decode``).

    Attributes:
        decoder: of a language model that is exported with a cache. Entries may be one and the same graph then.
    """

    entries: Mapping[str, Entry]
    decoder: Caches | None = None

    def save(self, folder: Path) -> dict[str, Any]:
        """Write ``ENTRY.pt2`` files into ``folder``; the returned plain data is what ``load`` needs beside them."""
        for name, entry in self.entries.items():
            torch.export.save(entry.graph, folder / f"{name}.pt2")
        names: dict[str, Any] = {}
        for name, entry in self.entries.items():
            names[name] = {"inputs": list(entry.inputs), "outputs": list(entry.outputs)}
            if entry.dynamic:  # JSON has no numbers as keys
                ranges = {i: [[axis, *ends] for axis, ends in axes.items()] for i, axes in entry.dynamic.items()}
                names[name]["dynamic"] = ranges
        return names

    @staticmethod
    def load(folder: Path, names: Mapping[str, Mapping[str, Any]]) -> Program:
        """Read what ``save`` wrote."""
        return Program(
            {
                name: Entry(
                    torch.export.load(folder / f"{name}.pt2"),
                    tuple(n["inputs"]),
                    tuple(n["outputs"]),
                    {i: {axis: tuple(ends) for axis, *ends in axes} for i, axes in n.get("dynamic", {}).items()},
                )
                for name, n in names.items()
            }
        )
