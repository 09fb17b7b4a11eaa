"""ONNX Runtime on the CPU: outputs, and every tensor on the way to them."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.base import Artifact, Step, TraceValue, entry_of
from edgeattn.targets.feeds import check_feeds
from edgeattn.targets.onnx_graph import files

#: At most this many bytes of intermediate tensors are held by one traced run; more are fetched in several runs.
TRACE_BYTES = 512_000_000

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def make_session(source: str | bytes, optimized: bool = True, unpacked: bool = False) -> ort.InferenceSession:
    """A session on the CPU; with ``unpacked`` small weights become floats once, as it is made."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if unpacked:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception types are private
        raise CheckFailed("ONNX Runtime cannot load the graph", why=str(error).splitlines()[0]) from error


def module_of(node: ir.Node) -> str:
    """Path of the torch module that the exporter recorded for a node; "" outside of any child."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) >= 2 else ""


def _session_of(model: ir.Model) -> ort.InferenceSession:
    """An unoptimized session of a model in memory; over a file where it is too large for one message."""
    if files.weight_bytes(model) <= files.EXTERNAL_BYTES:
        return make_session(ir.serde.serialize_model(model).SerializeToString(), optimized=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        files.save(model, path)
        return make_session(str(path), optimized=False)


def _round_all(model: ir.Model) -> None:
    """Have every float16 tensor read through two Identity operations.

    The CPU provider computes most operations in float32 and drops the pair of casts between two of them, also where
    the tensor is an output. Two float16 operations in a row keep them apart; a single one it would compute in float32.
    """
    for node in list(model.graph):
        for value in node.outputs:
            uses = tuple(value.uses()) if value.dtype == ir.DataType.FLOAT16 else ()
            if uses:
                last, stored = node, value
                for i in range(2):
                    copy = ir.node("Identity", [stored], name=f"{value.name}_stored_{i}")
                    model.graph.insert_after(last, copy)
                    last, stored = copy, copy.outputs[0]
                    stored.name, stored.type = f"{value.name}_stored_{i}", value.type
                for use in uses:
                    use.node.replace_input_with(use.idx, stored)


class Tracer:
    """Runs a graph with graph optimizations off and every float tensor an output, in pieces of ``TRACE_BYTES``.

    A float16 graph is computed with every tensor rounded to float16.

    Args:
        model: in memory; its graph outputs are restored before returning, a float16 graph is copied.
        wanted: names of the only tensors to look at; all if None. Inputs can be among them.
    """

    def __init__(self, model: ir.Model, wanted: Collection[str] | None = None) -> None:
        self._inputs = [str(v.name) for v in model.graph.inputs if wanted is not None and v.name in wanted]
        if any(value.dtype == ir.DataType.FLOAT16 for node in model.graph for value in node.outputs):
            model = model.clone()
            _round_all(model)
        self._model = model
        producers = [
            (value, node)
            for node in model.graph
            for value in node.outputs
            if value.name and value.dtype in _FLOATS and value.shape is not None  # what _round_all adds has no shape
            if wanted is None or value.name in wanted
        ]
        self._pieces: list[list[tuple[ir.Value, ir.Node]]] = [[]]
        held = 0
        for value, node in producers:
            size = 4 * int(np.prod([n if isinstance(n, int) else 1 for n in value.shape or ()]))
            if held + size > TRACE_BYTES and self._pieces[-1]:
                self._pieces.append([])
                held = 0
            self._pieces[-1].append((value, node))
            held += size

    def over(self, samples: Iterable[Mapping[str, Array]]) -> Iterator[TraceValue]:
        """The tensors of every sample; a piece of the graph meets all of them before the next piece does.

        Args:
            samples: feeds by input name, gone through once for each piece.
        """
        if self._inputs:
            for feeds in samples:
                yield from (TraceValue(name, "", "input", feeds[name]) for name in self._inputs)
        original = list(self._model.graph.outputs)
        for piece in filter(None, self._pieces):
            extra = [value for value, _ in piece if not any(value is output for output in original)]
            self._model.graph.outputs[:] = [*original, *extra]
            try:
                session = _session_of(self._model)
            finally:
                self._model.graph.outputs[:] = original
            names = [str(value.name) for value, _ in piece]
            places = [(name, module_of(node), node.op_type) for name, (_, node) in zip(names, piece, strict=True)]
            for feeds in samples:
                arrays = session.run(names, dict(feeds))
                for place, array in zip(places, arrays, strict=True):
                    yield TraceValue(*place, array)


def trace_model(model: ir.Model, feeds: Mapping[str, Array]) -> Iterator[TraceValue]:
    """Every float tensor of a graph on its way from ``feeds``, see ``Tracer``."""
    return Tracer(model).over([feeds])


def outputs_of(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of a graph in memory by name, with graph optimizations off."""
    names = [str(value.name) for value in model.graph.outputs]
    return dict(zip(names, _session_of(model).run(names, dict(feeds)), strict=True))


def graph_steps(graph: ir.Graph) -> list[Step]:
    """The nodes of a graph."""
    return [
        Step(
            tuple(str(v.name) for v in node.outputs if v.name),
            tuple(str(v.name) for v in node.inputs if v is not None and v.name not in graph.initializers),
            module_of(node),
            node.op_type,
        )
        for node in graph
    ]


class OnnxRuntime:
    """An artifact's entries under ONNX Runtime; sessions are made when first needed.

    Args:
        optimized: with ONNX Runtime's own optimizations; without them every node computes what the graph says.
    """

    def __init__(self, artifact: Artifact, optimized: bool = True) -> None:
        self._artifact = artifact
        self._optimized = optimized
        self._sessions: dict[str, ort.InferenceSession] = {}

    def _path(self, entry: str) -> str:
        return str(self._artifact.folder / entry_of(self._artifact, entry).file)

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name, as ONNX Runtime computes them.

        Raises:
            UsageError: unknown entry, or feeds whose names, shapes or dtypes differ from the entry's.
        """
        check_feeds(entry_of(self._artifact, entry).inputs, feeds)
        return self.opened(entry)(feeds)

    def opened(self, entry: str) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """An entry to be called again and again: its session is made now, feeds are not compared with its inputs."""
        path = self._path(entry)
        if path not in self._sessions:  # entries of one file share the session, and what it has packed
            # Else weights that only are stored small would be unpacked again at every run.
            unpacked = self._artifact.precision in ("w8", "w4")
            self._sessions[path] = make_session(path, self._optimized, unpacked)
        session = self._sessions[path]
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Every float tensor of the graph, in order; see ``Tracer``."""
        return Tracer(ir.load(self._path(entry)), wanted).over([feeds])

    def steps(self, entry: str) -> list[Step]:
        """The nodes of the graph."""
        return graph_steps(ir.load(self._path(entry)).graph)
