"""Reading and writing .tflite files: names, metadata, shared weights, and what is in the graph."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeattn.targets.base import Tensor

_FILE_IDENTIFIER = b"TFL3"

_DTYPES = {
    schema.TensorType.FLOAT32: "float32",
    schema.TensorType.FLOAT16: "float16",
    schema.TensorType.INT32: "int32",
    schema.TensorType.INT64: "int64",
    schema.TensorType.INT16: "int16",
    schema.TensorType.INT8: "int8",
    schema.TensorType.INT4: "int4",
    schema.TensorType.UINT8: "uint8",
    schema.TensorType.BOOL: "bool",
    schema.TensorType.FLOAT64: "float64",
}


@functools.cache
def _operator_names() -> dict[int, str]:
    return {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


def read(data: bytes) -> Any:
    """The model as the schema's object (``ModelT``), with all buffers in it.

    ai-edge-quantizer appends the large ones of a large file to the flatbuffer, and says where they are.
    """
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:  # 0 and 1 stand for none
            buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def write(model: Any) -> bytes:
    """The bytes of a ``ModelT``."""
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=_FILE_IDENTIFIER)
    return bytes(builder.Output())


def text(value: Any) -> str:
    """A name in the schema's object, which holds bytes, as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def operator_code(code: Any) -> int:
    """Number of a builtin operator; old files hold it in a field of one byte."""
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def operator_name(model: Any, operator: Any) -> str:
    """As in the schema, ``CONV_2D``; a custom operator's own name."""
    code = model.operatorCodes[operator.opcodeIndex]
    number = operator_code(code)
    return text(code.customCode) if number == schema.BuiltinOperator.CUSTOM else _operator_names().get(number, "?")


def code_of(model: Any, name: str, version: int) -> int:
    """Number of an operator in the model's list of those it uses, where it is added if it is new."""
    number = int(getattr(schema.BuiltinOperator, name))
    for index, code in enumerate(model.operatorCodes):
        if operator_code(code) == number and code.version == version:
            return index
    made = schema.OperatorCodeT()
    made.builtinCode, made.version = number, version
    made.deprecatedBuiltinCode = min(number, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    model.operatorCodes.append(made)
    return len(model.operatorCodes) - 1


def operator_versions(model: Any) -> dict[str, int]:
    """The highest version of each operator that the file uses."""
    versions: dict[str, int] = {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            name = operator_name(model, operator)
            version = int(model.operatorCodes[operator.opcodeIndex].version)
            versions[name] = max(versions.get(name, 0), version)
    return versions


def tensor_of(graph: Any, index: int, name: str, layout: str = "") -> Tensor:
    """A graph's input or output."""
    tensor = graph.tensors[index]
    shape = () if tensor.shape is None else tuple(int(n) for n in tensor.shape)
    return Tensor(name, shape, _DTYPES.get(tensor.type, f"type {tensor.type}"), layout)


def signature(model: Any, entry: str) -> Any:
    """The signature of that name. Raises KeyError."""
    for item in model.signatureDefs or ():
        if text(item.signatureKey) == entry:
            return item
    raise KeyError(entry)


def is_constant(model: Any, graph: Any, tensor: int) -> bool:
    """Whether the file holds the numbers of a tensor of this number."""
    data = model.buffers[graph.tensors[tensor].buffer].data
    return tensor >= 0 and data is not None and len(data) > 0


def digest(data: Any) -> bytes:
    """Of a constant's bytes, by which the same ones are found again."""
    return hashlib.sha256(bytes(data)).digest()


def largest(model: Any, tensor: Any) -> float:
    """The largest magnitude in a constant of float32."""
    return float(np.abs(np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32)).max())


def numbered(side: Sequence[Any]) -> dict[int, Any]:
    """A converted signature's inputs or outputs by their place: the converter calls them ``args_0``, ``output_0``."""
    return {int(text(one.name).rpartition("_")[2]): one for one in side}


def rename(model: Any, entry: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give a converted entry's inputs and outputs the recipe's names, in its signature and as tensors."""
    item = signature(model, entry)
    tensors = model.subgraphs[item.subgraphIndex].tensors
    for side, names in ((item.inputs, inputs), (item.outputs, outputs)):
        by_place = numbered(side)
        for place, name in enumerate(names):
            by_place[place].name = name.encode()
    # Outputs first: a tensor that is both keeps its input's name.
    for one in (*item.outputs, *item.inputs):
        tensors[one.tensorIndex].name = one.name


def distinct_names(model: Any) -> None:
    """Number the tensors of one name in a graph: tools that find tensors by name must find the right one."""
    for graph in model.subgraphs:
        outside = {*graph.inputs, *graph.outputs}
        seen = Counter(text(graph.tensors[i].name) for i in outside)
        for index, tensor in enumerate(graph.tensors):
            name = text(tensor.name)
            if index not in outside:
                seen[name] += 1
                if seen[name] > 1:
                    tensor.name = f"{name}#{seen[name]}".encode()


def share_weights(model: Any) -> int:
    """Let tensors with the same bytes share one buffer, also those of different entries.

    Returns:
        Bytes saved.
    """
    kept: dict[bytes, int] = {}
    moved: dict[int, int] = {}  # several tensors may have one buffer already
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is None or not len(data) or tensor.isVariable:
                continue
            if tensor.buffer not in moved:
                moved[tensor.buffer] = kept.setdefault(digest(data), tensor.buffer)
            tensor.buffer = moved[tensor.buffer]
    saved = 0
    for number, first in moved.items():
        if first != number:
            saved += len(model.buffers[number].data)
            model.buffers[number].data = None
    return saved


def add_metadata(model: Any, metadata: Mapping[str, str]) -> None:
    """Put texts into the file, each as ``edgeattn.KEY``; what stood there under that name is replaced."""
    wanted = {f"edgeattn.{key}": value for key, value in metadata.items()}
    model.metadata = [item for item in model.metadata or [] if text(item.name) not in wanted]
    for name, value in sorted(wanted.items()):
        buffer, item = schema.BufferT(), schema.MetadataT()
        buffer.data = list(value.encode())
        item.name, item.buffer = name.encode(), len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(item)


def metadata(model: Any) -> dict[str, str]:
    """EdgeAttn's texts inside of a file."""
    found = {}
    for item in model.metadata or ():
        name = text(item.name)
        if name.startswith("edgeattn."):
            found[name.removeprefix("edgeattn.")] = bytes(model.buffers[item.buffer].data).decode()
    return found


def facts(model: Any, entry: str, modules: Sequence[str]) -> dict[str, Any]:
    """What is worth knowing of an entry's graph: nodes by operator, transposes and the modules they serve.

    Args:
        modules: of every tensor.
    """
    graph = model.subgraphs[signature(model, entry).subgraphIndex]
    nodes = Counter(operator_name(model, operator) for operator in graph.operators)
    transposes = [
        {
            "module": modules[operator.outputs[0]],
            "shape": [int(n) for n in graph.tensors[operator.outputs[0]].shape],
            "of": "input" if operator.inputs[0] in graph.inputs else "output" if operator.outputs[0] in graph.outputs
            else "graph",
        }
        for operator in graph.operators
        if operator_name(model, operator) == "TRANSPOSE"
    ]  # fmt: skip
    return {"nodes": dict(nodes.most_common()), "transposes": transposes}


def weight_bytes(model: Any) -> int:
    """Bytes of all constant buffers."""
    return sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
