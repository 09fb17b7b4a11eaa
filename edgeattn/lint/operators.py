"""What converters do with operations: ``operators.toml``, as it was measured, and what to write in place of some.

An operation that is known needs no question. Of others the converter itself is asked, if it is installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import fx

from edgeattn.capture import Entry, Program
from edgeattn.core import schema, tools
from edgeattn.lint.books import shared
from edgeattn.lint.graph import nodes_of, op_of
from edgeattn.lint.rules import UNSUPPORTED, Finding, Severity

FILE = Path(__file__).with_name("operators.toml")
RULE = UNSUPPORTED
#: By target the distributions that decide what is converted.
TOOLS: dict[str, tuple[str, ...]] = {
    "onnx": ("torch", "onnxscript"),
    "tflite": ("litert-torch",),
    "coreml": ("coremltools",),
    "tensorrt": ("torch", "onnxscript", "tensorrt-rtx"),
}
#: Checks that exporters pass over.
_CHECKS = ("_assert", "sym_constrain_range")


class Operators(schema.Strict):
    """The file.

    Attributes:
        measured: versions of ``TOOLS`` by target. known: operations with overloads that were converted.
        fails: operations that were not. instead: what to write in place of an operation.
    """

    measured: dict[str, dict[str, str]] = Field(default_factory=dict)
    known: dict[str, list[str]] = Field(default_factory=dict)
    fails: dict[str, list[str]] = Field(default_factory=dict)
    instead: dict[str, str] = Field(default_factory=dict)

    @staticmethod
    @cache
    def load() -> Operators:
        """The file beside this one."""
        return schema.validate(Operators, schema.read_toml(FILE), str(FILE))

    def write(
        self,
        path: Path,
        measured: Mapping[str, Mapping[str, str | None]],
        known: Mapping[str, Collection[str]],
        fails: Mapping[str, Collection[str]],
    ) -> None:
        """Write the file anew, with what was measured; ``instead`` stays as it is."""
        lines = [
            "# Written by examples/lint_operators.py, but for [instead], which is written by hand.",
            "",
            "[instead]",
        ]
        lines += [f"{_text(name)} = {_text(words)}" for name, words in self.instead.items()]
        for target, versions in measured.items():
            lines += ["", f"[measured.{target}]"]
            lines += [f"{name} = {_text(version)}" for name, version in versions.items()]
        for head, lists in (("fails", fails), ("known", known)):
            lines += ["", f"[{head}]"]
            for target, names in lists.items():
                lines += [f"{target} = [", *(f"    {_text(name)}," for name in sorted(names)), "]"]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


#: Path of a module, and a node that came from it.
Placed = tuple[str, fx.Node]


def doubtful(entry: Entry, known: Collection[str]) -> list[Placed]:
    """Nodes of an entry and of its branches whose operation is none of ``known``."""
    return [
        (module, node)
        for module, node in nodes_of(entry.graph.graph_module)
        if isinstance(node.target, torch._ops.OpOverload) and str(node.target) not in known and not is_check(node)
    ]


def failing_inside(entry: Entry, target: str) -> list[Placed]:
    """Nodes of an entry's branches that are known to fail: a converter without torch.cond is not asked about them."""
    fails = Operators.load().fails.get(target, ())
    return [
        (m, node) for m, node in doubtful(entry, ()) if node.graph is not entry.graph.graph and op_of(node) in fails
    ]


def is_check(node: fx.Node) -> bool:
    """Whether a node only checks what torch.export assumed, which exporters pass over."""
    return op_of(node).startswith(_CHECKS) or not isinstance(node.target, torch._ops.OpOverload)


def unsupported(
    program: Program, target: str, ask: Callable[[Entry], Iterable[Placed] | None] | None = None
) -> list[Finding]:
    """All operations that a target's converter has no form for, one finding for each module.

    Args:
        ask: nodes of an entry, as the converter gets it, that it does not know; None where it cannot be asked. Where it
            is not installed the operations that are known to fail are found, as warnings.
    """
    data = Operators.load()
    same = data.measured.get(target) == tools.versions(TOOLS[target])
    known = data.known.get(target, ()) if same or ask is None else ()
    found: dict[str, list[str]] = {}
    severity: Severity | None = None
    seen: set[int] = set()
    for entry in program.entries.values():
        suspects = [] if id(entry.graph) in seen else doubtful(entry, known)
        seen.add(id(entry.graph))
        unknown = ask(entry) if suspects and ask is not None else None
        if unknown is None:
            unknown, severity = [one for one in suspects if op_of(one[1]) in data.fails.get(target, ())], "warning"
        for module, node in unknown:
            found.setdefault(module, []).append(op_of(node) or str(node.target))
    findings = []
    for module, names in found.items():
        counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
        told = [f"{name}: {data.instead[name]}" for name in dict.fromkeys(names) if name in data.instead]
        detail = "; ".join(counted)
        if severity:
            versions = ", ".join(f"{name} {version}" for name, version in data.measured.get(target, {}).items())
            detail += f" (not asked of the converter, which is not here; measured with {versions})"
        one = shared().finding(RULE, module, detail, severity)
        findings.append(Finding(**{**one.as_dict(), "mend": "; ".join(told) or one.mend}))
    return findings
