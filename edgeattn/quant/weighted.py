"""The weighted operations of a captured program, new weights for them, and runs that look at what they read."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from edgeattn.capture import Entry, Program
from edgeattn.core.numerics import Array
from edgeattn.quant.flow import module_of, packet

_ATEN = torch.ops.aten
_CONVOLUTIONS = (_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.convolution)
_TRANSPOSED = (_ATEN.conv_transpose1d, _ATEN.conv_transpose2d, _ATEN.conv_transpose3d)
#: The names of a matrix product's arguments: data, weight, bias.
_PRODUCTS = {
    _ATEN.linear: ("input", "weight", "bias"),
    _ATEN.addmm: ("mat1", "mat2", "self"),
    _ATEN.mm: ("self", "mat2", ""),
    _ATEN.matmul: ("self", "other", ""),
}


@dataclass(frozen=True)
class Layer:
    """An operation that multiplies data with a weight that nothing else reads.

    Attributes:
        node: the operation. data: what it reads. module: dotted path.
        weight, bias: names in the state dict; no bias is "".
        groups: of a convolution. inputs_first: the weight's first axis is that of the inputs.
        spatial: axes behind the channels, in the data and in the result.
    """

    node: fx.Node
    data: fx.Node
    module: str
    weight: str
    bias: str
    groups: int = 1
    inputs_first: bool = False
    spatial: int = 0

    def grid(self, weight: Tensor) -> Tensor:
        """A view (groups, outputs of a group, inputs of a group, numbers between the two) of a contiguous weight."""
        first, second = weight.shape[:2]
        grid = weight.view(self.groups, first // self.groups, second, -1)
        return grid.transpose(1, 2) if self.inputs_first else grid

    def rows(self, weight: Tensor) -> Tensor:
        """The weight with its output channels as rows (outputs, inputs of a group * numbers)."""
        grid = self.grid(weight)
        return grid.reshape(grid.shape[0] * grid.shape[1], -1)

    def of_rows(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The inverse of ``rows``, in the shape of ``weight``."""
        made = torch.empty_like(weight, memory_format=torch.contiguous_format)
        grid = self.grid(made)
        grid.copy_(rows.view(grid.shape))
        return made


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen operation by name, defaults too."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def layers(program: Program) -> dict[str, dict[str, Layer]]:
    """The layers of each entry by the name of their weight, in the order of the graph.

    A weight or bias that is read twice in an entry, is stored under two names, or that an entry uses in another way,
    makes no layer in any of them: it cannot be changed for one reader's sake.
    """
    found = {name: {layer.weight: layer for layer in _layers_of(entry)} for name, entry in program.entries.items()}
    for name, entry in program.entries.items():
        read = {key for key, node in _stored(entry).items() if node.users}
        for others in found.values():
            for weight, layer in list(others.items()):
                own = found[name].get(weight)
                if (own is None and read & {weight, layer.bias}) or (own is not None and own.bias != layer.bias):
                    del others[weight]
    return found


def _stored(entry: Entry) -> dict[str, fx.Node]:
    """The placeholders of parameters and buffers, by name in the state dict."""
    nodes = {node.name: node for node in entry.graph.graph.nodes if node.op == "placeholder"}
    state = entry.graph.state_dict
    return {
        spec.target: nodes[spec.arg.name]
        for spec in entry.graph.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in state
    }


def _layers_of(entry: Entry) -> Iterator[Layer]:
    state = entry.graph.state_dict
    held = Counter(value.data_ptr() for value in state.values())
    names = {
        node: key
        for key, node in _stored(entry).items()
        if len(node.users) == 1 and held[state[key].data_ptr()] == 1 and state[key].is_contiguous()
    }
    for node in entry.graph.graph.nodes:
        if node.op == "call_function" and (layer := _layer(node, names)) is not None:
            yield layer


def _layer(node: fx.Node, names: Mapping[fx.Node, str]) -> Layer | None:
    kind = packet(node)
    if kind not in _CONVOLUTIONS and kind not in _TRANSPOSED and kind not in _PRODUCTS:
        return None
    given = arguments(node)
    data, weight, bias = (given.get(name) for name in _PRODUCTS.get(kind, ("input", "weight", "bias")))
    if (
        not isinstance(data, fx.Node)
        or not isinstance(weight, fx.Node)
        or (given.get("alpha", 1), given.get("beta", 1)) != (1, 1)
    ):
        return None
    turned = kind in _TRANSPOSED or bool(given.get("transposed")) or (kind in _PRODUCTS and kind is not _ATEN.linear)
    if kind in _PRODUCTS and _is_transpose(weight):
        weight, turned = weight.all_input_nodes[0], not turned
    if weight not in names or data in names or (bias is not None and bias not in names):
        return None
    ndim = weight.meta["val"].ndim
    if ndim < 2 or (kind in _PRODUCTS and ndim > 2) or (bias is not None and bias.meta["val"].ndim != 1):
        return None
    return Layer(
        node,
        data,
        module_of(node),
        names[weight],
        "" if bias is None else names[bias],
        given.get("groups", 1),
        turned,
        0 if kind in _PRODUCTS else ndim - 2,
    )


def _is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the two axes of a matrix, for one reader."""
    if packet(node) not in (_ATEN.t, _ATEN.transpose, _ATEN.permute) or len(node.users) != 1:
        return False
    if node.meta["val"].ndim != 2:
        return False
    given = arguments(node)
    axes = given.get("dims", [given.get("dim0", 0), given.get("dim1", 1)])
    first, second = (axis % 2 for axis in axes)
    return first != second and (packet(node) is not _ATEN.permute or first == 1)


def with_weights(program: Program, changed: Mapping[str, Tensor]) -> Program:
    """A program with other values for some names of its state dict; everything else it shares with ``program``."""
    entries = {}
    for name, entry in program.entries.items():
        state = dict(entry.graph.state_dict)
        for key in state.keys() & changed.keys():
            old = state[key]
            state[key] = (
                nn.Parameter(changed[key], old.requires_grad) if isinstance(old, nn.Parameter) else changed[key]
            )
        # The graph stays the same object: torch's own way to another state dict makes the graph module anew.
        graph = copy.copy(entry.graph)
        graph._state_dict = state
        entries[name] = replace(entry, graph=graph)
    return Program(entries)


#: Is given a node that is about to run, and the value of any node before it.
Look = Callable[[fx.Node, Callable[[fx.Node], Any]], None]


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, look: Look | None) -> None:
        super().__init__(module)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        if self.look is not None and n.op == "call_function":
            self.look(n, self.env.__getitem__)
        return super().run_node(n)


def run(entry: Entry, feeds: Mapping[str, Array], look: Look | None = None) -> dict[str, Tensor]:
    """One forward without gradients; outputs by name.

    Args:
        feeds: arrays by input name; others are passed over. look: is called before each operation.
    """
    graph = entry.graph
    nodes = {node.name: node for node in graph.graph.nodes if node.op == "placeholder"}
    inputs = iter(entry.inputs)
    values: list[Any] = []
    for spec in graph.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            like = nodes[spec.arg.name].meta["val"]
            values.append(torch.from_numpy(np.array(feeds[next(inputs)])).to(like.dtype))
        else:
            state: Mapping[str, Any] = graph.state_dict if spec.target in graph.state_dict else graph.constants
            values.append(state[str(spec.target)])
    with torch.no_grad():
        made = _Interpreter(graph.graph_module, look).run(*values)
    kinds = [spec.kind for spec in graph.graph_signature.output_specs]
    returned = [value for value, kind in zip(made, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
    return dict(zip(entry.outputs, returned, strict=True))


def entries_for(program: Program, feeds: Mapping[str, Array]) -> Iterable[str]:
    """Names of the entries that these feeds have every input of."""
    return [name for name, entry in program.entries.items() if set(entry.inputs) <= feeds.keys()]
