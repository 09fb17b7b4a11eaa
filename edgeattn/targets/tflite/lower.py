"""From a captured program to one .tflite file: every entry a signature, weights shared."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from edgeattn.capture import Entry, Program
from edgeattn.core.errors import ConversionFailed, EdgeAttnError
from edgeattn.core.quiet import quiet
from edgeattn.targets.base import NHWC, Artifact, ArtifactEntry, LowerPlan, Tensor
from edgeattn.targets.tflite import flatbuffer
from edgeattn.targets.tflite.fp16 import to_fp16
from edgeattn.targets.tflite.heads import without_transposes
from edgeattn.targets.tflite.lint import lint_flatbuffer
from edgeattn.targets.tflite.lookups import computed_tables, lookups
from edgeattn.targets.tflite.matmul import matmuls, whole_inputs
from edgeattn.targets.tflite.modules import MARK, mark_outputs, marked, modules, note_outputs, paths_in, put_last_first
from edgeattn.targets.tflite.pools import plain_pools
from edgeattn.targets.tflite.quantize import quantize
from edgeattn.targets.tflite.versions import too_new
from edgeattn.targets.tflite.xnnpack import check_blocks

#: One file holds all entries.
FILE = "model.tflite"
#: A flatbuffer's offsets are signed 32-bit numbers, and the converter writes float32 whatever the precision.
LARGEST = 2**31 - 1


def _channels_last(module: fx.GraphModule, images: frozenset[int]) -> None:
    """Let the graph take these of its inputs as (B, H, W, C) instead of (B, C, H, W)."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in [n for n in graph.nodes if n.op == "call_module" and "_guards" in str(n.target)]:
        graph.erase_node(node)  # compares the inputs with the shapes of the capture
    for index in images:
        node = placeholders[index]
        with graph.inserting_after(placeholders[-1]):
            first = graph.call_function(torch.ops.aten.permute.default, (node, [0, 3, 1, 2]))
        node.replace_all_uses_with(first, delete_user_cb=lambda user, first=first: user is not first)
        first.meta["val"] = node.meta["val"]
        node.meta["val"] = node.meta["val"].permute(0, 2, 3, 1)
    module.recompile()


def _path(node: fx.Node) -> str:
    """Of the torch module that a node came from; "" outside of any child."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _owners(graph: fx.Graph) -> dict[fx.Node, str]:
    """Path of the module inside of an operation's own whose weights it reads, of those that read the weights of one."""
    constant: dict[fx.Node, set[str]] = {}
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant[node] = {str(node.target).rpartition(".")[0]}
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            read = set().union(*(constant.get(each, set()) for each in inputs))
            around = _path(node)
            if len(read) == 1 and (not around or next(iter(read)).startswith(f"{around}.")):
                found[node] = next(iter(read))
            if inputs and all(each in constant for each in inputs):
                constant[node] = read
    return found


def _mark(module: fx.GraphModule) -> dict[fx.Node, str]:
    """Have the converter name tensors by the full path of their torch module; of its own it leaves parts out.

    Returns:
        The mark of every node.
    """
    owners = _owners(module.graph)
    marks = {node: marked(_path(node), owners.get(node, "")) for node in module.graph.nodes}
    for node, mark in marks.items():
        node.meta["nn_module_stack"] = {"": ("", mark)}
    return marks


def _check_size(program: Program) -> None:
    """Whether the weights fit in one file, said before the conversion.

    Raises:
        ConversionFailed: they do not.
    """
    tensors = (t for entry in program.entries.values() for t in entry.graph.state_dict.values())
    total = sum({t.data_ptr(): t.nbytes for t in tensors if isinstance(t, torch.Tensor)}.values())
    if total > LARGEST:
        raise ConversionFailed(
            "the weights do not fit in a .tflite file",
            value=f"{total / 1e9:.2f} GB in float32",
            why=f"a flatbuffer holds {LARGEST / 1e9:.2f} GB",
            fix="--target onnx, which keeps large weights beside the graph; or a smaller model",
        )


def _zeros(entry: Entry) -> list[torch.Tensor]:
    """Zeros in the shape and dtype of every input."""
    names = entry.graph.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in entry.graph.graph.nodes if node.op == "placeholder"}
    return [torch.zeros(values[name].shape, dtype=values[name].dtype) for name in names if isinstance(name, str)]


@dataclass(frozen=True)
class _Prepared:
    """An entry as the converter gets it.

    Attributes:
        inputs: examples. images: the numbers of those that have their channels last.
        rewritten: projections that need no transpose any more.
        came_from: the torch module of each output, by the recipe's name.
        marks: of the outputs, see ``marked``. places: where each mark's operations stand in the graph.
        tables: see ``computed_tables``.
    """

    module: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    images: frozenset[int]
    rewritten: int
    came_from: dict[str, str]
    marks: list[str]
    places: dict[str, list[int]]
    tables: frozenset[bytes]


def _prepare(entry: Entry, layout: str) -> _Prepared:
    module = entry.graph.module()
    assert isinstance(module, fx.GraphModule)
    plain_pools(module)
    lookups(module)
    rewritten = without_transposes(module)
    inputs = _zeros(entry)
    images: frozenset[int] = frozenset()
    if layout == NHWC:
        images = frozenset(i for i, x in enumerate(inputs) if x.ndim == 4 and x.is_floating_point())
        inputs = [x.permute(0, 2, 3, 1).contiguous() if i in images else x for i, x in enumerate(inputs)]
        _channels_last(module, images)
    (returned,) = module.graph.output_node().args
    assert isinstance(returned, list | tuple)
    came_from = {
        name: _path(node) for name, node in zip(entry.outputs, returned, strict=True) if isinstance(node, fx.Node)
    }
    marks = _mark(module)
    places: dict[str, list[int]] = {}
    for place, mark in enumerate(marks.values()):
        places.setdefault(mark.strip(MARK), []).append(place)
    given = [marks[node] if isinstance(node, fx.Node) else marked("") for node in returned]
    tables = computed_tables(module.buffers())
    return _Prepared(module, tuple(inputs), images, rewritten, came_from, given, places, tables)


def _convert(program: Program, prepared: Mapping[str, _Prepared]) -> bytes:
    """All entries in one file."""
    with quiet():
        from litert_torch._convert import core
        from litert_torch._convert.signature import Signature

        signatures = [Signature(name, entry.module, entry.inputs, {}) for name, entry in prepared.items()]
        try:
            return bytes(core.convert_signatures(signatures).model_content())
        except EdgeAttnError:
            raise
        except Exception as error:
            raise _failure(program, error) from error


def _without_form(program: Program) -> list[str]:
    """Every operation that the converter has no lowering for, with its module path."""
    from litert_torch import fx_infra
    from litert_torch.backend.lowerings import registry

    found: set[str] = set()
    with quiet(), contextlib.suppress(Exception):
        for entry in program.entries.values():
            graph = fx_infra.safe_run_decompositions(entry.graph, fx_infra.decomp.pre_convert_decomp())
            graph = fx_infra.safe_run_decompositions(graph, fx_infra.decomp.pre_lower_decomp())
            for node in graph.graph.nodes:
                if node.op != "call_function" or "getitem" in str(node.target):
                    continue
                if registry.global_registry.lookup(node.target) is None:
                    found.add(f"{node.target} in module {_path(node) or '(model)'}")
    return sorted(found)


def _failure(program: Program, error: Exception) -> ConversionFailed:
    """All that the converter has no form for; or its own reason, with the operation and the modules that have it."""
    said = str(error)
    found = _without_form(program) if "Lowering not found" in said else []
    if found:
        return ConversionFailed(
            "operations have no TFLite form",
            why=f"{len(found)} found",
            fix="write them with other PyTorch operations",
            details=found,
        )
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    lines = [line.strip() for line in str(first.args[0] if first.args else first).splitlines() if line.strip()]
    paths = set(paths_in(said))
    called = re.search(r"While executing %\S+ : .*target=torch\.ops\.([\w.]+)", said)
    if called and not paths:
        nodes = [node for entry in program.entries.values() for node in entry.graph.graph.nodes]
        paths = {_path(node) for node in nodes if str(node.target) == called[1]}
    return ConversionFailed(
        "the TFLite converter failed",
        value=called[1] if called else None,
        why=f"{type(first).__name__}: {lines[0] if lines else ''}"[:400],
        where=f"module {', '.join(m or '(model)' for m in sorted(paths)[:5])}" if paths else None,
        details=[line for line in lines[1:6] if not line.startswith(("Original traceback", "None", "Use tlparse"))],
    )


def _inputs(model: Any, name: str, entry: Entry, images: frozenset[int]) -> tuple[Tensor, ...]:
    """Inputs of a converted entry, with the recipe's names.

    Args:
        images: numbers of those that have their channels last.
    """
    item = flatbuffer.signature(model, name)
    numbered, graph = flatbuffer.numbered(item.inputs), model.subgraphs[item.subgraphIndex]
    return tuple(
        flatbuffer.tensor_of(graph, numbered[i].tensorIndex, n, NHWC if i in images else "")
        for i, n in enumerate(entry.inputs)
    )


def _outputs(model: Any, name: str, entry: Entry) -> tuple[Tensor, ...]:
    """Outputs of a renamed entry."""
    item = flatbuffer.signature(model, name)
    where = {flatbuffer.text(one.name): one.tensorIndex for one in item.outputs}
    return tuple(flatbuffer.tensor_of(model.subgraphs[item.subgraphIndex], where[n], n) for n in entry.outputs)


def lower(program: Program, plan: LowerPlan, out: Path) -> Artifact:
    """Write ``model.tflite`` into ``out``: a signature for each entry, with the recipe's names.

    64-bit integers become 32-bit ones: a device's runtime takes no others. With ``plan.layout`` NHWC, float inputs of
    four dimensions are taken as (B, H, W, C), which saves the transpose at the start. What ``plan.runtime`` does not
    know is among the findings, as an error.

    Raises:
        ConversionFailed: lists the operations without a TFLite form and their modules; the weights are too large; or
            the runtime would compute the precision wrong.
        CheckFailed: there is nothing to quantize, or there are no samples to measure ranges on.
    """
    _check_size(program)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # jax, which the converter traces with, looks for a TPU otherwise
    prepared = {name: _prepare(entry, plan.layout) for name, entry in program.entries.items()}
    model = flatbuffer.read(_convert(program, prepared))
    for name, one in prepared.items():
        put_last_first(model, name, one.places)
        mark_outputs(model, name, one.marks)
    flatbuffer.distinct_names(model)
    matmuls(model)
    whole_inputs(model)
    inputs = {name: _inputs(model, name, entry, prepared[name].images) for name, entry in program.entries.items()}
    would_do = ""
    quantized: dict[str, dict[str, Any]] = {}
    if plan.precision != "fp32":
        would_do = "" if any(too_new(model, name) for name in program.entries) else "fp32"
    tables = frozenset().union(*(one.tables for one in prepared.values()))
    if plan.precision == "fp16":
        to_fp16(model, plan.runtime, tables)
    elif plan.precision != "fp32":
        model, quantized = quantize(model, plan, inputs, tables)
    for name, entry in program.entries.items():
        flatbuffer.rename(model, name, entry.inputs, entry.outputs)
        note_outputs(model, name, prepared[name].came_from)
    flatbuffer.share_weights(model)
    flatbuffer.add_metadata(model, {**plan.metadata, "precision": plan.precision})
    written = flatbuffer.write(model)
    (out / FILE).write_bytes(written)
    entries, facts, findings = {}, {}, []
    for name, entry in program.entries.items():
        entries[name] = ArtifactEntry(FILE, inputs[name], _outputs(model, name, entry))
        facts[name] = {
            **flatbuffer.facts(model, name, modules(model, name)),
            "weight_bytes": flatbuffer.weight_bytes(model),
            "projections_without_transpose": prepared[name].rewritten,
            **({"quantized": quantized[name]} if name in quantized else {}),
        }
        check_blocks(model, name, written)
        findings += lint_flatbuffer(model, name, facts[name], written, runtime=plan.runtime, would_do=would_do)
    return Artifact(
        out,
        plan.precision,
        entries,
        {"runtime": plan.runtime, "operator_versions": flatbuffer.operator_versions(model), "entries": facts},
        list(dict.fromkeys(findings)),  # entries of one model have much in common
    )
