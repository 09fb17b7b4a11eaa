"""A Mac made of this machine: another name of the system, a ``sysctl``, and a coremltools that replays a transcript."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn.bundle import Bundle, Manifest, write_bundle
from tests.bundle import coreml_stand_in

HERE = Path(__file__).parent
TRANSCRIPT: dict[str, Any] = json.loads((HERE / "coreml_transcript.json").read_text())

_SITE = """
import platform, sys
sys.platform = "darwin"
platform.machine = lambda: "arm64"
platform.mac_ver = lambda: ({version!r}, ("", "", ""), "arm64")
for name in {hidden!r}:
    sys.modules[name] = None
"""


def transcript(units: dict[str, dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """The transcript with other answers; ``units`` are merged into those that it has."""
    made = copy.deepcopy(TRANSCRIPT) | changes
    for name, said in (units or {}).items():
        made["units"][name] |= said
    return made


@dataclass
class Mac:
    """What a process needs in its environment to be on it."""

    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(self.folder / "python"),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }

    @property
    def python(self) -> Path:
        """A program that is this Python on the Mac."""
        path = self.folder / "bin" / "python"
        lines = [f"export {name}={shlex.quote(self.environ[name])}" for name in ("PYTHONPATH", "PATH")]
        path.write_text("\n".join(["#!/bin/sh", *lines, f'exec {shlex.quote(sys.executable)} "$@"', ""]))
        path.chmod(0o755)
        return path

    def calls(self) -> list[dict[str, Any]]:
        """What was asked of coremltools, in order, with the process that asked."""
        path = self.folder / "python" / "coremltools" / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make_mac(folder: Path, said: dict[str, Any] | None = None, hidden: tuple[str, ...] = ()) -> Mac:
    """Args: said: the transcript. hidden: modules that are not installed there."""
    said = said or TRANSCRIPT
    package = folder / "python" / "coremltools"
    package.mkdir(parents=True)
    (folder / "python" / "sitecustomize.py").write_text(_SITE.format(version=said["macos"], hidden=hidden))
    (package / "transcript.json").write_text(json.dumps(said))
    shutil.copyfile(coreml_stand_in.__file__, package / "_stand_in.py")
    for module, names in coreml_stand_in.MODULES.items():
        parts = module.split(".")[1:]
        path = package.joinpath(*parts, "__init__.py")
        path.parent.mkdir(exist_ok=True)
        own = ", ".join(name for name in names if name != "models")
        path.write_text(f"from coremltools._stand_in import {own}\n")
    (package / "__init__.py").write_text(
        "from coremltools._stand_in import ComputeUnit\nfrom coremltools import models\n"
    )
    about = folder / "python" / f"coremltools-{said['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: coremltools\nVersion: {said['version']}\n")
    (folder / "bin").mkdir()
    sysctl = folder / "bin" / "sysctl"
    sysctl.write_text(
        '#!/bin/sh\n[ "$1" = -n ] || exit 1\ncase "$2" in\n'
        f"machdep.cpu.brand_string) echo '{said['chip']}';;\nhw.memsize) echo {said['memory_bytes']};;\n"
        "*) exit 1;;\nesac\n"
    )
    sysctl.chmod(0o755)
    return Mac(folder)


def make_decoder_bundle(folder: Path) -> Bundle:
    """A bundle whose package holds the stand-in's ``small_decoder`` for one token and for four."""
    rng = np.random.default_rng(0)
    work = folder / "work"
    (work / "golden").mkdir(parents=True)
    entries: dict[str, Any] = {}
    for name, tokens in (("decode", 1), ("prefill_4", 4)):
        inputs = [{"name": "ids", "shape": (1, tokens)}, {"name": "position", "shape": (1,)}]
        inputs += [{"name": "last", "shape": (1,)}] if tokens > 1 else []
        logits = {"name": "logits", "shape": (1, coreml_stand_in.VOCABULARY), "dtype": "float32"}
        entries[name] = {
            "file": "model.mlpackage",
            "inputs": [spec | {"dtype": "int32"} for spec in inputs],
            "outputs": [logits],
        }
        for number, begin in enumerate((0, 5)):
            feeds = {"ids": rng.integers(0, coreml_stand_in.VOCABULARY, (1, tokens)), "position": np.array([begin])}
            feeds |= {"last": np.array([2])} if tokens > 1 else {}
            rows = np.zeros((1, coreml_stand_in.CONTEXT, 2), np.float32)
            rows[:, :begin] = rng.integers(0, coreml_stand_in.VOCABULARY, (1, begin, 2))
            given = {f"in.{key}": value for key, value in (feeds | {coreml_stand_in.ROWS: rows}).items()}
            wanted = {f"out.{key}": value for key, value in coreml_stand_in.small_decoder(feeds, rows).items()}
            np.savez(work / f"golden/{name}-{number:03}.npz", **given, **wanted)
    decoder = {
        "context": coreml_stand_in.CONTEXT,
        "vocabulary": coreml_stand_in.VOCABULARY,
        "cache": [{"name": coreml_stand_in.ROWS, "width": 2}],
    }
    return _write(folder, "sums", work, entries, {"decoder": decoder})


def make_bundle(folder: Path, image: str | None = None, labels: tuple[str, ...] = ()) -> Bundle:
    """A bundle whose package holds ``y = 2 * x``, as the stand-in computes it; nothing is converted.

    Args:
        image: its input is a picture: rgb, bgr or gray. labels: its output is a classifier's.
    """
    rng = np.random.default_rng(0)
    shape = (1, 1 if image == "gray" else 3, 4, 5) if image else (1, len(labels) or 6)
    x = {"name": "x", "shape": shape, "dtype": "uint8" if image else "float32"}
    if image:
        x |= {"pixels": ((1.0, 0.0),) * shape[1], "layout": "bgr" if image == "bgr" else ""}
    entries = {
        "main": {
            "file": "main.mlpackage",
            "inputs": [x],
            "outputs": [{"name": "y", "shape": shape, "dtype": "float32"}],
        }
    }
    work = folder / "work"
    (work / "golden").mkdir(parents=True)
    for i in range(2):
        value = rng.integers(0, 256, shape).astype(np.uint8) if image else rng.random(shape, np.float32)
        np.savez(work / f"golden/main-{i:03}.npz", **{"in.x": value, "out.y": 2 * value.astype(np.float32)})
    return _write(folder, "double", work, entries, {"recipe": {"name": "double", "labels": labels}})


def _write(folder: Path, name: str, work: Path, entries: dict[str, Any], more: dict[str, Any]) -> Bundle:
    """A bundle of the golden samples in ``work``, with a package that holds nothing."""
    manifest = Manifest.model_validate(
        {
            "name": f"{name}.coreml.fp16",
            "target": "coreml",
            "backend": "coreml",
            "precision": "fp16",
            "device": None,
            "created": "2026-01-01T00:00:00Z",
            "key": "0" * 64,
            "weights": {"kind": "random", "seed": 0},
            "recipe": {"name": name, "labels": ()},
            "recipe_sha256": "0" * 64,
            "entries": entries,
            "runtimes": [{"name": "edgeattn", "version": "1", "machine": "x86_64"}],
            "unproven": "graph and weights verified by interpreter; not run on Apple hardware",
            "requirement": "coremltools",
            "tolerance": 1e-2,
            "tools": {"edgeattn": "1"},
            "host": {"machine": "x86_64"},
            "stages": (),
            "reparam": {},
            "numerics": {},
            **more,
        }
    )
    (work / "Manifest.json").write_text("{}")
    (work / "model.mlmodel").write_bytes(b"a program")
    (package,) = {entry["file"] for entry in entries.values()}
    files = {
        work / "Manifest.json": f"{package}/Manifest.json",
        work / "model.mlmodel": f"{package}/Data/com.apple.CoreML/model.mlmodel",
    }
    bundle = write_bundle(folder / manifest.name, manifest, files, work / "golden", f"# {name}\n")
    shutil.rmtree(work)
    return bundle
