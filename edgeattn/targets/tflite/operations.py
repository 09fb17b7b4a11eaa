"""The operations of a .tflite file that have weights, and how each of them is to be stored and computed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeattn.quant.plan import QuantPlan, Scheme
from edgeattn.targets.tflite import TFLITE_RUNTIME, flatbuffer
from edgeattn.targets.tflite.fp16 import FEW
from edgeattn.targets.tflite.modules import module_of_weights, modules

#: Operators whose second input may be weights.
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL", "EMBEDDING_LOOKUP")
#: Those that have kernels for data in int8 whose range is known beforehand.
STATIC = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
#: The shortest block of int4 weights that XNNPACK takes; others have to be multiples of it.
LEAST_BLOCK = 32

#: Scales of blocks are float16: below this they lose digits, and then are 0, with which LiteRT loads no file.
LEAST_SCALE = 2.0**-14

#: What data are: as they were; rounded for a range that was measured; rounded for their own range in every run.
FLOAT, MEASURED, OWN = "float", "int8", "int8 as it runs"


@dataclass(frozen=True)
class How:
    """How an operation's weights and data are stored.

    Attributes:
        bits: of the weights. data: one of ``FLOAT``, ``MEASURED``, ``OWN``.
        block: weights along the input channels that share a scale; 0 where all of an output channel do.
        one_scale: all weights share one.
    """

    bits: int
    data: str
    block: int = 0
    one_scale: bool = False

    @property
    def weights(self) -> str:
        """In words."""
        return f"int{self.bits}" + (f" in blocks of {self.block}" if self.block else "")


@dataclass(frozen=True)
class Operation:
    """An operation with constant weights.

    Attributes:
        graph, output: numbers of its subgraph and of the tensor that it makes. data: of the tensor it multiplies.
        kind: as in the schema. module: path of the torch module that the weights belong to.
        scheme: of that module. how: None where it stays as it is.
    """

    graph: int
    output: int
    data: int
    kind: str
    name: str
    module: str
    scheme: Scheme
    how: How | None

    def fact(self) -> dict[str, str]:
        """For an artifact's facts."""
        assert self.how is not None
        return {
            "node": self.name,
            "op": self.kind,
            "module": self.module,
            "weights": self.how.weights,
            "data": self.how.data,
        }


def _eight(kind: str, runtime: str) -> How | None:
    """int8 weights for data in floats.

    LiteRT 2.3.0 computes all right with one scale a channel; XNNPACK takes all but DEPTHWISE_CONV_2D, whose weights it
    gets unpacked instead. Measured of tflite-runtime 2.14.0, relative L2 of one layer, data rounded as it runs:

    =================== ============= ============
    operator            one a channel one a tensor
    =================== ============= ============
    FULLY_CONNECTED     0.997, wrong  0.009
    BATCH_MATMUL        1.0, wrong    0.012
    EMBEDDING_LOOKUP    1.0, wrong    0.009
    CONV_2D             0.007         0.010, with groups 0.92
    DEPTHWISE_CONV_2D   0.008         not finite
    TRANSPOSE_CONV      not loaded    not loaded
    =================== ============= ============
    """
    if runtime == TFLITE_RUNTIME:
        if kind == "TRANSPOSE_CONV":
            return None
        return How(8, OWN, one_scale=kind in ("FULLY_CONNECTED", "BATCH_MATMUL", "EMBEDDING_LOOKUP"))
    return How(8, FLOAT if kind == "DEPTHWISE_CONV_2D" else OWN)


def _block(channels: int, group: int) -> int:
    """The largest block not above ``group`` that the kernel takes and that divides the channels; 0 if none does."""
    while group >= LEAST_BLOCK and channels % group:
        group //= 2
    return group if group >= LEAST_BLOCK else 0


def _how(
    kind: str, weights: tuple[int, ...], scheme: Scheme, runtime: str, at_the_end: bool, largest: float
) -> How | None:
    """See ``Operation.how``.

    int4 weights are FULLY_CONNECTED's alone, which 1x1 convolutions become, and those of EMBEDDING_LOOKUP, whose own
    kernel reads blocks right; others are int8. Measured of LiteRT 2.3.0 on ``fmvit-digits``, x86-64, a thread:

    =================================================== ========= =============== ============
    int4 weights of                                     XNNPACK   without it      ms, fp32 = 1
    =================================================== ========= =============== ============
    FULLY_CONNECTED and 1x1, blocks                     takes it  wrong, silently 1.3
    FULLY_CONNECTED and 1x1, one scale a channel        takes it  right           1.0
    CONV_2D, one scale a channel                        leaves it right           3.0
    all, DEQUANTIZE in front, one a channel or a tensor leaves it right           3.7
    all, DEQUANTIZE of blocks as rows, and RESHAPE      leaves it right           4.2
    =================================================== ========= =============== ============

    Args:
        weights: their shape. at_the_end: its output is one of the graph's, which would be rounded to 256 levels.
        largest: magnitude of the weights.
    """
    if scheme.floats or (scheme.data == 32 and np.prod(weights) < FEW):
        return None
    if scheme.data == 8 and kind in STATIC and not at_the_end:
        return How(8, MEASURED)
    if scheme.weights == 4 and (kind == "FULLY_CONNECTED" or (kind == "EMBEDDING_LOOKUP" and len(weights) == 2)):
        block = _block(weights[-1], scheme.group)
        if not block or largest / 7 >= LEAST_SCALE:
            return How(4, OWN, block)
    return _eight(kind, runtime)


def operations(model: Any, plan: QuantPlan, runtime: str, tables: Collection[bytes] = ()) -> list[Operation]:
    """All in a float32 model whose second input is constant and holds weights, in order.

    Args:
        runtime: that the file is made for. tables: see ``computed_tables``.
    """
    found = []
    for item in model.signatureDefs:
        graph = model.subgraphs[item.subgraphIndex]
        paths = modules(model, flatbuffer.text(item.signatureKey))
        for operator in graph.operators:
            kind = flatbuffer.operator_name(model, operator)
            if kind not in WEIGHTED or not flatbuffer.is_constant(model, graph, operator.inputs[1]):
                continue
            stored = graph.tensors[operator.inputs[1]].buffer
            if kind == "EMBEDDING_LOOKUP" and tables and flatbuffer.digest(model.buffers[stored].data) in tables:
                continue
            output = int(operator.outputs[0])
            module = module_of_weights(graph, operator, paths[output])
            shape = tuple(int(n) for n in graph.tensors[operator.inputs[1]].shape)
            scheme = plan.scheme(module)
            largest = flatbuffer.largest(model, graph.tensors[operator.inputs[1]]) if scheme.weights == 4 else 0.0
            how = _how(kind, shape, scheme, runtime, output in graph.outputs, largest)
            name = flatbuffer.text(graph.tensors[output].name)
            data = int(operator.inputs[2 if kind == "TRANSPOSE_CONV" else 0])
            found.append(Operation(item.subgraphIndex, output, data, kind, name, module, scheme, how))
    return found
