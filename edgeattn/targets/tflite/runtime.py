"""LiteRT on the CPU: outputs, and every tensor on the way to them."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.core.numerics import Array
from edgeattn.targets.base import Artifact, ArtifactEntry, Step, TraceValue, entry_of
from edgeattn.targets.feeds import check_feeds
from edgeattn.targets.tflite.litert import interpreter
from edgeattn.targets.tflite.steps import Steps


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
        found = entry_of(self._artifact, entry)
        check_feeds(found.inputs, feeds)
        try:
            outputs = self._interpreter(entry).get_signature_runner(entry)(**feeds)
        except (ValueError, RuntimeError) as error:
            raise CheckFailed("LiteRT cannot run the file", value=entry, why=str(error).splitlines()[0]) from error
        return {spec.name: np.array(outputs[spec.name]) for spec in found.outputs}

    def opened(self, entry: str) -> Steps:
        """A decoder's entry, whose cache can be written in place; see ``Steps``. ``run`` overwrites what is there.

        Raises:
            UsageError: unknown entry. CheckFailed: the runtime cannot load the file.
        """
        return Steps(self._interpreter(entry), entry)

    def _interpreter(self, entry: str) -> Any:
        """Of the entry's file."""
        path = self._path(entry)
        if path not in self._opened:
            self._opened[path] = interpreter(path)
        return self._opened[path]

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Every tensor of floats, or of integers that stand for some, in order, by LiteRT's own kernels.

        The interpreter keeps what is wanted beside what it needs; all of it if nothing in particular is.
        """
        from edgeattn.targets.tflite import flatbuffer
        from edgeattn.targets.tflite.floats import in_floats, unpack
        from edgeattn.targets.tflite.modules import modules

        path = self._path(entry)
        model = flatbuffer.read(path.read_bytes())
        index = flatbuffer.signature(model, entry).subgraphIndex
        graph, paths = model.subgraphs[index], modules(model, entry)
        made = [int(number) for operator in graph.operators for number in operator.outputs]
        looked = {n for n in made if wanted is None or flatbuffer.text(graph.tensors[n].name) in wanted}
        unpacked = bool(unpack(model))
        if wanted is not None:
            graph.outputs = [*graph.outputs, *sorted(looked.difference(graph.outputs))]
        source = flatbuffer.write(model) if unpacked or wanted is not None else path
        opened = interpreter(source, delegate=False, experimental_preserve_all_tensors=wanted is None)
        opened.get_signature_runner(entry)(**feeds)
        for operator in graph.operators:
            kind = flatbuffer.operator_name(model, operator)
            for number in (n for n in operator.outputs if n in looked):
                try:
                    value = np.array(opened.get_tensor(int(number), index))
                except ValueError:
                    continue  # kept in no buffer: what a kernel uses for itself
                value = in_floats(graph.tensors[number], value)
                if value.dtype.kind == "f":
                    name = flatbuffer.text(graph.tensors[number].name)
                    yield TraceValue(name, paths[number], kind, value)

    def steps(self, entry: str) -> list[Step]:
        """The operators of the signature's graph."""
        from edgeattn.targets.tflite import flatbuffer
        from edgeattn.targets.tflite.modules import modules, paths_in

        model = flatbuffer.read(self._path(entry).read_bytes())
        graph, paths = model.subgraphs[flatbuffer.signature(model, entry).subgraphIndex], modules(model, entry)
        computed = {int(n) for operator in graph.operators for n in operator.outputs} | set(map(int, graph.inputs))

        def names(numbers: Any) -> tuple[str, ...]:
            return tuple(flatbuffer.text(graph.tensors[n].name) for n in numbers if n in computed)

        found = []
        for operator in graph.operators:
            made, kind = names(operator.outputs), flatbuffer.operator_name(model, operator)
            if made:
                path = paths[operator.outputs[0]]
                fused = tuple(dict.fromkeys(other for other in paths_in(made[0]) if other != path))
                found.append(Step(made, names(operator.inputs), path, kind, fused))
        return found


def adopt(path: Path) -> Artifact:
    """A file as it is: its signatures are the entries. Its precision is the one that EdgeAttn noted in it, or "".

    Raises:
        UsageError: it is no .tflite file, or it has no signatures.
    """
    from edgeattn.targets.tflite import flatbuffer

    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise UsageError("the .tflite file cannot be read", value=path, why="it does not begin as such a file does")
    try:
        model = flatbuffer.read(data)
        entries = {}
        for item in model.signatureDefs or ():
            graph = model.subgraphs[item.subgraphIndex]
            sides = (
                tuple(flatbuffer.tensor_of(graph, one.tensorIndex, flatbuffer.text(one.name)) for one in side)
                for side in (item.inputs, item.outputs)
            )
            entries[flatbuffer.text(item.signatureKey)] = ArtifactEntry(path.name, *sides)
        precision = flatbuffer.metadata(model).get("precision", "")
    except (IndexError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise UsageError("the .tflite file is damaged", value=path, why=str(error), fix="copy it again") from error
    if not entries:
        raise UsageError("the .tflite file has no signatures", value=path, fix="convert it anew, with a signature")
    return Artifact(path.parent, precision, entries, {"adopted": True})
