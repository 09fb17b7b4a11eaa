"""English text that every machine with Python has under a free licence: Python's own documentation.

Docstrings and signatures of the standard library (read with ``ast``, nothing is imported), the language reference of
``pydoc_data.topics``, the docstrings of the built-in types, and the licence itself. It is under the PSF License
Agreement (https://docs.python.org/3/license.html, which also lists the parts with free licences of their own). What it
says differs between versions of Python.

A document is a whole module, a topic, or a built-in module; no docstring occurs in two of them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Folders of the standard library that are not documentation of it, or not part of it.
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}

#: Most characters of an answer in a conversation, cut between paragraphs.
ANSWER = 1200

QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "How does {name} work?",
    "Explain {name}.",
    "What is {name} of the module {module} for?",
    "Describe {name} in Python's module {module}.",
)


@dataclass
class Document:
    """A text and the questions that parts of it answer.

    Attributes:
        name: of the module or topic. text: of the whole document.
        answers: what is described, and its description.
    """

    name: str
    text: str
    answers: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Writer:
    """Puts a document together; docstrings that were met before, in any document, are left out."""

    seen: set[str]

    def document(self, name: str, parts: Iterator[tuple[str, str, str, int]]) -> Document:
        """The document of parts: what is described, its heading, its docstring and the depth of both."""
        document, lines = Document(name, ""), [name]
        for what, heading, docstring, depth in parts:
            text = _tidy(docstring)
            if len(text) < 12 or text in self.seen:
                continue
            self.seen.add(text)
            lines.append(textwrap.indent(f"{heading}\n{text}" if heading else text, "    " * depth))
            if len(text) >= 40 and not what.rpartition(".")[2].startswith("_"):
                document.answers.append((what, _first(text)))
        document.text = "\n\n".join(lines) if len(lines) > 1 else ""
        return document


def _tidy(docstring: str) -> str:
    """Without trailing blanks, tabs, and what no reader would miss of rows of signs and empty lines."""
    text = "\n".join(line.rstrip() for line in inspect.cleandoc(docstring).expandtabs().splitlines())
    return re.sub(r"([-=*#_~.])\1{11,}", lambda row: row[1] * 12, re.sub(r"\n{3,}", "\n\n", text)).strip()


def _first(text: str) -> str:
    """The first paragraphs, as many as an answer holds."""
    paragraphs = text.split("\n\n")
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + len(paragraph) > ANSWER:
            break
        answer = f"{answer}\n\n{paragraph}"
    return answer[:ANSWER]


def _source_parts(
    body: list[ast.stmt], prefix: str, inside: str = "", depth: int = 0
) -> Iterator[tuple[str, str, str, int]]:
    """Parts of a module's or a class's statements, in their order."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                heading = f"class {node.name}({bases})" if bases else f"class {node.name}"
            else:
                heading = f"{node.name}({ast.unparse(node.args)})"
            what = f"{inside}{node.name}" if inside else f"{prefix}.{node.name}"
            yield what, heading, ast.get_docstring(node, clean=False) or "", depth
            if isinstance(node, ast.ClassDef):
                yield from _source_parts(node.body, prefix, f"{node.name}.", depth + 1)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _source_parts([*node.body, *node.orelse], prefix, inside, depth)


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if _SKIPPED & set(folders) or "pydoc_data" in folders:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
                yield _module_name(path, root), ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # files that test what Python refuses
            continue


def _builtin_parts(name: str) -> Iterator[tuple[str, str, str, int]]:
    module = importlib.import_module(name)
    for key, value in sorted(vars(module).items()):
        # An instance shows its class's docstring: only what is defined here.
        if not (inspect.isclass(value) or inspect.isbuiltin(value)) or value.__module__ not in (name, "builtins"):
            continue
        docstring = value.__doc__ if isinstance(value.__doc__, str) else ""
        yield (key if name == "builtins" else f"{name}.{key}"), key, docstring, 0
        for part, member in sorted(vars(value).items()) if inspect.isclass(value) else ():
            if inspect.isroutine(member) and isinstance(member.__doc__, str):
                yield f"{key}.{part}", f"{key}.{part}", member.__doc__, 1


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        text = _tidy(text)
        paragraphs = [part for part in text.split("\n\n") if len(part) >= 60 and not part.startswith((" ", "*", "-"))]
        yield Document(name, text, [(name, _first("\n\n".join(paragraphs)))] if paragraphs else [])


def licence() -> str:
    """Python's licence; empty where this installation does not keep it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    places = [library / "LICENSE.txt", *(Path(sys.base_prefix, name) for name in ("LICENSE.txt", "LICENSE"))]
    found = next((path for path in places if path.is_file()), None)
    return found.read_text("utf-8") if found else ""


def documents() -> list[Document]:
    """All documents of this Python, in an order that depends on their names alone."""
    library, write = Path(sysconfig.get_paths()["stdlib"]), _Writer(set())
    found = []
    for name, tree in _modules(library):
        own = (name, "", ast.get_docstring(tree, clean=False) or "", 0)
        found.append(write.document(name, iter([own, *_source_parts(tree.body, name)])))
    built_in = sorted({"builtins", "math", "time", "itertools", "_collections", "_functools", "_io"})
    found += [write.document(name, _builtin_parts(name)) for name in built_in]
    found += _topics()
    found.append(Document("LICENSE", _tidy(licence())))
    return [document for document in found if len(document.text) >= 200]


def _without(text: str, known: set[str]) -> str:
    return "\n\n".join(part for part in text.split("\n\n") if len(part) < 40 or part.strip() not in known)


def split(found: list[Document], seed: int, characters: int, most: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on and held-out ones, whole.

    Args:
        characters: held out, about. most: characters of a document that may be held out, so that there are several.

    Paragraphs of the held-out ones that some training document has, too, are taken out of them.
    """
    order = random.Random(seed).sample(found, len(found))
    held: list[Document] = []
    for document in order:
        if len(document.text) <= most and sum(len(one.text) for one in held) < characters:
            held.append(document)
    names = {document.name for document in held}
    train = [document for document in found if document.name not in names]
    known = {part.strip() for document in train for part in document.text.split("\n\n")}
    known |= {answer.strip() for document in train for _, answer in document.answers}
    kept = [Document(document.name, _without(document.text, known)) for document in held]
    return train, [document for document in kept if len(document.text) >= 200]


def chats(train: list[Document], seed: int) -> list[tuple[str, str]]:
    """Questions and answers about what the documents describe, one for each description."""
    rng = random.Random(seed)
    return [
        (rng.choice(QUESTIONS).format(name=what, module=document.name), answer)
        for document in train
        for what, answer in document.answers
    ]
