"""Damage to an artifact's own file, at a module: as a converter with a bug would have written it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.numerics import Array

Change = Callable[[Array], Array]


def onnx(path: Path, module: str, op: str, change: Change | dict[str, Any], place: int = 0) -> None:
    """Change a node's constant (the one of that place among its constants), or its attributes."""
    import onnx_ir as ir

    from edgeattn.targets.onnx_graph.execute import module_of

    model = ir.load(path)
    node = next(n for n in model.graph if module_of(n) == module and n.op_type == op)
    if isinstance(change, dict):
        for name, value in change.items():
            kind = {int: ir.AttrInt64, float: ir.AttrFloat32, list: ir.AttrInt64s, str: ir.AttrString}[type(value)]
            node.attributes[name] = kind(name, value)
    else:
        value = [v for v in node.inputs if v is not None and v.const_value is not None][place]
        value.const_value = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy())), name=value.name)
    ir.save(model, path)


def tflite(path: Path, module: str, op: str, change: Change | Callable[[Any], None], place: int = 0) -> None:
    """Change a constant of the operator that has ``module`` among the modules in its tensor's name."""
    from edgeattn.targets.tflite import flatbuffer
    from edgeattn.targets.tflite.modules import paths_in

    types = {0: np.float32, 1: np.float16, 2: np.int32, 4: np.int64, 9: np.int8}
    model = flatbuffer.read(path.read_bytes())
    graph = model.subgraphs[0]
    operator = next(
        o
        for o in graph.operators
        if flatbuffer.operator_name(model, o) == op
        and module in paths_in(flatbuffer.text(graph.tensors[o.outputs[0]].name))
    )
    constants = [n for n, i in enumerate(operator.inputs) if i >= 0 and flatbuffer.is_constant(model, graph, i)]
    tensor = copy.copy(graph.tensors[operator.inputs[constants[place]]])
    operator.inputs = list(operator.inputs)
    operator.inputs[constants[place]] = len(graph.tensors)  # one of its own: operators share constants
    graph.tensors.append(tensor)
    value = np.frombuffer(bytes(model.buffers[tensor.buffer].data), types[tensor.type]).reshape(tensor.shape)
    made = np.ascontiguousarray(change(value.copy()), value.dtype)
    buffer = type(model.buffers[0])()
    buffer.data = np.frombuffer(made.tobytes(), np.uint8)
    tensor.buffer = len(model.buffers)
    model.buffers.append(buffer)
    path.write_bytes(flatbuffer.write(model))


def tflite_scale(path: Path, module: str, op: str, factor: float) -> None:
    """Change the scale of what an operator gives, as a bad calibration does."""
    from edgeattn.targets.tflite import flatbuffer
    from edgeattn.targets.tflite.modules import paths_in

    model = flatbuffer.read(path.read_bytes())
    graph = model.subgraphs[0]
    for operator in graph.operators:
        tensor = graph.tensors[operator.outputs[0]]
        if flatbuffer.operator_name(model, operator) == op and module in paths_in(flatbuffer.text(tensor.name)):
            tensor.quantization.scale = [s * factor for s in tensor.quantization.scale]
            path.write_bytes(flatbuffer.write(model))
            return
    raise KeyError(module)


def coreml(path: Path, module: str, op: str, parameter: str, change: Change) -> None:
    """Change the constant that an operation of a module is given as ``parameter``, in the model or in its weights."""
    from coremltools.proto import Model_pb2

    manifest = json.loads((path / "Manifest.json").read_text())
    file = path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    held = json.loads(spec.description.metadata.userDefined["edgeattn.modules"])
    modules = {name: held["paths"][number] for name, number in held["values"].items()}
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    operation = next(o for o in block.operations if o.type == op and modules.get(o.outputs[0].name) == module)
    argument = operation.inputs[parameter].arguments[0]
    if argument.WhichOneof("binding") == "value":
        value = argument.value
    else:
        constant = next(o for o in block.operations if o.outputs[0].name == argument.name)
        value = constant.attributes["val"]
    if value.WhichOneof("value") == "blobFileValue":
        weights = file.parent / value.blobFileValue.fileName.removeprefix("@model_path/")
        data = bytearray(weights.read_bytes())
        at = value.blobFileValue.offset
        size, start = (int(n) for n in np.frombuffer(bytes(data[at + 8 : at + 24]), np.uint64))
        shape = [d.constant.size for d in value.type.tensorType.dimensions]
        stored = np.frombuffer(
            bytes(data[start : start + size]), np.float32 if size == 4 * np.prod(shape) else np.float16
        )
        made = np.ascontiguousarray(change(stored.reshape(shape).copy()), stored.dtype)
        data[start : start + size] = made.tobytes()
        weights.write_bytes(bytes(data))
    else:
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "bytes":
            tensor.bytes.values = np.ascontiguousarray(change(np.frombuffer(tensor.bytes.values, np.float16))).tobytes()
        else:
            stored_values = getattr(tensor, kind).values
            stored_values[:] = change(np.array(list(stored_values))).tolist()
    file.write_bytes(spec.SerializeToString())
