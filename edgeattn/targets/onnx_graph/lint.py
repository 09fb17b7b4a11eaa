"""Operations without an ONNX form, asked of PyTorch's exporter before it exports anything."""

from __future__ import annotations

import torch

from edgeattn.capture import Entry
from edgeattn.core import tools
from edgeattn.core.quiet import quiet
from edgeattn.lint.graph import nodes_of
from edgeattn.lint.operators import NotAsked, Placed, is_check


def unknown(entry: Entry) -> list[Placed]:
    """Nodes of the graph as the exporter decomposes it. Raises NotAsked: it is not here, has moved, or raises."""
    if tools.version("onnxscript") is None:
        raise NotAsked("onnxscript is not here")
    with quiet():
        try:
            from torch.onnx._internal.exporter import _fx_passes, _registration

            from edgeattn.targets.onnx_graph.export import OPSET

            registry = _registration.ONNXRegistry.from_torchlib(OPSET)
            graph = _fx_passes.decompose_with_registry(entry.graph, registry)
        except Exception as error:  # PyTorch's own names, which move, and whatever a decomposition raises
            raise NotAsked.raised(error) from error
    return [
        (module, node)
        for module, node in nodes_of(graph.graph_module)
        if isinstance(node.target, torch._ops.OpOverload) and not (is_check(node) or registry.get_decomps(node.target))
    ]
