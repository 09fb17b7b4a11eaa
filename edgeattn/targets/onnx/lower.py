"""From a captured program to .onnx files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edgeattn.capture import Program
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan
from edgeattn.targets.onnx_graph.export import OPSET, export, tensors, tidy
from edgeattn.targets.onnx_graph.files import save, weight_bytes
from edgeattn.targets.onnx_graph.fp16 import to_fp16


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write one .onnx file for each entry into ``out``: ``model.onnx`` for ``main``.

    Inputs and outputs stay float32 in both precisions, so that the caller's code does not change with it.

    Raises:
        ConversionFailed: lists the operations without an ONNX form and their modules.
    """
    entries: dict[str, ArtifactEntry] = {}
    facts: dict[str, Any] = {"opset": OPSET, "entries": {}}
    for name, entry in program.entries.items():
        model = export(entry)
        note: dict[str, Any] = {}
        if plan.precision == "fp16":
            model, kept = to_fp16(model, plan.samples)
            note["kept_in_fp32"] = [k.as_dict() for k in kept]
            plan.allow(note["kept_in_fp32"])
        tidy(model, {**plan.metadata, "entry": name, "precision": plan.precision})
        file = "model.onnx" if name == "main" else f"{name}.onnx"
        save(model, out / file)
        entries[name] = ArtifactEntry(file, tensors(model.graph.inputs), tensors(model.graph.outputs))
        note["nodes"] = dict(Counter(node.op_type for node in model.graph).most_common())
        note["weight_bytes"] = weight_bytes(model)
        facts["entries"][name] = note
    return Artifact(out, plan.precision, entries, facts)
