"""Which operations of a flatbuffer XNNPACK takes, asked of LiteRT itself."""

from __future__ import annotations

from typing import Any

from edgeattn.core.errors import CheckFailed
from edgeattn.targets.tflite import flatbuffer
from edgeattn.targets.tflite.litert import interpreter
from edgeattn.targets.tflite.modules import modules


def falls_off(model: Any, entry: str, data: bytes) -> list[tuple[str, str]]:
    """(torch module, operator) of every operation that LiteRT keeps for its own kernels, in order.

    LiteRT lists a delegate's nodes with their inputs and outputs; what lies between those is the delegate's. Only the
    first graph of a file is delegated where it can be asked, so that other entries give nothing.
    """
    if flatbuffer.signature(model, entry).subgraphIndex != 0:
        return []
    try:
        opened = interpreter(data)
    except CheckFailed:
        return []  # verification says so, with its reason
    graph = model.subgraphs[0]
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
    paths = modules(model, entry)
    return [
        (paths[operator.outputs[0]], flatbuffer.operator_name(model, operator))
        for i, operator in enumerate(graph.operators)
        if i not in taken
    ]
