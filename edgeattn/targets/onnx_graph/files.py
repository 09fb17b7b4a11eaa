"""Writing .onnx files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

#: Weights go to a second file from this many bytes on; a protobuf message cannot exceed 2 GB.
EXTERNAL_BYTES = 1_500_000_000


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save(model: ir.Model, path: Path) -> None:
    """Write ``model``, large weights beside it as ``NAME.onnx.data``."""
    ir.save(model, path, external_data=f"{path.name}.data" if weight_bytes(model) > EXTERNAL_BYTES else None)
