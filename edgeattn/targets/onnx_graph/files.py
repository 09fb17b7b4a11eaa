"""Reading and writing .onnx files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edgeattn.core.errors import UsageError
from edgeattn.targets.base import Artifact, ArtifactEntry, Tensor

#: Weights go to a second file from this many bytes on; a protobuf message cannot exceed 2 GB.
EXTERNAL_BYTES = 1_500_000_000
#: The same of decoders: a file beside the graph is mapped into memory as it is read, a message is parsed as a whole.
EXTERNAL_BYTES_MAPPED = 64_000_000


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save(model: ir.Model, path: Path, mapped: bool = False) -> None:
    """Write ``model``, large weights beside it as ``NAME.onnx.data``; with ``mapped`` not only the largest."""
    largest = EXTERNAL_BYTES_MAPPED if mapped else EXTERNAL_BYTES
    ir.save(model, path, external_data=f"{path.name}.data" if weight_bytes(model) > largest else None)


def adopt(path: Path) -> Artifact:
    """A file as it is, with the precision that EdgeAttn noted in it; "" in files of others.

    Raises:
        UsageError: it is no ONNX model, or its shapes vary.
    """
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's own, or the reader's
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError("the ONNX file cannot be read", value=path, why=why, fix="copy or export it again") from error
    sides = []
    for values in (model.graph.inputs, model.graph.outputs):
        found = []
        for value in values:
            sizes = None if value.shape is None else list(value.shape)
            if sizes is None or value.dtype is None or not all(isinstance(n, int) for n in sizes):
                raise UsageError(
                    "the shapes of the ONNX file vary",
                    value=f"{value.name}: {sizes}",
                    where=str(path),
                    fix="export it for one shape",
                )
            found.append(Tensor(str(value.name), tuple(int(str(n)) for n in sizes), str(value.dtype.numpy())))
        sides.append(tuple(found))
    precision = model.metadata_props.get("edgeattn.precision", "")
    return Artifact(path.parent, precision, {"main": ArtifactEntry(path.name, *sides)}, {"adopted": True})
