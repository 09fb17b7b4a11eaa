"""From an entry of a captured program to an ONNX graph in float32, by PyTorch's exporter."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import rewriter

from edgeattn.capture import Caches, Dynamic, Entry
from edgeattn.core.errors import ConversionFailed
from edgeattn.core.specs import IDS
from edgeattn.targets.base import ArtifactEntry, Tensor

#: The newest opset whose graphs all of our later consumers parse (TensorRT takes decomposed attention only).
OPSET = 20

#: The exporter's notes on a node that stay in the file: the module path. The others hold file paths of this machine.
_KEPT_NOTES = ("pkg.torch.onnx.name_scopes",)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _exact_constants() -> Iterator[None]:
    """While this lasts the exporter's optimizer takes a constant for 0 or 1 only if it is.

    Its patterns match within 1e-8: it would drop the addition of an epsilon of 1e-12, and a row of zeros would be
    divided by zero.
    """
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())  # private; a test tells when it moves
    values: list[Any] = [value for rule in rules for node in rule._target_pattern for value in node.inputs]
    constants = [(value, value._rel_tol, value._abs_tol) for value in values if hasattr(value, "_abs_tol")]
    try:
        for value, *_ in constants:
            value._rel_tol = value._abs_tol = 0.0
        yield
    finally:
        for value, relative, absolute in constants:
            value._rel_tol, value._abs_tol = relative, absolute


def _distinct_names(model: ir.Model) -> None:
    """Rename values inside the graph that bear the name of an input or output; the recipe chooses those freely."""
    outside = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    taken = {str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)}
    inside = [value for node in model.graph.all_nodes() for value in node.outputs]
    values = [v for v in (*inside, *model.graph.initializers.values()) if id(v) not in outside]
    used = taken | {str(value.name) for value in values}
    for value in values:
        if value.name in taken:
            number = next(i for i in itertools.count(1) if f"{value.name}_{i}" not in used)
            value.name = f"{value.name}_{number}"
            used.add(value.name)


def export(entry: Entry) -> ir.Model:
    """The entry as an ONNX graph, optimized by the exporter, with the recipe's names outside.

    Raises:
        ConversionFailed: lists the operations without an ONNX form and their modules.
    """
    try:
        with _quiet(), _exact_constants():
            program = torch.onnx.export(
                entry.graph,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(entry.inputs),
                output_names=list(entry.outputs),
            )
    except Exception as error:
        raise _failure(entry, error) from error
    if program is None:
        raise ConversionFailed("the ONNX exporter returned nothing")
    _distinct_names(program.model)
    return program.model


def _failure(entry: Entry, error: Exception) -> ConversionFailed:
    """Every operation that has no ONNX form, with its module path; or the exporter's own reason."""
    from torch.onnx._internal.exporter import _registration

    with _quiet(), contextlib.suppress(Exception):
        registry = _registration.ONNXRegistry.from_torchlib(OPSET)
        found = []
        for node in entry.graph.run_decompositions({}).graph.nodes:
            if (
                node.op == "call_function"
                and "getitem" not in str(node.target)
                and not registry.get_decomps(node.target)
            ):
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                found.append(f"{node.target} in module {stack[-1][0] if stack and stack[-1][0] else '(model)'}")
        if found:
            return ConversionFailed(
                "operations have no ONNX form",
                why=f"{len(set(found))} found",
                fix="write them with other PyTorch operations",
                details=sorted(set(found)),
            )
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    return ConversionFailed(
        "the ONNX exporter failed", why=f"{type(first).__name__}: {lines[0] if lines else ''}"[:400]
    )


def name_nodes(model: ir.Model) -> None:
    """A name of its own for every node: profiles and messages of TensorRT speak of nodes by name."""
    taken: set[str] = set()
    for i, node in enumerate(model.graph):
        name = node.name or f"node_{i}"
        if name in taken:
            name = next(n for k in itertools.count(1) if (n := f"{name}_{k}") not in taken)
        node.name = name
        taken.add(name)


def tidy(model: ir.Model, metadata: dict[str, str]) -> None:
    """Keep what is true on every machine, so that the same input gives the same bytes."""
    model.graph.name = "main"
    model.producer_name, model.producer_version = "edgeattn", metadata.get("edgeattn", "")
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update({f"edgeattn.{key}": value for key, value in sorted(metadata.items())})
    for node in model.graph.all_nodes():
        node.doc_string = None
        for key in [key for key in node.metadata_props if key not in _KEPT_NOTES]:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def tensors(
    values: Any, shapes: Mapping[str, Sequence[tuple[int, ...]]] | None = None, dynamic: Dynamic | None = None
) -> tuple[Tensor, ...]:
    """A graph's inputs or outputs as an artifact's.

    Args:
        shapes: where dimensions vary, the shapes by name that were met, the usual one first.
        dynamic: the ranges of inputs, which have a step if they need one.
    """
    found = []
    for value in values:
        name, dtype = str(value.name), str(value.dtype.numpy()) if value.dtype else "float32"
        met = (shapes or {}).get(name) or [tuple(int(n) for n in value.shape)]
        sizes = [(i, min(each), each[0], max(each)) for i, each in enumerate(zip(*met, strict=True))]
        given = (dynamic or {}).get(name, {})
        ranges = tuple((*size, *given.get(size[0], ())[3:]) for size in sizes if size[1] != size[3])
        found.append(Tensor(name, met[0], dtype, dynamic=ranges))
    return tuple(found)


def step_entry(file: str, entry: Entry, caches: Caches | None, cache: str = "float32") -> ArtifactEntry:
    """A decoder's entry; dimensions that vary stand at their largest.

    Args:
        cache: dtype of the cache and of its new rows.
    """
    assert caches is not None
    placeholders = {node.name: node.meta["val"] for node in entry.graph.graph.nodes if node.op == "placeholder"}
    given = [placeholders[str(user)] for user in entry.graph.graph_signature.user_inputs]
    inputs = []
    for name, value in zip(entry.inputs, given, strict=True):
        ends = entry.dynamic.get(name, {})
        sizes = [ends[i][1] if i in ends else n if isinstance(n, int) else 1 for i, n in enumerate(value.shape)]
        dynamic = tuple((axis, *each) for axis, each in ends.items() if each[0] != each[2])
        dtype = cache if name in dict(caches.rows) else str(value.dtype).removeprefix("torch.")
        inputs.append(Tensor(name, tuple(sizes), dtype, dynamic=dynamic))
    (returned,) = entry.graph.graph.output_node().args
    assert isinstance(returned, list | tuple)
    (ids,) = [tensor for tensor in inputs if tensor.name == IDS]
    shapes = [(1, returned[0].meta["val"].shape[-1]), *((1, ids.shape[1], width) for _, width in caches.rows)]
    varies = tuple(ids.dynamic)
    outputs = [
        Tensor(name, shape, cache if i else "float32", dynamic=varies if i else ())
        for i, (name, shape) in enumerate(zip(entry.outputs, shapes, strict=True))
    ]
    return ArtifactEntry(file, tuple(inputs), tuple(outputs))
