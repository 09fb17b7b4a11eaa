"""Which torch module each value of a model came from: noted at conversion, kept in the model's own metadata."""

from __future__ import annotations

import json
from typing import Any

from torch import fx


def path_of(node: fx.Node) -> str:
    """Of the torch module that a node came from; "" outside of any child."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def note_modules(program: Any) -> str:
    """JSON for the metadata: the values of a converted program and the modules that they came from.

    The converter carries a node's stack trace, in which ``lower`` has put the path, on to every operation that it or a
    pass makes of the node; an operation that several were fused into has it of the last.
    """
    from coremltools.converters.mil.mil.scope import ScopeSource

    paths: dict[str, int] = {}
    values: dict[str, int] = {}
    for function in program.functions.values():
        for operation in function.operations:
            found = [text for text in operation.scopes.get(ScopeSource.EXIR_STACK_TRACE, ()) if text]
            if operation.op_type != "const" and found:
                number = paths.setdefault(str(found[-1]), len(paths))
                values.update({output.name: number for output in operation.outputs})
    return json.dumps({"paths": list(paths), "values": values}, separators=(",", ":"))
