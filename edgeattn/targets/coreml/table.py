"""What every operation of an ML program computes and moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from edgeattn.targets.base import Artifact, OpCost, entry_of
from edgeattn.targets.coreml.mil.package import Package, open_package
from edgeattn.targets.coreml.mil.values import NUMPY, PACKED, Weights, decode, type_of

_Shape = tuple[int, ...]

#: They give what they are given, in another shape or under another name; a state is read where it lies.
VIEWS = ("reshape", "squeeze", "expand_dims", "flatten2d", "identity", "shape", "read_state", "write_state")
#: A pair of them stands for storage in integers: what is between two operations is as wide as the integers.
_TO, _FROM = "quantize", "dequantize"
#: They read as much of ``x`` as they give.
_TAKES = ("gather", "gather_along_axis", "gather_nd", "slice_by_index", "slice_by_size")
#: They write the rows of ``update`` into what they are given, in place where it is a state.
_PUTS = ("slice_update",)
_SMALL = ("int8", "uint8", "int4", "uint4")
_FLOATS = ("fp32", "fp16")
#: Types of constants that say how to compute, as strides and axes do: no weights.
_PARAMETERS = ("bool", "int32", "string")


def operations(artifact: Artifact, entry: str) -> list[OpCost]:
    """The operations of an entry's function, see ``Target.operations``; named as their first values are.

    What is inside of control flow is not looked at. Constants, and what is computed of them alone, cost nothing.

    Raises:
        UsageError: unknown entry, or a package that cannot be read.
    """
    package = open_package(artifact.folder / entry_of(artifact, entry).file)
    # The only function of a package of ours is called main, whatever the entry is.
    return operations_of(package, entry if entry in package.functions else package.functions[0])


def operations_of(package: Package, name: str) -> list[OpCost]:
    """The same of a function of a package."""
    function = package.spec.mlProgram.functions[name]
    block = function.block_specializations[function.opset]
    table = _Table(package, name)
    for item in function.inputs:
        table.declare(item)
    for item in block.operations:
        table.note(item)
    return [table.row(item) for item in block.operations if item.type != "const" and item.outputs]


class _Table:
    """Rows for the operations of one function; remembers types, makers, readers and what is constant."""

    def __init__(self, package: Package, name: str) -> None:
        self._modules = package.modules_in(name)
        self._weights = Weights(package.root)
        self._types: dict[str, tuple[str, _Shape]] = {}
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = {}
        #: Bytes in the file, of constants and of what is computed of constants alone.
        self._stored: dict[str, int] = {}

    def declare(self, item: Any) -> None:
        """Note the type of a value; a dimension that is not known counts as 1."""
        self._types[item.name] = _typed(item.type)

    def note(self, item: Any) -> None:
        """Note an operation, in order."""
        arguments = _arguments(item)
        names = [argument.name for argument in arguments if _named(argument)]
        for output in item.outputs:
            self.declare(output)
            self._makers[output.name] = item
        for name in names:
            self._readers.setdefault(name, []).append(item)
        if item.type == "const":
            dtype, shape = _typed(item.outputs[0].type)
            self._stored[item.outputs[0].name] = 0 if dtype in _PARAMETERS else _bytes(dtype, shape)
        elif arguments and all(name in self._stored for name in names):
            held = sum(_bytes(*_typed(a.value.type)) for a in arguments if not _named(a))
            held += sum(_bytes(*_typed(value.type)) for key, value in item.attributes.items() if key != "name")
            total = held + sum(self._stored[name] for name in dict.fromkeys(names))
            self._stored.update({output.name: total for output in item.outputs})
        elif item.type.startswith("constexpr_"):
            held = sum(_bytes(*_typed(value.type)) for key, value in item.attributes.items() if key != "name")
            self._stored.update({output.name: held for output in item.outputs})

    def _shape(self, item: Any, parameter: str) -> _Shape:
        """Of an argument; () where it is left out."""
        if parameter not in item.inputs:
            return ()
        argument = item.inputs[parameter].arguments[0]
        return self._types.get(argument.name, ("", ()))[1] if _named(argument) else _typed(argument.value.type)[1]

    def _constant(self, item: Any, parameter: str, default: Any) -> Any:
        """What an argument says that is known beforehand."""
        if parameter not in item.inputs:
            return default
        argument = item.inputs[parameter].arguments[0]
        maker = self._makers.get(argument.name) if _named(argument) else None
        value = maker.attributes["val"] if maker is not None and maker.type == "const" else None
        if value is None:
            if _named(argument):
                return default
            value = argument.value
        found = decode(value, self._weights)
        return found.tolist() if hasattr(found, "tolist") else found

    def _bytes(self, name: str) -> int:
        """Of a tensor of data, as it is stored."""
        dtype, shape = self._types.get(name, ("", ()))
        maker, readers = self._makers.get(name), self._readers.get(name, [])
        if maker is not None and maker.type == _FROM:
            dtype = self._types.get(maker.inputs["input"].arguments[0].name, ("int8", ()))[0]
        elif readers and all(reader.type == _TO for reader in readers):
            dtype = self._types[readers[0].outputs[0].name][0]
        return _bytes(dtype, shape)

    def row(self, item: Any) -> OpCost:
        """What an operation costs."""
        given = list(dict.fromkeys(a.name for a in _arguments(item) if _named(a)))
        data = [name for name in given if name not in self._stored]
        made = [output.name for output in item.outputs]
        module, rest = self._modules.get(made[0], ""), (tuple(data), tuple(made))
        dtype = self._dtype(item, data)
        if item.type in (*VIEWS, _TO, _FROM) or made[0] in self._stored:
            return OpCost(made[0], module, item.type, 0, 0, 0, 0, dtype, 0, 0, 1, *rest)
        weights = sum(self._stored[name] for name in given if name in self._stored)
        read, written = sum(map(self._bytes, data)), sum(map(self._bytes, made))
        if item.type in _TAKES:
            source, elements = item.inputs["x"].arguments[0].name, math.prod(self._types[made[0]][1])
            whole = self._stored.get(source, self._bytes(source))
            taken = math.ceil(whole * min(1.0, elements / max(math.prod(self._shape(item, "x")), 1)))
            read, weights = (0, taken) if source in self._stored else (taken, 0)
        elif item.type in _PUTS:
            read = written = self._bytes(item.inputs["update"].arguments[0].name)
        macs, channels, fan, taps = self._macs(item)
        return OpCost(made[0], module, item.type, macs, read, weights, written, dtype, channels, fan, taps, *rest)

    def _dtype(self, item: Any, data: Sequence[str]) -> str:
        """See ``OpCost.dtype``; 8-bit weights with a scale that meet data of a pair around are multiplied as they are.

        Where data come as floats, small weights are unpacked.
        """
        if item.type == "conv_quantized":
            return "fp16"
        makers = [self._makers.get(name) for name in data]
        if item.type not in (_TO, _FROM) and makers and all(m is not None and m.type == _FROM for m in makers):
            weight = item.inputs["weight"].arguments[0].name if "weight" in item.inputs else ""
            maker = self._makers.get(weight)
            stored = [self._types.get(name, ("", ()))[0] for name in self._sources(maker)]
            if not weight or any(kind in _SMALL for kind in stored):
                return "w8a8"
        types = [self._types.get(name, ("", ()))[0] for name in (*(o.name for o in item.outputs), *data)]
        return next((one for one in types if one in _FLOATS), "int" if types else "fp32")

    def _sources(self, maker: Any) -> list[str]:
        """Names of what a compressed constant is made of, declared here if they are part of the operation."""
        if maker is None or not maker.type.startswith(("constexpr_", _FROM)):
            return []
        names = [argument.name for argument in _arguments(maker) if _named(argument)]
        for key, value in maker.attributes.items():
            if key != "name":
                names.append(f"{maker.outputs[0].name}.{key}")
                self._types[names[-1]] = _typed(value.type)
        return names

    def _macs(self, item: Any) -> tuple[int, int, int, int]:
        """``macs``, ``channels``, ``fan`` and ``taps``, see ``OpCost``; shapes are MIL's.

        Weights of conv are (Co, Ci / groups, k...), of conv_transpose (Ci, Co / groups, k...), of linear (Co, Ci).
        """
        made = self._types[item.outputs[0].name][1]
        kind, weight, out = item.type, self._shape(item, "weight"), math.prod(made)
        groups, taps = max(int(self._constant(item, "groups", 1)), 1), math.prod(weight[2:])
        if kind in ("conv", "conv_quantized", "linear") and len(weight) > 1:
            return out * math.prod(weight[1:]), weight[1], weight[0] // groups, taps
        if kind == "conv_transpose" and len(weight) > 1:
            return math.prod(self._shape(item, "x")) * math.prod(weight[1:]), weight[0] // groups, weight[1], taps
        if kind == "matmul":
            data = self._shape(item, "x")
            inner = data[-2 if len(data) > 1 and self._constant(item, "transpose_x", False) else -1] if data else 1
            return out * inner, inner, made[-1] if made else 1, 1
        if kind == "scaled_dot_product_attention":
            query, key, value = (self._shape(item, name) for name in ("query", "key", "value"))
            return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]), query[-1], 0, 1
        return self._einsum(item) if kind == "einsum" else (0, 0, 0, 1)

    def _einsum(self, item: Any) -> tuple[int, int, int, int]:
        """One multiply-accumulate for each choice of all letters."""
        left, _, right = str(self._constant(item, "equation", "")).replace(" ", "").partition("->")
        sizes: dict[str, int] = {}
        for term, argument in zip(left.split(","), item.inputs["values"].arguments, strict=False):
            for letter, size in zip(term, self._types.get(argument.name, ("", ()))[1], strict=False):
                sizes[letter] = max(size, sizes.get(letter, 1))
        return math.prod(sizes.values()), math.prod(n for letter, n in sizes.items() if letter not in right), 0, 1


def _arguments(item: Any) -> list[Any]:
    """Of all of an operation's parameters, in order of their names."""
    return [one for name in sorted(item.inputs) for one in item.inputs[name].arguments]


def _named(argument: Any) -> bool:
    return bool(argument.WhichOneof("binding") == "name")


def _typed(value_type: Any) -> tuple[str, _Shape]:
    """dtype and shape of a type, 1 for a dimension that is open."""
    dtype, shape = type_of(value_type)
    if shape is None and value_type.WhichOneof("type") == "tensorType":
        sizes = value_type.tensorType.dimensions
        shape = tuple(int(d.constant.size) if d.WhichOneof("dimension") == "constant" else 1 for d in sizes)
    return dtype, shape or ()


def _bytes(dtype: str, shape: _Shape) -> int:
    """As they are stored: numbers of less than a byte are packed."""
    bits = PACKED[dtype][0] if dtype in PACKED else NUMPY[dtype].itemsize * 8 if dtype in NUMPY else 0
    return math.ceil(math.prod(shape) * bits / 8)
