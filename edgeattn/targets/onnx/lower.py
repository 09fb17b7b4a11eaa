"""From a captured program to .onnx files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeattn.capture import Program
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan
from edgeattn.targets.onnx import FULL, HALF
from edgeattn.targets.onnx_graph.blocks import blocks, divide_norms
from edgeattn.targets.onnx_graph.caches import half_caches
from edgeattn.targets.onnx_graph.export import OPSET, export, name_nodes, step_entry, tensors, tidy
from edgeattn.targets.onnx_graph.files import save, weight_bytes
from edgeattn.targets.onnx_graph.fp16 import to_fp16
from edgeattn.targets.onnx_graph.qdq import CPU_INT7, CPU_INT8, Calibration, in_floats, nothing_to_quantize, weighted
from edgeattn.targets.onnx_graph.weights import small_weights, weights_words

#: Matrix products of two tensors of data, as attention has them: they stay in floats.
_PRODUCTS = ("MatMul", "Einsum")


def _without_half_kernel(node: ir.Node) -> str | None:
    """Why ONNX Runtime does not take a node in float16; None where it does.

    On ARM its CPU provider (1.32, measured) moves AveragePool into a layout of its own, in which it has the
    kernel of opset 11 alone: with the definition of opset 19 the session fails to load.
    """
    return "on ARM, ONNX Runtime has no float16 kernel of this opset" if node.op_type == "AveragePool" else None


def _quantized(model: ir.Model, plan: LowerPlan) -> tuple[ir.Model, dict[str, Any]]:
    """The graph with integers where the plan wants them, and what was done.

    Raises:
        CheckFailed: there is nothing to quantize.
    """
    found = weighted(model)
    products = [n for n in model.graph if n.op_type in _PRODUCTS and not any(n is w.node for w in found)]
    if plan.precision == "w8a8":
        calibration = Calibration(
            model, plan.calibration, CPU_INT8 if plan.options["weight_range"] == FULL else CPU_INT7, plan.quant
        )
        done, words = calibration.facts(), calibration.numbers.name
        model = calibration.apply(model)
    else:
        words, done = weights_words(plan.quant), small_weights(model, plan.quant)
    if not done:
        raise nothing_to_quantize(plan.precision)
    names = {item["node"] for item in done}
    left = in_floats(model, {str(w.node.name) for w in found} - names)
    left["left_in_floats"] += [str(n.name) for n in products]
    return model, {"numbers": words, "operations": done, **left}


def _in_blocks(model: ir.Model, plan: LowerPlan) -> dict[str, Any]:
    """A decoder's graph with its weights in blocks, and what was done.

    Raises:
        CheckFailed: there is nothing to quantize.
    """
    found = weighted(model)
    done = blocks(model, plan.quant)
    if not done:
        raise nothing_to_quantize(plan.precision)
    names = {item["node"] for item in done}
    words = f"int{plan.quant.scheme('').weights} weights in blocks of {plan.quant.group}"
    return {"numbers": words, "operations": done, **in_floats(model, {str(w.node.name) for w in found} - names)}


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write one .onnx file for each entry into ``out``: ``model.onnx`` for ``main``.

    Inputs and outputs stay float32 in all precisions, so that the caller's code does not change with it.

    Raises:
        ConversionFailed: lists the operations without an ONNX form and their modules. CheckFailed: nothing to quantize.
    """
    entries: dict[str, ArtifactEntry] = {}
    facts: dict[str, Any] = {"opset": OPSET, "entries": {}}
    made: dict[int, str] = {}
    for name, entry in program.entries.items():
        if id(entry.graph) in made:  # a decoder's entries are one graph, run with other sizes
            entries[name] = step_entry(made[id(entry.graph)], entry, program.decoder, plan.options["cache"])
            continue
        model = export(entry)
        if program.decoder:
            divide_norms(model)
        note: dict[str, Any] = {}
        if plan.precision == "fp16":
            model, kept = to_fp16(model, plan.samples_of(name), refused=_without_half_kernel)
            note["kept_in_fp32"] = [k.as_dict() for k in kept]
            plan.allow(note["kept_in_fp32"])
        elif plan.quant.quantizes:
            name_nodes(model)
            if program.decoder:
                note["quantized"] = _in_blocks(model, plan)
            else:
                model, note["quantized"] = _quantized(model, plan)
            facts["opset"] = model.opset_imports[""]
        if program.decoder and plan.options["cache"] == HALF:
            half_caches(model, {row for row, _ in program.decoder.rows})
        tidy(model, {**plan.metadata, "entry": name, "precision": plan.precision})
        file = "model.onnx" if name == "main" or entry.dynamic else f"{name}.onnx"
        save(model, out / file, mapped=program.decoder is not None)
        made[id(entry.graph)] = file
        if program.decoder:
            entries[name] = step_entry(file, entry, program.decoder, plan.options["cache"])
        else:
            entries[name] = ArtifactEntry(file, tensors(model.graph.inputs), tensors(model.graph.outputs))
        note["nodes"] = dict(Counter(node.op_type for node in model.graph).most_common())
        note["weight_bytes"] = weight_bytes(model)
        facts["entries"][name] = note
    if plan.precision == "w8a8":
        facts["weight_range"] = plan.options["weight_range"]
    return Artifact(out, plan.precision, entries, facts)
