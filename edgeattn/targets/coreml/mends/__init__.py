"""What coremltools 9.0 cannot convert, or converts wrongly, and how a graph is rewritten so that it can.

One file a mend, found by name. Each says in its docstring what goes wrong in which version and when it can go, and has

    def mend(module: torch.fx.GraphModule, precision: str) -> int

which rewrites the captured graph in place and returns how many places it changed. A test fails for each once
coremltools does without it.
"""

from __future__ import annotations

import importlib
import pkgutil

from torch import fx


def names() -> list[str]:
    """Of all mends."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def mend(module: fx.GraphModule, precision: str, without: frozenset[str] = frozenset()) -> dict[str, int]:
    """Apply every mend to a graph; the number of places that each changed, where it changed any.

    Args:
        precision: all but ``fp32`` store activations in float16.
        without: names to leave out, for the tests that ask whether a mend is still needed.
    """
    changed = {
        name: importlib.import_module(f"{__name__}.{name}").mend(module, precision)
        for name in names()
        if name not in without
    }
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return {name: count for name, count in changed.items() if count}
