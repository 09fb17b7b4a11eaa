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
from edgeattn.lint.rules import UNSUPPORTED, Finding

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


class NotAsked(Exception):
    """A converter cannot be asked; the message says why."""

    @staticmethod
    def raised(error: Exception) -> NotAsked:
        """Because what it does before raises."""
        return NotAsked(f"its decompositions raise {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def failing(suspects: Iterable[Placed], target: str) -> list[Placed]:
    """Those whose operation was seen to fail."""
    fails = Operators.load().fails.get(target, ())
    return [(module, node) for module, node in suspects if op_of(node) in fails]


def failing_inside(entry: Entry, target: str) -> list[Placed]:
    """Nodes of an entry's branches that were seen to fail: a converter without torch.cond is not asked about them."""
    return failing([one for one in doubtful(entry, ()) if one[1].graph is not entry.graph.graph], target)


def is_check(node: fx.Node) -> bool:
    """Whether a node only checks what torch.export assumed, which exporters pass over."""
    return op_of(node).startswith(_CHECKS) or not isinstance(node.target, torch._ops.OpOverload)


def unsupported(program: Program, target: str, ask: Callable[[Entry], Iterable[Placed]]) -> list[Finding]:
    """All operations that a target's converter has no form for, one finding for each module.

    Args:
        ask: nodes of an entry, as the converter gets it, that it does not know. Where it raises ``NotAsked`` the
            operations that were seen to fail are found, as warnings.
    """
    data = Operators.load()
    same = data.measured.get(target) == tools.versions(TOOLS[target])
    known = data.known.get(target, ()) if same else ()
    found: dict[tuple[str, str], list[str]] = {}  # by module, and why the converter was not asked
    seen: set[int] = set()
    for entry in program.entries.values():
        suspects = [] if id(entry.graph) in seen else doubtful(entry, known)
        seen.add(id(entry.graph))
        try:
            why, unknown = "", ask(entry) if suspects else ()
        except NotAsked as error:
            why, unknown = str(error), failing(suspects, target)
        for module, node in unknown:
            found.setdefault((module, why), []).append(op_of(node) or str(node.target))
    findings = []
    for (module, why), names in found.items():
        counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
        told = [f"{name}: {data.instead[name]}" for name in dict.fromkeys(names) if name in data.instead]
        detail = "; ".join(counted)
        if why:
            versions = ", ".join(f"{name} {version}" for name, version in data.measured.get(target, {}).items())
            detail += f" (not asked of the converter: {why}; measured with {versions})"
        one = shared().finding(RULE, module, detail, "warning" if why else None)
        findings.append(Finding(**{**one.as_dict(), "mend": "; ".join(told) or one.mend}))
    return findings
