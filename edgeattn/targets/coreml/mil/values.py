"""Decodes the values of an ML program: immediate ones, and those in weight files.

A weight file (storage format version 2) holds blobs at 64-byte boundaries. The offset of a value leads to the blob's
metadata: sentinel, data type, size in bytes, offset of the data, number of padding bits. Source: the storage classes
that coremltools ships in C++ (``MILBlob``).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.core.errors import EdgeAttnError, UsageError
from edgeattn.core.files import inside
from edgeattn.core.numerics import Array

#: Numbers of ``DataType`` in Core ML's protobuf, with their names in MIL.
DTYPES = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
#: Types of less than a byte: bits, and whether they are signed.
PACKED = {
    "int4": (4, True),
    "uint1": (1, False),
    "uint2": (2, False),
    "uint3": (3, False),
    "uint4": (4, False),
    "uint6": (6, False),
}
#: NumPy's dtypes of all that can stand in an array.
NUMPY: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(np.bool_),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
    **{name: np.dtype(name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    **{name: np.dtype(np.int8 if signed else np.uint8) for name, (_, signed) in PACKED.items()},
}
_SENTINEL = 0xDEADBEEF
_METADATA = struct.Struct("<IIQQQ")


def unpack(data: Array, bits: int, signed: bool, count: int) -> Array:
    """Numbers of less than a byte, packed with the lowest bits first; as int8 or uint8 of shape (count,)."""
    stream = np.unpackbits(data, bitorder="little", count=bits * count).reshape(count, bits)
    values: Array = (stream << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if signed:  # the highest bit counts -2^(bits - 1): what is above it is filled with its value
        values = (values << (8 - bits)).view(np.int8) >> (8 - bits)
    return values


class Weights:
    """The weight files of a package, mapped into memory when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, Array] = {}

    def _file(self, name: str) -> Array:
        if name not in self._files:
            try:
                path = inside(self._root, name.removeprefix("@model_path/"))
                self._files[name] = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError, EdgeAttnError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
                raise UsageError(
                    "a weight file of the Core ML package cannot be read",
                    value=name,
                    where=str(self._root),
                    why=reason,
                    fix="copy the package again, or convert the model again",
                ) from error
        return self._files[name]

    def read(self, name: str, offset: int, dtype: str, shape: tuple[int, ...]) -> Array:
        """The blob whose metadata stands at ``offset``; a read-only view of the file where no bits are packed.

        Raises:
            UsageError: the file is missing or too short, or there is no such blob at that place.
        """
        data = self._file(name)
        count = math.prod(shape)
        bits, signed = PACKED.get(dtype, (NUMPY[dtype].itemsize * 8, False))
        wanted = (count * bits + 7) // 8
        problem = ""
        if offset + _METADATA.size > data.size:
            problem = f"it ends at byte {data.size}, a value begins at {offset}"
        else:
            sentinel, _, size, start, _ = _METADATA.unpack(data[offset : offset + _METADATA.size].tobytes())
            if sentinel != _SENTINEL:
                problem = f"no value begins at byte {offset}"
            elif size < wanted:
                problem = f"the value at byte {offset} has {size} bytes, its type needs {wanted}"
            elif start + wanted > data.size:
                problem = f"it ends at byte {data.size}, a value at {start + wanted}"
        if problem:
            raise UsageError(
                "a weight file of the Core ML package is damaged",
                value=name,
                where=str(self._root),
                why=problem,
                fix="copy the package again, or convert the model again",
            )
        raw = data[start : start + wanted]
        if dtype in PACKED:
            return unpack(np.asarray(raw), bits, signed, count).reshape(shape)
        return raw.view(NUMPY[dtype]).reshape(shape)


def type_of(value_type: Any) -> tuple[str, tuple[int, ...] | None]:
    """dtype and static shape of a ``ValueType``; shape None where a dimension is unknown, dtype as in ``DTYPES``.

    A state has those of the tensor that it wraps; lists and dictionaries have dtype "list" and "dictionary".
    """
    kind = value_type.WhichOneof("type")
    if kind == "stateType":
        return type_of(value_type.stateType.wrappedType)
    if kind != "tensorType":
        return str(kind).removesuffix("Type"), None
    tensor = value_type.tensorType
    sizes = [d.constant.size for d in tensor.dimensions if d.WhichOneof("dimension") == "constant"]
    shape = tuple(sizes) if tensor.rank == len(tensor.dimensions) == len(sizes) else None
    return DTYPES.get(tensor.dataType, f"type {tensor.dataType}"), shape


def decode(value: Any, weights: Weights) -> Any:
    """A ``Value`` as an array, a text, a list or a dictionary.

    Raises:
        UsageError: a damaged weight file, or a value that does not fit its type.
    """
    dtype, shape = type_of(value.type)
    if dtype not in (*NUMPY, "string", "list", "dictionary"):
        raise UsageError(
            "a value in the Core ML package is of an unknown type", value=dtype, why=f"known are {', '.join(NUMPY)}"
        )
    if value.WhichOneof("value") == "blobFileValue":
        return weights.read(value.blobFileValue.fileName, value.blobFileValue.offset, dtype, shape or ())
    immediate = value.immediateValue
    kind = immediate.WhichOneof("value")
    if kind == "list":
        return [decode(item, weights) for item in immediate.list.values]
    if kind == "dictionary":
        return {decode(item.key, weights): decode(item.value, weights) for item in immediate.dictionary.values}
    held = getattr(immediate.tensor, immediate.tensor.WhichOneof("value") or "floats").values
    if dtype == "string":
        return str(held[0]) if not shape else [str(item) for item in held]
    try:
        count = math.prod(shape or ())
        if not isinstance(held, bytes):
            return np.array(held).astype(NUMPY[dtype]).reshape(shape or ())
        if dtype in PACKED:
            return unpack(np.frombuffer(held, np.uint8), *PACKED[dtype], count).reshape(shape or ())
        return np.frombuffer(held, NUMPY[dtype]).reshape(shape or ())
    except (ValueError, KeyError) as error:
        raise UsageError(
            "a value in the Core ML package is damaged", value=f"{dtype} {shape}", why=str(error)
        ) from error
