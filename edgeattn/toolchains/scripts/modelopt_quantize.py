"""Quantizes an ONNX model with NVIDIA ModelOpt; runs in the environment of toolchain ``modelopt``.

``request.json`` in the folder that is its argument::

    {"onnx": path, "calibration": path of an .npz, "mode": "int8" or "fp8", "out": path}

The .npz has an array for each input, by its name: samples joined along the first axis, (N * B, ...), or stacked,
(N, B, ...). The result is an ONNX model with explicit QuantizeLinear and DequantizeLinear and all else in float32;
``result.json`` has ``out`` and ``versions``.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

#: A protobuf cannot hold 2 GB; what is larger keeps its weights in a file beside it.
_LIMIT = 1_900_000_000
_MODES = ("int8", "fp8")
_VERSIONS = ("nvidia-modelopt", "onnx", "onnxruntime", "torch", "numpy")


def _ranks(model: Any) -> dict[str, int]:
    """Dimensions of each input; weights that old exporters list as inputs too are none."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return {one.name: len(one.type.tensor_type.shape.dim) for one in model.graph.input if one.name not in weights}


def _calibration(path: Path, ranks: dict[str, int]) -> dict[str, Any]:
    """Samples joined along the first axis, as ModelOpt wants them."""
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    if set(arrays) != set(ranks):
        sys.exit(f"{path} has {sorted(arrays)}, the model's inputs are {sorted(ranks)}")
    for name, array in arrays.items():
        if ranks[name] == 0 or array.ndim not in (ranks[name], ranks[name] + 1):
            sys.exit(f"{name} in {path} is {array.shape}, the input has {ranks[name]} dimensions")
        if array.ndim == ranks[name] + 1:
            arrays[name] = array.reshape(-1, *array.shape[2:])
    return arrays


def main(folder: Path) -> None:
    """Read the request, quantize, write the result."""
    import modelopt.onnx.quantization as quantization  # type: ignore[import-not-found,unused-ignore]
    import onnx

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    if request["mode"] not in _MODES:
        sys.exit(f"mode is {request['mode']!r}, not one of {_MODES}")
    out = Path(request["out"]).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.load(request["onnx"])
    calibration = _calibration(Path(request["calibration"]), _ranks(model))
    # A copy: ModelOpt infers shapes and writes the result over the very file that it was given.
    copy = folder / "input.onnx"
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LIMIT
    onnx.save(model, copy, save_as_external_data=large, location="input.onnx.data" if large else None)
    quantization.quantize(
        str(copy),
        quantize_mode=request["mode"],
        calibration_data=calibration,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        use_external_data_format=large,
        output_path=str(out),
    )
    if not out.is_file():
        sys.exit(f"ModelOpt wrote no {out}")
    for path in folder.glob("input.onnx*"):
        path.unlink()
    result = {"out": str(out), "versions": {name: importlib.metadata.version(name) for name in _VERSIONS}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
