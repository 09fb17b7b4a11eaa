"""Quantization by NVIDIA ModelOpt, which pins an older onnx and so runs in a toolchain of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn import toolchains
from edgeattn.targets.base import LowerPlan
from edgeattn.targets.onnx_graph.execute import module_of
from edgeattn.targets.onnx_graph.files import save

#: ModelOpt's names by precision.
MODES = {"w8a8": "int8", "fp8": "fp8"}
#: Seconds after which it has gone wrong.
TIMEOUT_S = 1800.0


def quantize(model: ir.Model, plan: LowerPlan) -> tuple[ir.Model, dict[str, Any]]:
    """The float32 graph with ModelOpt's pairs, everything else in float32, and what is worth knowing of it.

    Raises:
        ToolchainMissing: it was not added. ConversionFailed: it failed; with the end of its log.
    """
    scopes = {str(node.name): dict(node.metadata_props) for node in model.graph}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model, folder / "float.onnx")
        samples = list(plan.calibration or plan.samples)  # ModelOpt wants all of them at once
        arrays: dict[str, Any] = {key: np.concatenate([feeds[key] for feeds in samples]) for key in samples[0]}
        np.savez(folder / "samples.npz", **arrays)
        request = {
            "onnx": str(folder / "float.onnx"),
            "calibration": str(folder / "samples.npz"),
            "mode": MODES[plan.precision],
            "out": str(folder / "quantized.onnx"),
        }
        script = toolchains.script("modelopt_quantize")
        result = toolchains.call("modelopt", script, request, folder / "work", TIMEOUT_S)
        quantized = ir.load(result["out"])
        ir.external_data.load_to_model(quantized)
    for node in quantized.graph:  # ModelOpt drops the notes of where a node is from
        node.metadata_props.update(scopes.get(str(node.name), {}))
    products = [node for node in quantized.graph if node.op_type in ("Conv", "MatMul", "Gemm")]
    return quantized, {
        "numbers": MODES[plan.precision],
        "by": f"ModelOpt {result['versions']['nvidia-modelopt']}",
        "operations": [{"node": str(n.name), "op": n.op_type, "module": module_of(n)} for n in products if _fed(n)],
        "left_in_floats": [str(node.name) for node in products if not _fed(node)],
    }


def _fed(node: ir.Node) -> bool:
    """Whether both factors of an operation come out of a DequantizeLinear."""
    makers = [value.producer() if value is not None else None for value in node.inputs[:2]]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
