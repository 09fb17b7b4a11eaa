"""A graph in turns: electronic parts, each a graph of its own, and the optical operations between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from edgeattn.targets.optical.operators import Operator, operator
from edgeattn.targets.optical.schedule import Pair


@dataclass(frozen=True)
class Turn:
    """Electronics, and then optics.

    Attributes:
        electronic: a graph that reads the program's inputs and whatever came before; None where nothing is to be done.
        optical: operations that read what is there after it; none in the last turn.
    """

    electronic: ir.Model | None
    optical: tuple[Operator, ...]


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, also inside of the bodies of a loop or a condition."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
        graphs += list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else []
        for graph in graphs:
            for inner in graph:
                yield from reads(inner)


def turns(model: ir.Model, plane: Pair) -> list[Turn]:
    """The graph of ``model``, which is taken apart, in as few turns as its dependencies allow."""
    nodes = list(model.graph)
    optical = {node: found for node in nodes if (found := operator(node, plane)) is not None}
    level: dict[ir.Value, int] = {}
    rounds: list[list[Operator]] = []
    electronic: list[list[ir.Node]] = [[]]
    for node in nodes:
        before = max((level.get(value, 0) for value in reads(node)), default=0)
        if node in optical:
            while len(rounds) <= before:
                rounds.append([])
                electronic.append([])
            rounds[before].append(optical[node])
            before += 1
        else:
            electronic[before].append(node)
        level.update(dict.fromkeys(node.outputs, before))
    read_by: dict[ir.Value, set[int]] = {}
    for i, group in enumerate(electronic):
        for node in group:
            for value in reads(node):
                read_by.setdefault(value, set()).add(i)
    asked = {str(value.name) for value in model.graph.outputs} | {op.input for found in rounds for op in found}
    parts = []
    for i, group in enumerate(electronic):
        made = [value for node in group for value in node.outputs]
        given = [value for value in made if str(value.name) in asked or read_by.get(value, set()) - {i}]
        parts.append(_part(model, i, given, read_by, set(made)))
    return [Turn(part, tuple(found)) for part, found in zip(parts, [*rounds, []], strict=True)]


def _part(
    model: ir.Model, turn: int, given: list[ir.Value], read_by: dict[ir.Value, set[int]], made: set[ir.Value]
) -> ir.Model | None:
    """The electronic nodes of a turn as a graph of their own; None where nobody wants what they make."""
    if not given:
        return None
    taken = [v for v, turns in read_by.items() if turn in turns and v not in made and not v.is_initializer()]
    # What an inner graph (a branch) has for itself is inside of the node that holds it.
    outside = [v for v in taken if v.graph is model.graph]
    graph = ir.convenience.extract(model.graph, outside, given)
    graph.name = "main"
    graph.metadata_props.clear()
    # They come out of a set, in another order each time.
    held = sorted(graph.initializers.values(), key=lambda value: str(value.name))
    graph.initializers.clear()
    for value in held:
        graph.initializers.add(value)
    return ir.Model(graph, ir_version=model.ir_version)
