"""Where in the model's source a finding lies: read from the text of its classes, none of which is imported.

A captured graph holds no lines: the paths in them would be those of one machine. It holds the class of every module.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from edgeattn.capture import Program
from edgeattn.lint.rules import Finding

#: What ``models.build`` calls the module of a file.
_GUEST = "edgeattn_guest_"


class Sources:
    """A model's own files.

    Args:
        factory: ``file.py:name`` or ``package.module:name``, as the recipe has it. folder: where relative paths begin.
    """

    def __init__(self, factory: str, folder: Path) -> None:
        self._folder = folder
        source, _, self._name = factory.partition(":")
        self._source = Path(os.path.relpath(folder / source, folder)).as_posix() if source.endswith(".py") else source
        self._trees: dict[str, ast.Module | None] = {}

    def _tree(self, file: str) -> ast.Module | None:
        if file not in self._trees:
            try:
                self._trees[file] = ast.parse((self._folder / file).read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                self._trees[file] = None
        return self._trees[file]

    def _file(self, module: str) -> str:
        """The file of a module, relative to the folder; "" where it is none of the model's own."""
        guest = self._source.endswith(".py")
        if guest and module == _GUEST + Path(self._source).stem:
            return self._source
        parts = "/".join(module.split("."))
        for beside in dict.fromkeys((str(Path(self._source).parent) if guest else "", "")):
            for end in (".py", "/__init__.py"):
                file = Path(beside, parts + end).as_posix()
                if self._tree(file) is not None:
                    return file
        return ""

    def class_of(self, name: str) -> tuple[str, ast.ClassDef] | None:
        """File and text of a class, ``package.module.Outer.Inner``; None where it is none of the model's own."""
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            file = self._file(".".join(parts[:cut]))
            if file:
                found: ast.AST | None = self._tree(file)
                for part in parts[cut:]:
                    inside = [n for n in ast.walk(found) if isinstance(n, ast.ClassDef)] if found else []
                    found = next((n for n in inside if n.name == part), None)
                return (file, found) if isinstance(found, ast.ClassDef) else None
        return None

    @cached_property
    def factory(self) -> tuple[str, int]:
        """File and line of the factory; "" and 0 where it is none of the model's own."""
        file = self._source if self._source.endswith(".py") else self._file(self._source)
        tree = self._tree(file) if file else None
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == self._name:
                return file, node.lineno
        return "", 0


def _classes(program: Program) -> dict[str, str]:
    """Class of every module, by its path, as the graphs have it."""
    found: dict[str, str] = {}
    for entry in program.entries.values():
        for node in entry.graph.graph.nodes:
            for path, kind in (node.meta.get("nn_module_stack") or {}).values():
                name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
                found.setdefault(str(path), name)
    return found


def _line(held: ast.ClassDef, child: str, words: Iterable[str]) -> int:
    """Where a class calls its ``child``; or, itself at fault, what is called by one of ``words``; or its forward."""
    forward = next((n for n in held.body if isinstance(n, ast.FunctionDef) and n.name == "forward"), None)
    for place in [forward, held] if forward else [held]:
        for node in ast.walk(place):
            if child and isinstance(node, ast.Attribute) and node.attr == child and isinstance(node.value, ast.Name):
                return node.lineno
        called = [n.func for n in ast.walk(place) if isinstance(n, ast.Call)]
        names = {(n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "")): n for n in reversed(called)}
        for word in () if child else words:
            if word in names:
                return names[word].end_lineno or names[word].lineno
    return (forward or held).lineno


def _around(module: str) -> Iterator[tuple[str, str]]:
    """A module and those around it, each with the attribute that leads inside."""
    parts = module.split(".") if module else []
    for size in range(len(parts), -1, -1):
        yield ".".join(parts[:size]), parts[size] if size < len(parts) else ""


def _place(finding: Finding, classes: Mapping[str, str], sources: Sources) -> tuple[str, int]:
    words = re.findall(r"[a-z_]\w*", finding.detail)
    for path, child in _around(finding.module):
        found = sources.class_of(classes[path]) if path in classes else None
        if found is not None:
            return found[0], _line(found[1], child, words)
    return sources.factory if finding.module else ("", 0)


def located(findings: Iterable[Finding], program: Program, sources: Sources) -> list[Finding]:
    """Findings with ``file`` and ``line``, where they lie in the model's own files.

    It is the line that calls the innermost module whose class is not the model's own, or what that class calls by the
    name of the operation; else where its forward, or the model's factory, begins.
    """
    classes = _classes(program)
    found = []
    for finding in findings:
        file, line = (finding.file, finding.line) if finding.file else _place(finding, classes, sources)
        found.append(replace(finding, file=file, line=line))
    return found
