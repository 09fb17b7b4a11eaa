"""From a captured program to strongly typed ONNX graphs, engines and ``build.sh``.

Every tensor's type stands in the graph: TensorRT 11 knows no other way. fp16 by casts, int8 and fp8 by pairs of
QuantizeLinear and DequantizeLinear. All entries are written and parsed before the first engine is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgeattn.capture import Caches, Entry, Program
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.numerics import TOLERANCES, Array, compare
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan, Tensor
from edgeattn.targets.onnx_graph.caches import half_caches
from edgeattn.targets.onnx_graph.execute import module_of, outputs_of
from edgeattn.targets.onnx_graph.export import OPSET, export, name_nodes, tensors, tidy
from edgeattn.targets.onnx_graph.files import save, weight_bytes
from edgeattn.targets.onnx_graph.fp16 import to_fp16
from edgeattn.targets.onnx_graph.qdq import NUMBERS, Calibration, in_floats, nothing_to_quantize, weighted
from edgeattn.targets.onnx_graph.weights import small_weights, weights_words
from edgeattn.targets.tensorrt import FIRST_FP8, PORTABLE, RTX, TIGHT, modelopt
from edgeattn.targets.tensorrt.engine import Builder, Profiles
from edgeattn.targets.tensorrt.trtexec import Build, script
from edgeattn.targets.tensorrt.weights import small_weights as decoder_weights

#: Matrix products, which TensorRT for RTX does not have in float32 for compute capability 7.5.
_PRODUCTS = ("MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")
#: In so many steps operations go back to floats while the outputs are too far off; a tenth each.
_PARTS = 10
#: Samples are not all inputs: of what verification allows this share may be used on them.
_NEAR = 0.8


def _quantized(
    model: ir.Model, references: Sequence[Mapping[str, Array]], plan: LowerPlan
) -> tuple[ir.Model, dict[str, Any]]:
    """The graph with small numbers at its weighted operations, but for those that the outputs cannot bear.

    While an output is further off than ``_NEAR`` of the tolerance, the operations that lose most go back to floats.

    Args:
        references: outputs in float32, for each sample of the plan.

    Raises:
        CheckFailed: there is none, or even a tenth of them (one at least) is too much.
    """
    calibration = Calibration(model, plan.calibration or plan.samples, NUMBERS[plan.precision], plan.quant)
    loud = [str(w.node.name) for w in sorted(calibration.operations, key=lambda w: -w.noise)]
    if not loud:
        raise nothing_to_quantize(plan.precision)
    all_of_them = {str(w.node.name) for w in weighted(model)}
    near, worst, where = _NEAR * (TOLERANCES | TIGHT)[plan.precision], 0.0, ""
    for count in sorted({min(round(len(loud) * part / _PARTS), len(loud) - 1) for part in range(_PARTS)}):
        without = set(loud[:count])
        quantized = calibration.apply(model, without)
        outputs = [outputs_of(quantized, feeds) for feeds in plan.samples]
        pairs = zip(references, outputs, strict=True)
        worst, where = max(
            (compare(value, ours[name]).relative_l2, name) for wanted, ours in pairs for name, value in wanted.items()
        )
        if worst <= near:
            return quantized, {
                "numbers": NUMBERS[plan.precision].name,
                "operations": calibration.facts(without),
                **in_floats(model, without | (all_of_them - set(loud))),
            }
    raise CheckFailed(
        f"the model does not hold in {plan.precision}",
        value=f"relative L2 {worst:.3g} on {where}, {len(loud) - count} of {len(loud)} operations quantized",
        why=f"{near:g} is wanted on the samples, which leaves a fifth of what verification allows",
        fix="--precision fp16",
    )


def _small(model: ir.Model, plan: LowerPlan, decoder: bool) -> dict[str, Any]:
    """Store weights in 8 or 4 bits, in place; the engine computes with them in float16.

    Raises:
        CheckFailed: there is none.
    """
    before = {str(w.node.name) for w in weighted(model)}
    if decoder:
        done = decoder_weights(model, plan.quant, plan.options["flavour"])
    else:
        done = small_weights(model, plan.quant, standard=True)
    if not done:
        raise nothing_to_quantize(plan.precision)
    left = in_floats(model, before - {item["node"] for item in done})
    return {"numbers": weights_words(plan.quant), "operations": done, **left}


def _typed(entry: Entry, name: str, plan: LowerPlan, decoder: Caches | None = None) -> tuple[ir.Model, dict[str, Any]]:
    """An entry in the plan's precision, and what is worth knowing of it."""
    model = export(entry)
    name_nodes(model)
    note: dict[str, Any] = {}
    if plan.precision in NUMBERS and plan.options["quantizer"] == "modelopt":
        model, note["quantized"] = modelopt.quantize(model, plan)
        return _noted(model, name, plan, note)
    references = [outputs_of(model, feeds) for feeds in plan.samples] if plan.precision in NUMBERS else []
    if plan.precision != "fp32":
        model, kept = to_fp16(model, plan.samples_of(name), half_inside=True)
        note["kept_in_fp32"] = [k.as_dict() for k in kept]
        plan.allow(note["kept_in_fp32"])
        if decoder:
            half_caches(model, [row for row, _ in decoder.rows])
    if plan.precision in NUMBERS:
        model, note["quantized"] = _quantized(model, references, plan)
    elif plan.quant.quantizes:
        note["quantized"] = _small(model, plan, decoder is not None)
    return _noted(model, name, plan, note)


def _noted(model: ir.Model, name: str, plan: LowerPlan, note: dict[str, Any]) -> tuple[ir.Model, dict[str, Any]]:
    """A finished graph, tidied, with what can be read of it in ``note``."""
    name_nodes(model)
    tidy(model, {**plan.metadata, "entry": name, "precision": plan.precision})
    note["nodes"] = dict(Counter(node.op_type for node in model.graph).most_common())
    note["modules"] = {str(node.name): module for node in model.graph if (module := module_of(node))}
    note["weight_bytes"] = weight_bytes(model)
    return model, note


def _check_compute(model: ir.Model, plan: LowerPlan, compute: str) -> None:
    """What a GPU is known not to have, said before anything is built.

    Raises:
        ConversionFailed: names the modules.
    """
    if compute == PORTABLE:
        return
    if plan.precision == "fp8" and float(compute) < FIRST_FP8:
        raise ConversionFailed(
            "the GPU has no fp8",
            value=f"compute {compute}",
            why=f"fp8 begins with compute capability {FIRST_FP8}",
            fix="--precision w8a8, or fp16",
        )
    found = [
        node
        for node in model.graph
        if compute == "7.5" and node.op_type in _PRODUCTS and node.outputs[0].dtype == ir.DataType.FLOAT
    ]
    if found:
        raise ConversionFailed(
            "the GPU cannot multiply matrices in float32",
            value=f"compute {compute}",
            where=f"module {module_of(found[0]) or '(model)'}",
            why=f"TensorRT for RTX has no float32 matrix product for Turing; the graph has {len(found)}",
            fix="--precision fp16, or -O flavour=full (TensorRT 10 has it, and builds on the device)",
            details=[f"{node.op_type} in module {module_of(node) or '(model)'}" for node in found],
        )


def _check_options(plan: LowerPlan) -> None:
    """Raises UsageError for what the flavour cannot do here."""
    if plan.options["flavour"] == RTX and plan.options["strip"] == "yes":
        raise UsageError(
            "a stripped plan cannot be made here",
            value="strip=yes",
            where="target tensorrt",
            why="TensorRT for RTX strips plans on a machine with a GPU only",
            fix="leave it away; with -O flavour=full build.sh strips on the device",
        )


def _shapes(model: ir.Model, entry: Entry, plan: LowerPlan) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of inputs and outputs on the samples, the usual ones first; {} where nothing varies."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for feeds in plan.samples if entry.dynamic else ():
        for name, value in {**feeds, **outputs_of(model, feeds)}.items():
            found.setdefault(name, []).append(value.shape)
    return found


def _profiles(inputs: Sequence[Tensor]) -> Profiles:
    """By input with dynamic dimensions: smallest, usual and largest shape."""
    found: dict[str, tuple[list[int], list[int], list[int]]] = {}
    for spec in inputs:
        ends = {axis: sizes for axis, *sizes in spec.dynamic}
        if ends:
            low, opt, high = ([ends[i][k] if i in ends else n for i, n in enumerate(spec.shape)] for k in range(3))
            found[spec.name] = (low, opt, high)
    return found


def _build_of(file: str, plan: LowerPlan, profiles: Profiles) -> Build:
    """What ``build.sh`` does on a device for an entry."""
    workspace = plan.options["workspace_mb"]
    return Build(
        onnx=file,
        engine=f"{Path(file).stem}.engine",
        precision=plan.precision,
        profiles={name: tuple(map(tuple, shapes)) for name, shapes in profiles.items()},  # type: ignore[misc]
        workspace_mb=None if workspace == "default" else int(workspace),
        weight_streaming=plan.options["weight_streaming"] == "yes",
        strip=plan.options["strip"] == "yes",
        timing_cache="timing.cache",
        level=None if plan.options["level"] == "3" else int(plan.options["level"]),
    )


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write a graph for each entry (``model.onnx`` for ``main``), an engine for each compute capability, ``build.sh``.

    Raises:
        ConversionFailed: lists nodes that the parser does not take, or says why no engine can be built.
        CheckFailed: the plan is strict, and operations need float32. UsageError: an option that the flavour lacks.
    """
    _check_options(plan)
    flavour = plan.options["flavour"]
    computes = plan.options["compute"].split("+") if flavour == RTX else []
    entries: dict[str, ArtifactEntry] = {}
    facts: dict[str, Any] = {}
    parsed: dict[str, tuple[Builder, Profiles]] = {}
    for name, entry in program.entries.items():
        model, note = _typed(entry, name, plan, program.decoder)
        for compute in computes:
            _check_compute(model, plan, compute)
        file = "model.onnx" if name == "main" else f"{name}.onnx"
        save(model, out / file)
        builder = Builder(out / file, flavour)
        note["network"] = builder.parse()
        shapes = _shapes(model, entry, plan)
        inputs = tensors(model.graph.inputs, shapes, entry.dynamic)
        profiles = _profiles(inputs)
        note["profiles"] = {n: dict(zip(("min", "opt", "max"), map(list, s), strict=True)) for n, s in profiles.items()}
        note["parser"] = {"distribution": builder.distribution, "version": builder.version}
        entries[name] = ArtifactEntry(file, inputs, tensors(model.graph.outputs, shapes))
        facts[name], parsed[name] = note, (builder, profiles)
    for name, (builder, profiles) in parsed.items():
        facts[name]["engines"] = []
        for compute in computes:
            built = builder.build(compute, plan.precision, plan.options, profiles)
            which = compute if compute == PORTABLE else f"sm{compute.replace('.', '')}"
            file = f"{Path(entries[name].file).stem}.{which}.engine"
            (out / file).write_bytes(built.plan)
            facts[name]["engines"].append(
                {
                    "file": file,
                    "compute_capability": compute,
                    "tensorrt": builder.version,
                    "bytes": len(built.plan),
                    "seconds": round(built.seconds, 2),
                    "names_inside": all(t.name.encode() in built.plan for t in entries[name].inputs),
                }
            )
    builds = {name: _build_of(entry.file, plan, parsed[name][1]) for name, entry in entries.items()}
    (out / "build.sh").write_text(script(builds), encoding="utf-8")
    about = {"opset": OPSET, "flavour": flavour, "options": dict(plan.options), "entries": facts}
    return Artifact(out, plan.precision, entries, about)
