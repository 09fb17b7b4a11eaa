"""Which torch module each value of a model came from: noted at conversion, kept in the model's own metadata."""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.conv_transpose1d, _ATEN.conv_transpose2d}
_CONVOLUTIONS |= {_ATEN.conv_transpose3d, _ATEN.convolution}
_LINEAR = {_ATEN.linear, _ATEN.addmm, _ATEN.mm}
#: What the converter makes part of the weighted operation before it, where all else in it is constant.
_ADDED = {_ATEN.add, _ATEN.sub}
_FUSED = _ADDED | {_ATEN.mul, _ATEN.div, _ATEN.batch_norm, _ATEN._native_batch_norm_legit_no_training}


def path_of(node: fx.Node) -> str:
    """Of the torch module that a node came from; "" outside of any child."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def owner_of(node: fx.Node, inputs: Collection[str]) -> fx.Node:
    """The weighted operation that the converter will fuse a node into; the node itself where it does not.

    A batch norm's or a scale's numbers become part of the convolution's weights, which are the convolution's then.

    Args:
        inputs: names of the placeholders that are no constants.
    """
    at, only_added = node, True
    while _packet(at) in _FUSED or at.target is operator.getitem:
        computed = [n for n in at.all_input_nodes if n.op != "placeholder" or n.name in inputs]
        if len(computed) != 1 or len(computed[0].users) != 1:
            return node
        only_added &= _packet(at) in _ADDED
        (at,) = computed
    return at if _packet(at) in _CONVOLUTIONS or (_packet(at) in _LINEAR and only_added) else node


def holder_of(node: fx.Node, parameters: Mapping[str, str]) -> str:
    """Path of the module whose parameter a node reads, as it is or viewed; "" where it reads none, or of several.

    It says where a method that is no forward got its weights from: there no module is entered.

    Args:
        parameters: paths by the names of their placeholders.
    """
    found = set()
    for source in node.all_input_nodes:
        while isinstance(source.target, torch._ops.OpOverload) and source.target.is_view:
            (source, *_) = source.all_input_nodes
        if source.name in parameters:
            found.add(parameters[source.name].rpartition(".")[0])
    return found.pop() if len(found) == 1 else ""


def modules_of(program: Any) -> dict[str, str]:
    """Paths of the modules that a converted program's values came from, by the values' names.

    The converter carries a node's stack trace, in which ``lower`` has put the path, on to every operation that it or a
    pass makes of the node; an operation that several were fused into has it of the last.
    """
    from coremltools.converters.mil.mil.scope import ScopeSource

    modules: dict[str, str] = {}
    for function in program.functions.values():
        for operation in function.operations:
            found = [text for text in operation.scopes.get(ScopeSource.EXIR_STACK_TRACE, ()) if text]
            if operation.op_type != "const" and found:
                modules.update({output.name: str(found[-1]) for output in operation.outputs})
    return modules


def note_modules(modules: Mapping[str, str]) -> str:
    """JSON for the metadata: what ``modules_of`` gives, each path once."""
    paths: dict[str, int] = {}
    values = {value: paths.setdefault(path, len(paths)) for value, path in modules.items()}
    return json.dumps({"paths": list(paths), "values": values}, separators=(",", ":"))
