"""LiteRT on the CPU: outputs, and every tensor on the way to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.base import Artifact, TraceValue, check_feeds, entry_of
from edgeattn.targets.tflite.litert import interpreter


class LiteRuntime:
    """An artifact's signatures under LiteRT; the interpreter is made when first needed."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._opened: dict[Path, Any] = {}

    def _path(self, entry: str) -> Path:
        return self._artifact.folder / entry_of(self._artifact, entry).file

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            UsageError: unknown entry, or feeds whose names, shapes or dtypes differ from the entry's.
            CheckFailed: the runtime cannot load or run the file.
        """
        path, found = self._path(entry), entry_of(self._artifact, entry)
        check_feeds(found.inputs, feeds)
        if path not in self._opened:
            self._opened[path] = interpreter(path)
        try:
            outputs = self._opened[path].get_signature_runner(entry)(**feeds)
        except (ValueError, RuntimeError) as error:
            raise CheckFailed("LiteRT cannot run the file", value=entry, why=str(error).splitlines()[0]) from error
        return {spec.name: np.array(outputs[spec.name]) for spec in found.outputs}

    def trace(self, entry: str, feeds: Mapping[str, Array]) -> Iterator[TraceValue]:
        """Every float tensor of the graph, in order, by LiteRT's own kernels without a delegate."""
        from edgeattn.targets.tflite import flatbuffer
        from edgeattn.targets.tflite.modules import modules

        path = self._path(entry)
        model = flatbuffer.read(path.read_bytes())
        index = flatbuffer.signature(model, entry).subgraphIndex
        opened = interpreter(path, delegate=False, experimental_preserve_all_tensors=True)
        opened.get_signature_runner(entry)(**feeds)
        graph, paths = model.subgraphs[index], modules(model, entry)
        for operator in graph.operators:
            kind = flatbuffer.operator_name(model, operator)
            for number in operator.outputs:
                try:
                    value = np.array(opened.get_tensor(int(number), index))
                except ValueError:
                    continue  # kept in no buffer: what a kernel uses for itself
                if value.dtype.kind == "f":
                    name = flatbuffer.text(graph.tensors[number].name)
                    yield TraceValue(name, paths[number], kind, value)
