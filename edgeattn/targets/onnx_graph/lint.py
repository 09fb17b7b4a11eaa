"""Operations without an ONNX form, asked of PyTorch's exporter before it exports anything."""

from __future__ import annotations

from torch import fx

from edgeattn.capture import Entry
from edgeattn.core import tools
from edgeattn.core.quiet import quiet
from edgeattn.lint.operators import is_check


def unknown(entry: Entry) -> list[fx.Node] | None:
    """Nodes of the graph as the exporter decomposes it; None where it cannot be asked."""
    if tools.version("onnxscript") is None:
        return None
    try:
        with quiet():
            from torch.onnx._internal.exporter import _fx_passes, _registration

            from edgeattn.targets.onnx_graph.export import OPSET

            registry = _registration.ONNXRegistry.from_torchlib(OPSET)
            graph = _fx_passes.decompose_with_registry(entry.graph, registry)
            return [
                node
                for node in graph.graph.nodes
                if node.op == "call_function" and not is_check(node) and not registry.get_decomps(node.target)
            ]
    except Exception:  # it has moved, or a decomposition raises: the conversion itself says that
        return None
