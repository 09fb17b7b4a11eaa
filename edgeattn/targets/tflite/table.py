"""What every operator of a .tflite file computes and moves."""

from __future__ import annotations

import math
import struct
from typing import Any

from edgeattn.core.errors import UsageError
from edgeattn.targets.base import Artifact, OpCost, entry_of
from edgeattn.targets.tflite import flatbuffer
from edgeattn.targets.tflite.modules import module_of_weights, modules

#: They give what they are given, in another shape.
VIEWS = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS", "SHAPE", "RANK")
#: They read as much of a tensor, the one at this place, as they give.
_TAKES = {"GATHER": 0, "GATHER_ND": 0, "SLICE": 0, "STRIDED_SLICE": 0, "EMBEDDING_LOOKUP": 1}
#: Bits of an element, by the name of its type; 32 of all others.
_BITS = {
    **dict.fromkeys(("INT2",), 2),
    **dict.fromkeys(("INT4", "UINT4"), 4),
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "FLOAT8_E4M3FN", "FLOAT8_E5M2"), 8),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT64", "UINT64", "FLOAT64", "COMPLEX64"), 64),
    **dict.fromkeys(("STRING", "RESOURCE", "VARIANT"), 0),
}
_INTEGERS = ("INT8", "UINT8", "INT4", "UINT4", "INT2")


def operations(artifact: Artifact, entry: str) -> list[OpCost]:
    """The operators of a signature's graph, see ``Target.operations``; called ``[TENSORS]:INDEX`` as LiteRT does.

    Float data that meet weights of 8 or 4 bits are rounded as they come (``w8a8``). Operators that compute with
    constants alone cost nothing: the runtime computes them once.

    Raises:
        UsageError: unknown entry, or a file that cannot be read.
    """
    path = artifact.folder / entry_of(artifact, entry).file
    try:
        model = flatbuffer.read(path.read_bytes())
        graph = model.subgraphs[flatbuffer.signature(model, entry).subgraphIndex]
        table = Table(model, graph, modules(model, entry))
        return [table.row(index, operator) for index, operator in enumerate(graph.operators)]
    except OSError as error:
        raise UsageError("the .tflite file cannot be read", value=path, why=error.strerror or str(error)) from error
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise UsageError("the .tflite file is damaged", value=path, why=str(error), fix="copy it again") from error


class Table:
    """Rows for the operators of one graph, to be asked for in order.

    Args:
        paths: of the torch module that each tensor came from.
    """

    def __init__(self, model: Any, graph: Any, paths: list[str]) -> None:
        self._model, self._graph, self._paths = model, graph, paths
        self._types = _type_names()
        #: Bytes in the file, of constants and of what is computed of constants alone.
        self._stored: dict[int, int] = {
            number: self._bytes(number)
            for number in range(len(graph.tensors))
            if flatbuffer.is_constant(model, graph, number)
        }

    def _name(self, number: int) -> str:
        return flatbuffer.text(self._graph.tensors[number].name)

    def _shape(self, number: int) -> tuple[int, ...]:
        shape = self._graph.tensors[number].shape
        return () if shape is None else tuple(int(n) for n in shape)

    def _type(self, number: int) -> str:
        return self._types.get(self._graph.tensors[number].type, "?")

    def _bytes(self, number: int) -> int:
        return math.ceil(math.prod(self._shape(number)) * _BITS.get(self._type(number), 32) / 8)

    def row(self, index: int, operator: Any) -> OpCost:
        """What an operator costs."""
        kind = flatbuffer.operator_name(self._model, operator)
        places = [int(number) for number in (operator.inputs if operator.inputs is not None else ())]
        given = list(dict.fromkeys(number for number in places if number >= 0))
        made = [int(number) for number in (operator.outputs if operator.outputs is not None else ())]
        data = [number for number in given if number not in self._stored]
        name = f"[{', '.join(map(self._name, made))}]:{index}"
        rest = (tuple(map(self._name, data)), tuple(map(self._name, made)))
        module, dtype = self._paths[made[0]] if made else "", self._dtype(kind, places, made)
        operands = _operands(kind, places)
        if operands and operands[1] in self._stored:
            module = module_of_weights(self._graph, operator, module)  # and not of what was fused with it
        weights = sum(self._stored[number] for number in given if number in self._stored)
        if given and not data:  # known before anything runs
            self._stored.update(dict.fromkeys(made, weights))
            return OpCost(name, module, kind, 0, 0, 0, 0, dtype, 0, 0, 1, *rest)
        if kind in VIEWS:
            return OpCost(name, module, kind, 0, 0, 0, 0, dtype, 0, 0, 1, *rest)
        read, written = sum(map(self._bytes, data)), sum(map(self._bytes, made))
        if kind in _TAKES:
            source, elements = places[_TAKES[kind]], math.prod(self._shape(made[0]))
            whole = self._stored.get(source, self._bytes(source))
            taken = math.ceil(whole * min(1.0, elements / max(math.prod(self._shape(source)), 1)))
            read, weights = (0, taken) if source in self._stored else (taken, 0)
        counts = self._macs(kind, operator, places, made)
        return OpCost(name, module, kind, counts[0], read, weights, written, dtype, *counts[1:], *rest)

    def _dtype(self, kind: str, places: list[int], made: list[int]) -> str:
        """See ``OpCost.dtype``."""
        operands = [self._type(number) for number in _operands(kind, places)]
        if len(operands) > 1 and operands[1] in _INTEGERS:
            # DEPTHWISE_CONV_2D has no kernel that rounds its data.
            return "w8a8" if operands[0] in _INTEGERS or kind != "DEPTHWISE_CONV_2D" else "fp32"
        types = [self._type(number) for number in (*made, *(n for n in places if n >= 0))]
        scaled = [self._graph.tensors[n].quantization for n in made]
        if types and types[0] in _INTEGERS and any(q is not None and q.scale is not None for q in scaled):
            return "w8a8"
        floats = {"FLOAT32": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
        return next((floats[one] for one in types if one in floats), "int" if types else "fp32")

    def _macs(self, kind: str, operator: Any, places: list[int], made: list[int]) -> tuple[int, int, int, int]:
        """``macs``, ``channels``, ``fan`` and ``taps``, see ``OpCost``; layouts are the schema's.

        Weights of CONV_2D are (Co, h, w, Ci / groups), of DEPTHWISE_CONV_2D (1, h, w, Co), of TRANSPOSE_CONV
        (Co, h, w, Ci), of CONV_3D (d, h, w, Ci, Co), of FULLY_CONNECTED (Co, Ci).
        """
        operands = _operands(kind, places)
        if len(operands) < 2 or not made:
            return 0, 0, 0, 1
        data, weight = (self._shape(number) for number in operands)
        out = math.prod(self._shape(made[0]))
        groups = max(data[-1] // max(weight[-1], 1), 1) if data else 1
        if kind == "CONV_2D":
            return out * math.prod(weight[1:]), weight[-1], weight[0] // groups, math.prod(weight[1:-1])
        if kind == "FULLY_CONNECTED":
            return out * math.prod(weight[1:]), weight[-1], weight[0], 1
        if kind == "DEPTHWISE_CONV_2D":
            return out * math.prod(weight[1:3]), 1, weight[-1] // max(data[-1], 1), math.prod(weight[1:3])
        if kind == "TRANSPOSE_CONV":
            return math.prod(data) * math.prod(weight[:3]), weight[-1], weight[0], math.prod(weight[1:3])
        if kind == "CONV_3D":
            return out * math.prod(weight[:4]), weight[3], weight[4], math.prod(weight[:3])
        options = operator.builtinOptions
        inner = data[-2 if options is not None and options.adjX else -1]
        return out * inner, inner, self._shape(made[0])[-1], 1


def _operands(kind: str, places: list[int]) -> tuple[int, ...]:
    """Numbers of the data and the weights; of operators that multiply nothing none."""
    if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_3D", "FULLY_CONNECTED", "BATCH_MATMUL"):
        return places[0], places[1]
    return (places[2], places[1]) if kind == "TRANSPOSE_CONV" else ()


def _type_names() -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    return {number: name for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
