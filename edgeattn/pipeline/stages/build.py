"""Build: recipe -> nn.Module in eval mode, and a note of the files that it was built from."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from edgeattn.models.build import build
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.stages import PACKAGE

_OPENED: set[str] = set()
_WATCHING = False


def _watch() -> None:
    """Note every file that is opened and every folder that is listed from now on.

    An audit hook cannot be taken off, so it is put on once. safetensors opens its files outside of Python's sight.
    """
    global _WATCHING
    if _WATCHING:
        return
    _WATCHING = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], (str, os.PathLike)):
            return
        # The import system lists folders too, among them the one that bundles are written to.
        if event == "open" or not sys._getframe(1).f_code.co_filename.startswith("<frozen importlib"):
            _OPENED.add(os.path.abspath(arguments[0]))

    sys.addaudithook(hook)
    real = safetensors.safe_open

    def noted(filename: Any, *args: Any, **kwargs: Any) -> Any:
        _OPENED.add(os.path.abspath(filename))
        return real(filename, *args, **kwargs)

    for module in (safetensors, safetensors.torch):
        vars(module)["safe_open"] = noted


def _libraries() -> list[Path]:
    """Folders of the standard library and of installed packages, whose versions count instead of their bytes."""
    names = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    # The scheme's "data" and "scripts" folders are prefixes that hold whole virtual environments and home folders.
    names -= {sysconfig.get_path("data"), sysconfig.get_path("scripts")}
    return [Path(name).resolve() for name in names]


def _read_files(own: set[str]) -> list[str]:
    """Source files of loaded modules, and files opened and folders listed by the model, as far as they are its own."""
    libraries = _libraries()
    loaded = {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    found = set()
    for name in loaded | _OPENED:
        path = Path(name)
        if not name or not path.exists() or path.suffix == ".pyc":
            continue
        path = path.resolve()
        if path.is_relative_to(PACKAGE):
            keep = path.is_relative_to(PACKAGE / "models")
        else:
            keep = not any(path.is_relative_to(folder) for folder in libraries)
        if keep and not str(path).startswith(("/proc/", "/dev/", "/sys/")) and str(path) not in own:
            found.add(str(path))
    return sorted(found)


def _imported(files: list[str]) -> set[str]:
    """Top-level names that Python files import, by their text: what else this process has loaded is not theirs."""
    names = set()
    for file in files:
        try:
            tree = ast.parse(Path(file).read_bytes()) if file.endswith(".py") else ast.Module([], [])
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def _distributions(factory: str, files: list[str]) -> list[str]:
    """Installed packages that a guest's factory comes from or that its files import."""
    module = factory.partition(":")[0]
    if module.partition(".")[0] == "edgeattn":
        return []  # a first citizen imports nothing beyond what the stage's tools list
    names = _imported(files) | {module.partition(".")[0]}
    packages = importlib.metadata.packages_distributions()
    return sorted({distribution for name in names & set(packages) for distribution in packages[name]})


def run(context: Context) -> dict[str, Any]:
    """Leave the built model in memory; facts: its size, inputs and sources."""
    _watch()
    _OPENED.clear()
    resolved = context.job.resolved
    built = build(resolved)
    context.values["build"] = built
    # A model may import modules and read files when it runs. What it raises here the next stage reports.
    with contextlib.suppress(Exception), torch.no_grad():
        built.model(*built.random_inputs(resolved.recipe.seed).values())
    files = _read_files({str(Path(p).resolve()) for p in (resolved.checkpoint, resolved.heldout) if p})
    return {
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in built.specs],
        "sources": {"files": files, "distributions": _distributions(resolved.recipe.model.factory, files)},
    }
