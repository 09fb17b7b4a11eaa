"""``alias`` has no converter: the node goes, its readers read what it stands for.

coremltools 9.0 stops with "Unsupported fx node alias". Slicing a buffer by its full length, as in ``mask[:T, :T]``,
decomposes to it. Can go when the torch frontend of coremltools registers ``alias``.
"""

from __future__ import annotations

import torch
from torch import fx

from edgeattn.targets.coreml.mends._edit import calls


def mend(module: fx.GraphModule, precision: str) -> int:
    """See the head of ``mends``."""
    found = list(calls(module, torch.ops.aten.alias.default))
    for node in found:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    return len(found)
