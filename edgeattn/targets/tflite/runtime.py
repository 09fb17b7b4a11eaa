"""LiteRT on the CPU: outputs, and every tensor on the way to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.base import Artifact, TraceValue, check_feeds, entry_of


def _interpreter_class() -> Any:
    """LiteRT's, or that of tflite-runtime where it alone is installed."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tflite_runtime.interpreter import Interpreter
    return Interpreter


class LiteRuntime:
    """An artifact's signatures under LiteRT; the interpreter is made when first needed."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._interpreters: dict[str, Any] = {}

    def _open(self, entry: str, **options: Any) -> Any:
        path = str(self._artifact.folder / entry_of(self._artifact, entry).file)
        try:
            interpreter = _interpreter_class()(
                model_path=path, num_threads=max(1, (os.cpu_count() or 1) // 2), **options
            )
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise CheckFailed("LiteRT cannot load the file", where=path, why=str(error).splitlines()[0]) from error
        return interpreter

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            UsageError: unknown entry, or feeds whose names, shapes or dtypes differ from the entry's.
            CheckFailed: the runtime cannot load or run the file.
        """
        found = entry_of(self._artifact, entry)
        check_feeds(found.inputs, feeds)
        if found.file not in self._interpreters:
            self._interpreters[found.file] = self._open(entry)
        try:
            outputs = self._interpreters[found.file].get_signature_runner(entry)(**feeds)
        except (ValueError, RuntimeError) as error:
            raise CheckFailed("LiteRT cannot run the file", value=entry, why=str(error).splitlines()[0]) from error
        return {spec.name: np.array(outputs[spec.name]) for spec in found.outputs}

    def trace(self, entry: str, feeds: Mapping[str, Array]) -> Iterator[TraceValue]:
        """Every float tensor of the graph, in order, by LiteRT's own kernels without a delegate."""
        from ai_edge_litert.interpreter import OpResolverType

        from edgeattn.targets.tflite import flatbuffer

        found = entry_of(self._artifact, entry)
        model = flatbuffer.read((self._artifact.folder / found.file).read_bytes())
        index = flatbuffer.signature(model, entry).subgraphIndex
        interpreter = self._open(
            entry,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        interpreter.get_signature_runner(entry)(**feeds)
        graph = model.subgraphs[index]
        for operator in graph.operators:
            kind = flatbuffer.operator_name(model, operator)
            for number in operator.outputs:
                try:
                    value = np.array(interpreter.get_tensor(int(number), index))
                except ValueError:
                    continue  # kept in no buffer: what a kernel uses for itself
                if value.dtype.kind == "f":
                    name = flatbuffer.text(graph.tensors[number].name)
                    yield TraceValue(name, flatbuffer.module_of(name), kind, value)
