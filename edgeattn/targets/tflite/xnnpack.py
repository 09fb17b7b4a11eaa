"""Which operations of a flatbuffer XNNPACK takes, asked of LiteRT itself."""

from __future__ import annotations

from typing import Any

from ai_edge_litert import schema_py_generated as schema

from edgeattn.core.errors import CheckFailed, ConversionFailed
from edgeattn.targets.tflite import flatbuffer
from edgeattn.targets.tflite.litert import interpreter
from edgeattn.targets.tflite.modules import module_of_weights, modules


def _alone(model: Any, entry: str, data: bytes) -> bytes | None:
    """The file with that entry's graph alone, for all others would be packed as well; None if others refer to places.

    LiteRT tells what it does with a file's first graph.
    """
    place = flatbuffer.signature(model, entry).subgraphIndex
    if len(model.subgraphs) == 1:
        return data
    if len(model.subgraphs) != len(model.signatureDefs):
        return data if place == 0 else None
    alone = flatbuffer.read(data)
    alone.subgraphs = [alone.subgraphs[place]]
    alone.signatureDefs = [item for item in alone.signatureDefs if item.subgraphIndex == place]
    for item in alone.signatureDefs:
        item.subgraphIndex = 0
    return flatbuffer.write(alone)


def _outside(model: Any, entry: str, data: bytes) -> list[Any]:
    """The schema's objects of all operations that LiteRT keeps for its own kernels, in order.

    LiteRT lists a delegate's nodes with their inputs and outputs; what lies between those is the delegate's.
    """
    asked = _alone(model, entry, data)
    if asked is None:
        return []
    try:
        opened = interpreter(asked)
    except CheckFailed:
        return []  # verification says so, with its reason
    graph = model.subgraphs[flatbuffer.signature(model, entry).subgraphIndex]
    maker = {int(tensor): i for i, operator in enumerate(graph.operators) for tensor in operator.outputs}
    taken: set[int] = set()
    for node in opened._get_ops_details():
        if node["op_name"] != "DELEGATE":
            continue
        border = {int(t) for t in node["inputs"]}
        waiting = [int(t) for t in node["outputs"]]
        while waiting:
            made_by = maker.get(waiting.pop())
            if made_by is not None and made_by not in taken:
                taken.add(made_by)
                waiting += [int(t) for t in graph.operators[made_by].inputs if int(t) not in border]
    return [operator for i, operator in enumerate(graph.operators) if i not in taken]


def falls_off(model: Any, entry: str, data: bytes) -> list[tuple[str, str]]:
    """(torch module, operator) of every operation that LiteRT keeps for its own kernels, in order."""
    paths = modules(model, entry)
    return [
        (paths[operator.outputs[0]], flatbuffer.operator_name(model, operator))
        for operator in _outside(model, entry, data)
    ]


def check_blocks(model: Any, entry: str, data: bytes) -> None:
    """Whether XNNPACK multiplies all weights that have scales for blocks; LiteRT's own kernel ignores those scales.

    That of EMBEDDING_LOOKUP, which multiplies nothing, knows them.

    Raises:
        ConversionFailed: names the modules of those that it leaves.
    """

    def blocks(tensor: Any) -> bool:
        return tensor.quantization is not None and isinstance(
            tensor.quantization.details, schema.BlockwiseQuantizationT
        )

    graph, paths = model.subgraphs[flatbuffer.signature(model, entry).subgraphIndex], modules(model, entry)
    if not any(map(blocks, graph.tensors)):
        return
    wrong = {
        module_of_weights(graph, operator, paths[operator.outputs[0]])
        for operator in _outside(model, entry, data)
        if flatbuffer.operator_name(model, operator) != "EMBEDDING_LOOKUP"
        and any(index >= 0 and blocks(graph.tensors[index]) for index in operator.inputs)
    }
    if wrong:
        raise ConversionFailed(
            "LiteRT would compute int4 weights wrong",
            value=f"{len(wrong)} modules",
            where=f"module {min(wrong)}",
            why="XNNPACK does not take them, and LiteRT's own kernel ignores the scales of their blocks",
            fix='keep them in int8: [[quant.keep]] modules = [...], at = "w8"',
            details=sorted(wrong),
        )
