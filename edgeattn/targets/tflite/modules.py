"""Which torch module each tensor of a .tflite file came from.

The converter derives a tensor's name from where its operation stood in the model. ``lower`` has it write the full path
of the module between two marks; operations that are fused into one leave all their marks, in alphabetical order. An
operation whose weights belong to another module, as to one whose forward does not run, notes that one as well.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from edgeattn.targets.tflite import flatbuffer

#: Around a path.
MARK = "|"
#: Between the module that an operation is part of and the one that its weights belong to.
_OF = ">"

_MARKED = re.compile(f"{re.escape(MARK)}([^{MARK};\\s]*){re.escape(MARK)}")


def marked(path: str, owner: str = "") -> str:
    """A path between its marks.

    Args:
        owner: path of the module that the operation's weights belong to, if it is known.
    """
    return f"{MARK}{path}{_OF + owner if owner not in ('', path) else ''}{MARK}"


def paths_in(text: str) -> list[str]:
    """The paths of all that stands between marks in a name or in a converter's message."""
    return [found.partition(_OF)[0] for found in _MARKED.findall(text)]


def _last(paths: Sequence[str], places: Mapping[str, Sequence[int]]) -> str:
    """The one of several modules, whose operations were fused, that ran last.

    A module may run several times, and the model itself has operations all over the graph: those were fused that stand
    closest together.

    Args:
        paths: all that stands between two marks. places: where the operations of each stand in the captured graph, in
            order.
    """
    found: list[tuple[int, str]] = []
    for path in paths:
        others = [places.get(other, ()) for other in paths if other != path]
        for end in places.get(path, ()):
            before = [bisect_left(each, end) for each in others]
            if all(before):
                start = min(each[i - 1] for each, i in zip(others, before, strict=True))
                found.append((end - start, path))
    return min(found)[1] if found else paths[0]


def put_last_first(model: Any, entry: str, places: Mapping[str, Sequence[int]]) -> None:
    """Begin the name of every fused operation's tensor with the module whose output it is.

    Args:
        places: see ``_last``.
    """
    item = flatbuffer.signature(model, entry)
    for tensor in model.subgraphs[item.subgraphIndex].tensors:
        found = list(dict.fromkeys(_MARKED.findall(flatbuffer.text(tensor.name))))
        if len(found) > 1:
            last = _last(found, places)
            tensor.name = ";".join(map(marked, [last, *(each for each in found if each != last)])).encode()


def mark_outputs(model: Any, entry: str, marks: Sequence[str]) -> None:
    """Name the tensors of the outputs, in order, which the converter gives names of its own, as it does the others."""
    item = flatbuffer.signature(model, entry)
    tensors, numbered = model.subgraphs[item.subgraphIndex].tensors, flatbuffer.numbered(item.outputs)
    for place, mark in enumerate(marks):
        if numbered[place].tensorIndex not in {one.tensorIndex for one in item.inputs}:
            tensors[numbered[place].tensorIndex].name = mark.encode()


def note_outputs(model: Any, entry: str, came_from: Mapping[str, str]) -> None:
    """Note the modules of the outputs, by name, in the metadata: their tensors have the recipe's names instead."""
    flatbuffer.add_metadata(model, {f"modules.{entry}": json.dumps(came_from)})


def modules(model: Any, entry: str) -> list[str]:
    """Path of the torch module that each tensor of an entry came from; "" outside of any child or if unknown."""
    item = flatbuffer.signature(model, entry)
    named = [paths_in(flatbuffer.text(tensor.name)) for tensor in model.subgraphs[item.subgraphIndex].tensors]
    found = [paths[0] if paths else "" for paths in named]
    outputs = json.loads(flatbuffer.metadata(model).get(f"modules.{entry}", "{}"))
    for output in item.outputs:
        found[output.tensorIndex] = outputs.get(flatbuffer.text(output.name), found[output.tensorIndex])
    return found


def module_of_weights(graph: Any, operator: Any, output: str) -> str:
    """Path of the torch module whose weights an operation reads as its second input.

    The tensor of the weights is named after it; that of the output after what was fused with it, too.

    Args:
        output: the path for the output, which it is where modules share their weights.
    """
    weights, made = (flatbuffer.text(graph.tensors[i].name) for i in (operator.inputs[1], operator.outputs[0]))
    noted: list[str] = [found.partition(_OF)[2] for found in _MARKED.findall(made) if _OF in found]
    if noted:
        return noted[0]
    own, fused = paths_in(weights), paths_in(made)
    return next((path for path in own if path in fused or not fused), output)
