"""From a captured program to .mlpackage folders: one for each entry."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._decomp import get_decompositions

from edgeattn.capture import Entry, Program
from edgeattn.core.errors import ConversionFailed, UsageError
from edgeattn.core.quiet import quiet
from edgeattn.quant.plan import BITS
from edgeattn.targets.base import BGR, Artifact, ArtifactEntry, LowerPlan, Tensor
from edgeattn.targets.coreml.describe import describe
from edgeattn.targets.coreml.facts import facts_of
from edgeattn.targets.coreml.images import pixels_of, take_pixels
from edgeattn.targets.coreml.mends import mend
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.modules import holder_of, modules_of, note_modules, owner_of, path_of
from edgeattn.targets.coreml.quantize import quantize
from edgeattn.targets.coreml.save import save

#: What an input or output can be called in an ML program.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Prepared:
    """An entry as the converter gets it.

    Attributes:
        inputs, outputs: fake tensors by the recipe's names.
        pixels: factor and offset of each channel where the first input is an image.
        mends: how many places each one changed.
        halves: inputs and outputs in float16 whatever the plan says of the others.
    """

    graph: torch.export.ExportedProgram
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    pixels: tuple[tuple[float, float], ...]
    mends: dict[str, int]
    halves: frozenset[str] = frozenset()

    def tensors(self, plan: LowerPlan) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and outputs as Core ML takes and gives them."""

        def tensor(name: str, value: torch.Tensor) -> Tensor:
            dtype = "float16" if name in self.halves else np.dtype(_dtype(value, plan)).name
            return Tensor(name, tuple(value.shape), dtype)

        inputs = [tensor(n, v if v.dim() else v.reshape(1)) for n, v in self.inputs.items()]
        return inputs, [tensor(n, v) for n, v in self.outputs.items()]


def prepare(
    entry: Entry, plan: LowerPlan, without: frozenset[str] = frozenset(), halves: frozenset[str] = frozenset()
) -> Prepared:
    """Decompose, mend, and note the module of each node where the converter carries it on.

    Args:
        without: mends to leave out. halves: see ``Prepared``.

    Raises:
        ConversionFailed: an input or output has a name that Core ML has no form for.
    """
    _check_names(entry)
    graph = entry.graph.run_decompositions({})
    changed = Counter(mend(graph.graph_module, plan.precision, without))
    if split := _splits(graph):
        graph = graph.run_decompositions(split)
        changed.update(mend(graph.graph_module, plan.precision, without))
    (returned,) = graph.graph.output_node().args
    assert isinstance(returned, list | tuple)
    for spec, node in zip(graph.graph_signature.output_specs, returned, strict=True):
        if isinstance(node, fx.Node):
            spec.arg = torch.export.graph_signature.TensorArgument(name=node.name)  # a mend may have replaced it
    placeholders = {node.name: node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"}
    inputs = dict(zip(entry.inputs, (placeholders[str(n)] for n in graph.graph_signature.user_inputs), strict=True))
    own = returned[len(returned) - len(entry.outputs) :]
    outputs = {n: node.meta["val"] for n, node in zip(entry.outputs, own, strict=True) if isinstance(node, fx.Node)}
    pixels: tuple[tuple[float, float], ...] = ()
    if plan.options["image"] != "no":
        pixels = pixels_of(plan.preprocess, plan.options["image"], next(iter(inputs.values())))
        take_pixels(graph, pixels)
    given = {str(name) for name in graph.graph_signature.user_inputs}
    for node in graph.graph.nodes:
        parameters = graph.graph_signature.inputs_to_parameters
        node.meta["stack_trace"] = path_of(owner_of(node, given)) or holder_of(node, parameters)
    return Prepared(graph, inputs, outputs, pixels, dict(changed), halves)


def _check_names(entry: Entry) -> None:
    """The converter would give other names in silence, and nobody could feed the package by the recipe's."""
    unfit = [name for name in (*entry.inputs, *entry.outputs) if not _NAME.fullmatch(name)]
    if unfit:
        raise ConversionFailed(
            "Core ML cannot call an input or output so",
            value=", ".join(unfit),
            where="module (model)",
            why="names in an ML program are letters, digits and underscores",
            fix="give others in the recipe ([inputs], outputs) or with --input",
        )


def _unknown(graph: torch.export.ExportedProgram) -> list[fx.Node]:
    """Nodes whose operation the converter does not know."""
    with quiet():
        from coremltools.converters.mil.frontend.torch.torch_op_registry import is_torch_fx_node_supported

    # Names that end in an underscore would stop the question itself; they are those of the mend ``dunder``.
    asked = [n for n in graph.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    return [n for n in asked if n.target.__name__.split(".")[0].endswith("_") or not is_torch_fx_node_supported(n)]


def _splits(graph: torch.export.ExportedProgram) -> dict[Any, Any]:
    """PyTorch's own decompositions of the operations that the converter does not know."""
    unknown: list[Any] = list({node.target: None for node in _unknown(graph)})
    return dict(get_decompositions(unknown)) if unknown else {}


def _dtype(value: torch.Tensor, plan: LowerPlan) -> type[Any]:
    """What Core ML takes or gives for a tensor: it has no 64-bit numbers there and no bool."""
    if not value.is_floating_point():
        return np.int32
    return np.float16 if plan.options["io"] == "float16" else np.float32


def _check_nodes(graph: torch.export.ExportedProgram) -> None:
    """Whether the converter knows every operation, said with all of them before it stops at the first.

    Raises:
        ConversionFailed: lists those that it does not know, with their modules.
    """
    unknown: dict[str, list[str]] = {}
    for node in _unknown(graph):
        unknown.setdefault(str(node.target), []).append(path_of(node) or "(model)")
    if unknown:
        first = next(iter(unknown))
        raise ConversionFailed(
            "coremltools cannot convert an operation of the model",
            value=", ".join(unknown),
            where=f"module {unknown[first][0]}",
            why="it has no converter for it",
            fix="write that module with other operations",
            details=[f"{target} in {', '.join(dict.fromkeys(paths))}" for target, paths in unknown.items()],
        )


@contextmanager
def _following() -> Iterator[list[str]]:
    """While this lasts the list holds kind and module path of the node that the converter stands at."""
    from coremltools.converters.mil.frontend.torch import ops

    convert_node, stood = ops.convert_single_node, ["", ""]

    def follow(context: Any, node: Any) -> None:
        stood[:] = [str(node.kind), str((node.meta or {}).get("stack_trace") or "")]
        convert_node(context, node)

    ops.convert_single_node = follow
    try:
        yield stood
    finally:
        ops.convert_single_node = convert_node


def convert(prepared: Prepared, plan: LowerPlan) -> Any:
    """The model in coremltools' form.

    Raises:
        ConversionFailed: names the operation and the module at which the converter stopped.
    """
    with quiet():
        import coremltools as ct

        _check_nodes(prepared.graph)
        taken, given = prepared.tensors(plan)
        inputs = [ct.TensorType(t.name, t.shape, dtype=np.dtype(t.dtype).type) for t in taken]
        layouts = {"rgb": "RGB", "bgr": "BGR", "gray": "GRAYSCALE"}
        if prepared.pixels:
            layout = getattr(ct.colorlayout, layouts[plan.options["image"]])
            inputs[0] = ct.ImageType(inputs[0].name, tuple(inputs[0].shape.shape), color_layout=layout)
        outputs = [ct.TensorType(t.name, dtype=np.dtype(t.dtype).type) for t in given]
        classifier = ct.ClassifierConfig(list(plan.labels)) if plan.options["classifier"] == "yes" else None
        with _following() as stood:
            try:
                return ct.convert(
                    prepared.graph,
                    inputs=inputs,
                    # The converter counts a classifier's outputs wrongly when they are given.
                    outputs=None if classifier else outputs,
                    minimum_deployment_target=getattr(ct.target, plan.options["deployment"]),
                    compute_precision=ct.precision.FLOAT32 if plan.precision == "fp32" else ct.precision.FLOAT16,
                    classifier_config=classifier,
                    skip_model_load=True,
                )
            except Exception as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise ConversionFailed(
                    "coremltools cannot convert the model",
                    value=stood[0] or None,
                    where=f"module {stood[1] or '(model)'}",
                    why=f"{type(error).__name__}: {lines[0] if lines else ''}"[:400],
                    fix="'edgeattn lint MODEL --target coreml' names patterns that are known to fail, and their mend",
                    details=lines[1:6],
                ) from error


def _check_classifier(plan: LowerPlan, prepared: Prepared) -> None:
    if plan.options["classifier"] != "yes":
        return
    shapes = [tuple(value.shape) for value in prepared.outputs.values()]
    if not plan.labels or shapes != [(1, len(plan.labels))]:
        raise UsageError(
            "the model cannot be a Core ML classifier",
            value="classifier=yes",
            why=f"the recipe has {len(plan.labels)} labels, the outputs are {', '.join(map(str, shapes))}",
            fix='write labels = ["cat", "dog"] into the recipe, one for each column of its only output (1, N)',
        )


def _name_probabilities(model: Any, name: str) -> None:
    """Call a classifier's numbers as the recipe calls the output; the predicted label is ``classLabel``."""
    from coremltools.models.utils import rename_feature

    description = model._spec.description
    rename_feature(model._spec, description.predictedProbabilitiesName, name, rename_inputs=False)
    description.predictedProbabilitiesName = name


def _entry(file: str, prepared: Prepared, plan: LowerPlan) -> ArtifactEntry:
    """Inputs and outputs as the package takes and gives them."""
    inputs, outputs = prepared.tensors(plan)
    if prepared.pixels:
        layout = BGR if plan.options["image"] == "bgr" else ""
        inputs[0] = Tensor(inputs[0].name, inputs[0].shape, "uint8", layout, prepared.pixels)
    return ArtifactEntry(file, tuple(inputs), tuple(outputs))


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write ``ENTRY.mlpackage`` into ``out`` for each entry, with the recipe's names.

    Raises:
        ConversionFailed: names the operation and the module. UsageError: an image input or a classifier is asked for,
            and the recipe or the model has nothing to make it of.
    """
    entries, facts = {}, {}
    for name, entry in program.entries.items():
        prepared = prepare(entry, plan)
        _check_classifier(plan, prepared)
        model = convert(prepared, plan)
        file, modules, note = f"{name}.mlpackage", modules_of(model._mil_program), {}
        entries[name] = _entry(file, prepared, plan)
        if plan.precision in BITS:
            made = quantize(model, modules, entries[name].inputs, plan)
            model, modules, note = made.model, made.modules, {"quantized": made.facts}
        describe(model, plan, {"": note_modules(modules)})
        if plan.options["classifier"] == "yes":
            _name_probabilities(model, *prepared.outputs)
        save(model, out / file)
        facts[name] = facts_of(open_package(out / file)) | {"mends": prepared.mends} | note
    about = {"options": dict(plan.options), "labels": list(plan.labels), "entries": facts}
    return Artifact(out, plan.precision, entries, about)
