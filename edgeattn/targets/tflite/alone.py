"""Each operator of a graph in a program of its own: LiteRT's wheel has no profiler, so they are timed one by one."""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.base import Artifact, entry_of
from edgeattn.targets.tflite import flatbuffer, xnnpack
from edgeattn.targets.tflite.modules import modules
from edgeattn.targets.tflite.table import Table

#: They run other graphs, or keep something between runs.
_NOT_ALONE = (
    "WHILE",
    "IF",
    "CALL",
    "CALL_ONCE",
    "VAR_HANDLE",
    "READ_VARIABLE",
    "ASSIGN_VARIABLE",
    "STABLEHLO_COMPOSITE",
)
#: Units of LiteRT on a CPU.
DELEGATE, KERNELS = "xnnpack", "litert"


def alone(artifact: Artifact, entry: str) -> bytes:
    """A file with a signature for each operator that computes with data, called as ``Target.operations`` calls it.

    Inputs are ``x0``, ``x1``, ... and outputs ``y0``, ...; the constants are the artifact's, stored once.
    """
    model = flatbuffer.read((artifact.folder / entry_of(artifact, entry).file).read_bytes())
    graph = model.subgraphs[flatbuffer.signature(model, entry).subgraphIndex]
    table = Table(model, graph, modules(model, entry))
    graphs: list[Any] = []
    signatures: list[Any] = []
    for index, operator in enumerate(graph.operators):
        row = table.row(index, operator)
        if not row.inputs or flatbuffer.operator_name(model, operator) in _NOT_ALONE:
            continue
        signatures.append(_signature(row.name, len(graphs)))
        graphs.append(_graph(model, graph, operator, signatures[-1]))
    model.subgraphs, model.signatureDefs = graphs, signatures
    return flatbuffer.write(model)


def _signature(name: str, place: int) -> Any:
    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex, made.inputs, made.outputs = name.encode(), place, [], []
    return made


def _graph(model: Any, whole: Any, operator: Any, signature: Any) -> Any:
    """A graph of one operator with the tensors that it knows; fills in the signature's inputs and outputs."""
    given = [int(number) for number in operator.inputs]
    made = [int(number) for number in operator.outputs]
    # An operator may read a tensor twice.
    places = {number: place for place, number in enumerate(dict.fromkeys(n for n in (*given, *made) if n >= 0))}
    part, one = schema.SubGraphT(), schema.OperatorT()
    one.__dict__.update(operator.__dict__)
    one.inputs = [places[number] if number >= 0 else -1 for number in given]
    one.outputs = [places[number] for number in made]
    part.tensors, part.operators = [whole.tensors[number] for number in places], [one]
    part.outputs = list(one.outputs)
    part.inputs = [places[n] for n in dict.fromkeys(given) if n >= 0 and not flatbuffer.is_constant(model, whole, n)]
    for side, numbers, letter in ((signature.inputs, part.inputs, "x"), (signature.outputs, part.outputs, "y")):
        for count, number in enumerate(numbers):
            item = schema.TensorMapT()
            item.name, item.tensorIndex = f"{letter}{count}".encode(), number
            side.append(item)
    return part


def units(artifact: Artifact, entry: str) -> dict[str, str]:
    """Which of LiteRT's units takes each operator, by the name of ``Target.operations``."""
    data = (artifact.folder / entry_of(artifact, entry).file).read_bytes()
    model = flatbuffer.read(data)
    graph = model.subgraphs[flatbuffer.signature(model, entry).subgraphIndex]
    table = Table(model, graph, modules(model, entry))
    left = {id(operator) for operator in xnnpack._outside(model, entry, data)}
    return {
        table.row(index, operator).name: KERNELS if id(operator) in left else DELEGATE
        for index, operator in enumerate(graph.operators)
    }
