"""What is worth recording of a package: operations, ranks, integers, weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from edgeattn.targets.coreml.mil.package import VERSIONS, Package
from edgeattn.targets.coreml.mil.values import DTYPES

#: Of these the output's dtype says nothing about where they run: they hold what is known before, or convert it.
_SILENT = ("const", "cast", "quantize")


def operations(package: Package, constants: bool = False, name: str = "") -> Iterator[Any]:
    """Every operation of every function and of the blocks inside; constants left out unless they are asked for.

    Args:
        name: of the only function to look at.
    """

    def inside(block: Any) -> Iterator[Any]:
        for item in block.operations:
            if constants or item.type != "const":
                yield item
            for nested in item.blocks:
                yield from inside(nested)

    functions = package.spec.mlProgram.functions
    for function in [functions[name]] if name else functions.values():
        yield from inside(function.block_specializations[function.opset])


def facts_of(package: Package, function: str = "") -> dict[str, Any]:
    """Counts of operations, those of rank above 4 and those on integers with their modules, and the weights' bytes.

    Args:
        function: whose operations alone are counted; the weights are the package's.
    """
    nodes: Counter[str] = Counter()
    high_rank, integer = [], []
    modules = package.modules_in(function)
    for item in operations(package, name=function):
        nodes[item.type] += 1
        for output in item.outputs:
            tensor = output.type.tensorType
            place = {"op": item.type, "value": output.name, "module": modules.get(output.name, "")}
            if tensor.rank > 4:
                high_rank.append(place | {"rank": tensor.rank})
            if DTYPES.get(tensor.dataType, "").startswith(("int", "uint")) and item.type not in _SILENT:
                integer.append(place)
    weights = sum(path.stat().st_size for path in package.root.rglob("*.bin"))
    return {
        "nodes": dict(nodes.most_common()),
        "minimum_system": VERSIONS[package.spec.specificationVersion],
        "high_rank": high_rank,
        "integer": integer,
        "weight_bytes": weights,
    }
