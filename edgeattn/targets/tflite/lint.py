"""TFLite's lint: patterns of ``lint.toml`` in a captured program and in a flatbuffer."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn.core import tools
from edgeattn.core.quiet import quiet
from edgeattn.lint import Finding, RuleBook, Severity, operators
from edgeattn.lint.books import own
from edgeattn.lint.engine import by_pattern
from edgeattn.lint.graph import path_of
from edgeattn.targets.tflite import TFLITE_RUNTIME

if TYPE_CHECKING:
    from edgeattn.capture import Entry, Program
    from edgeattn.device import Device


@cache
def _book() -> RuleBook:
    return own(Path(__file__).parent, "tflite")


def _unknown(entry: Entry) -> list[operators.Placed]:
    """Nodes that litert-torch has no lowering for, after its decompositions and our own. Raises NotAsked."""
    if tools.version("litert-torch") is None:
        raise operators.NotAsked("litert-torch is not here")
    with quiet():
        from litert_torch import fx_infra
        from litert_torch.backend.lowerings import registry

        try:
            # It writes into the graph that it is given: a copy, whose tensors are the program's own.
            tensors = [*entry.graph.state_dict.values(), *entry.graph.constants.values()]
            graph = copy.deepcopy(entry.graph, {id(tensor): tensor for tensor in tensors})
            graph = fx_infra.safe_run_decompositions(graph, fx_infra.decomp.pre_convert_decomp(), can_skip=False)
            graph = fx_infra.safe_run_decompositions(graph, fx_infra.decomp.pre_lower_decomp(), can_skip=False)
        except Exception as error:  # whatever a decomposition raises
            raise operators.NotAsked.raised(error) from error
    called = [node for node in graph.graph.nodes if node.op == "call_function" and not operators.is_check(node)]
    found = [(path_of(node), node) for node in called if registry.global_registry.lookup(node.target) is None]
    return found + operators.failing_inside(entry, "tflite")


def unsupported(program: Program) -> list[Finding]:
    """All operations that litert-torch has no lowering for."""
    return operators.unsupported(program, "tflite", _unknown)


def _pooling(node: Any) -> tuple[str, str]:
    """The rule that a pooling falls under, and what it is; two empty strings for none."""
    import torch

    from edgeattn.targets.tflite.pools import Pool

    aten = torch.ops.aten
    pool = Pool.of(node)
    if pool is not None and not pool.plain:
        return "average-pool", f"{node.name}: {pool}"
    dilation = node.args[4] if node.target is aten.max_pool2d.default and len(node.args) > 4 else 1
    dilated = any(n != 1 for n in (dilation if isinstance(dilation, list | tuple) else [dilation]))
    volume = node.target in (aten.avg_pool3d.default, aten.max_pool3d.default)
    return ("reduce-window", str(node.name)) if dilated or volume else ("", "")


def lint(program: Program, device: Device | None) -> list[Finding]:
    """Findings in the captured program, before any conversion.

    Args:
        device: whose runtime is asked for; findings about tflite-runtime are errors on a device that has no other.
    """
    import torch

    old = device is not None and device.runtimes.get("tflite") == TFLITE_RUNTIME
    found = []
    for name, entry in program.entries.items():
        wide = {
            node.name
            for node in entry.graph.graph.nodes
            if node.op == "placeholder" and getattr(node.meta.get("val"), "dtype", None) == torch.int64
        }
        for shown, inner in zip(entry.inputs, entry.graph.graph_signature.user_inputs, strict=True):
            if inner in wide:
                found.append(_book().finding("int64-input", "", f"input {shown} of entry {name}"))
        for node in entry.graph.graph.nodes:
            rule, detail = _pooling(node)
            if rule:
                severity: Severity | None = "error" if old and rule == "reduce-window" else None
                found.append(_book().finding(rule, path_of(node), detail, severity))
            elif "batch_norm" in str(node.target):
                found.append(_book().finding("batch-norm-left", path_of(node), str(node.name)))
    return [*found, *by_pattern(program, _book(), "tflite")]


def lint_flatbuffer(
    model: Any, entry: str, facts: dict[str, Any], data: bytes, *, runtime: str = "", would_do: str = ""
) -> list[Finding]:
    """Findings in a converted entry.

    Args:
        facts: what ``flatbuffer.facts`` says of it.
        data: the file, which LiteRT loads to say what XNNPACK takes.
        runtime: that it is made for; what tflite-runtime does not know is an error then.
        would_do: a precision whose operators that runtime knows all, if there is one.
    """
    from edgeattn.targets.tflite.versions import too_new
    from edgeattn.targets.tflite.xnnpack import falls_off

    found = []
    moved = Counter((item["module"], item["of"]) for item in facts["transposes"])
    for (module, of), count in moved.items():
        found.append(_book().finding("transpose", module, f"{count} at the {of}" if of != "graph" else f"{count}"))
    if "STABLEHLO_REDUCE_WINDOW" in facts["nodes"]:
        found.append(_book().finding("reduce-window", "", f"{facts['nodes']['STABLEHLO_REDUCE_WINDOW']} in {entry}"))
    severity: Severity | None = "error" if runtime == TFLITE_RUNTIME else None
    for module, detail in too_new(model, entry):
        finding = _book().finding("operator-too-new", module, detail, severity)
        found.append(replace(finding, mend=f"--precision {would_do} would do") if would_do else finding)
    outside: dict[str, Counter[str]] = defaultdict(Counter)
    for module, operator in falls_off(model, entry, data):
        outside[module][operator] += 1
    for module, counts in outside.items():
        detail = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        found.append(_book().finding("off-xnnpack", module, detail))
    return found
