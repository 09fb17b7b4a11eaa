#!/usr/bin/env python3
"""Runs this bundle on a device: Python 3.9+, NumPy and the runtime, no PyTorch and no EdgeAttn.

    python run.py                      check all files and the golden outputs (the same as --verify)
    python run.py --input x=photo.npy  run on your own data; outputs go to output.NAME.npy
    python run.py --json               the result as JSON

Exit codes: 0 the numbers hold, 1 they do not, 2 usage, 3 the runtime is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from typing import Any, Callable

HERE = os.path.dirname(os.path.abspath(__file__))
SCHEMA_VERSION = 2


class Problem(Exception):
    """An error with its exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def place(name: str) -> str:
    """The path of a file of the bundle; names that leave it are refused."""
    path = os.path.join(HERE, *name.split("/"))
    if os.path.isabs(name) or not os.path.realpath(path).startswith(os.path.realpath(HERE) + os.sep):
        raise Problem(2, f"the manifest names a file outside of the bundle: {name}")
    return path


def check_files(manifest: dict[str, Any]) -> None:
    """The manifest is as it was sealed; every file is there and has the bytes that were proven."""
    with open(os.path.join(HERE, "manifest.json"), "rb") as handle:
        written = handle.read()
    if written != (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode():
        raise Problem(1, "manifest.json was changed: it is not as it was written; copy the bundle again")
    content = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != manifest["digest"]:
        raise Problem(1, "manifest.json was changed: its digest does not fit its content; copy the bundle again")
    for name, info in sorted(manifest["files"].items()):
        path, digest = place(name), hashlib.sha256()
        if not os.path.isfile(path):
            raise Problem(1, f"{name} is missing; copy the bundle again")
        with open(path, "rb") as handle:
            for piece in iter(lambda: handle.read(1 << 20), b""):
                digest.update(piece)
        if digest.hexdigest() != info["sha256"]:
            raise Problem(1, f"{name} was changed: its SHA-256 does not fit the manifest; copy the bundle again")


def open_runtime(manifest: dict[str, Any]) -> tuple[Callable[..., dict[str, Any]], str]:
    """A function (entry, feeds) -> outputs by name, and the runtime's name and version."""
    try:
        import numpy  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise Problem(3, f"{error}; install it with: pip install numpy {manifest['requirement']}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions: dict[str, Any] = {}

    def run(entry: str, feeds: dict[str, Any]) -> dict[str, Any]:
        if entry not in sessions:
            path = place(manifest["entries"][entry]["file"])
            sessions[entry] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output["name"] for output in manifest["entries"][entry]["outputs"]]
        return dict(zip(names, sessions[entry].run(names, feeds)))  # noqa: B905 (Python 3.9)

    return run, f"onnxruntime {onnxruntime.__version__}"


def relative_l2(reference: Any, value: Any) -> float:
    """||value - reference|| / ||reference|| in float64; infinite when anything is not finite."""
    import numpy as np

    reference, value = reference.astype(np.float64), value.astype(np.float64)
    if reference.shape != value.shape or not np.isfinite(value).all() or not np.isfinite(reference).all():
        return float("inf")
    norm, error = float(np.linalg.norm(reference)), float(np.linalg.norm(value - reference))
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def verify(manifest: dict[str, Any]) -> dict[str, Any]:
    """Re-hash all files and re-run the golden inputs."""
    import numpy as np

    check_files(manifest)
    run, runtime = open_runtime(manifest)
    worst = 0.0
    golden = sorted(name for name in manifest["files"] if name.startswith("golden/"))
    for name in golden:
        entry = name.split("/")[1].split("-")[0]
        with np.load(place(name), allow_pickle=False) as data:
            outputs = run(entry, {key[3:]: data[key] for key in data.files if key.startswith("in.")})
            for key in (key for key in data.files if key.startswith("out.")):
                worst = max(worst, relative_l2(data[key], outputs[key[4:]]))
    return {
        "bundle": manifest["name"],
        "runtime": runtime,
        "python": sys.version.split()[0],
        "golden": len(golden),
        "worst_relative_l2": worst if worst != float("inf") else None,
        "tolerance": manifest["tolerance"],
        "holds": bool(golden) and worst <= manifest["tolerance"],
    }


def run_inputs(manifest: dict[str, Any], texts: list[str], entry: str) -> dict[str, Any]:
    """Run one entry on .npy files and save what comes out."""
    import numpy as np

    if entry not in manifest["entries"]:
        raise Problem(2, f"no entry {entry!r}; there are {', '.join(manifest['entries'])}")
    feeds = {}
    for text in texts:
        name, _, path = text.partition("=")
        try:
            feeds[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Problem(2, f"--input {text}: {error}") from error
        if not isinstance(feeds[name], np.ndarray):
            raise Problem(2, f"--input {text}: holds several arrays; save one with numpy.save")
    wanted = manifest["entries"][entry]["inputs"]
    for spec in wanted:
        given = feeds.get(spec["name"])
        if given is None:
            raise Problem(2, f"missing --input {spec['name']}=FILE.npy")
        if list(given.shape) != list(spec["shape"]) or str(given.dtype) != spec["dtype"]:
            has, needs = f"{given.shape} {given.dtype}", f"{tuple(spec['shape'])} {spec['dtype']}"
            raise Problem(2, f"input {spec['name']} is {has}, wanted is {needs}")
    unknown = sorted(set(feeds) - {spec["name"] for spec in wanted})
    if unknown:
        raise Problem(2, f"no input named {', '.join(unknown)}")
    check_files(manifest)
    run, runtime = open_runtime(manifest)
    saved = {}
    for name, value in run(entry, feeds).items():
        path = f"output.{name.replace(os.sep, '_')}.npy"
        np.save(path, value)
        saved[name] = {"file": path, "shape": list(value.shape), "dtype": str(value.dtype)}
    return {"bundle": manifest["name"], "runtime": runtime, "outputs": saved, "holds": True}


def main() -> int:
    """Parse arguments, print the result, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true", help="check files and golden outputs (the default)")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy", help="run on your own data")
    parser.add_argument("--entry", default="main", help="which graph to run with --input (default: main)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.verify and arguments.input:
        parser.error("--verify and --input exclude each other")
    try:
        with open(os.path.join(HERE, "manifest.json"), encoding="utf-8") as handle:
            manifest = json.load(handle)
        if manifest["schema_version"] > SCHEMA_VERSION:
            raise Problem(2, "this bundle's schema is newer than its runner")
        result = run_inputs(manifest, arguments.input, arguments.entry) if arguments.input else verify(manifest)
    except Problem as problem:
        result = {"holds": False, "error": str(problem), "exit_code": problem.code}
    except ImportError as error:
        result = {"holds": False, "error": f"{error}; install it with: pip install numpy", "exit_code": 3}
    except Exception as error:  # whatever a damaged file makes the runtime raise
        result = {"holds": False, "error": f"the bundle cannot be run: {error}", "exit_code": 1}
    if arguments.json:
        print(json.dumps(result, indent=1))
    elif "error" in result:
        print(f"error: {result['error']}", file=sys.stderr)
    elif arguments.input:
        for name, info in result["outputs"].items():
            print(f"{name} -> {info['file']} {tuple(info['shape'])} {info['dtype']}")
    else:
        word = "holds" if result["holds"] else "DOES NOT HOLD"
        worst = "not finite" if result["worst_relative_l2"] is None else f"{result['worst_relative_l2']:.3g}"
        print(f"{result['bundle']}: {word} under {result['runtime']}, Python {result['python']}")
        print(f"worst relative L2 {worst} over {result['golden']} golden samples, tolerance {result['tolerance']:g}")
    return int(result.get("exit_code", 0 if result["holds"] else 1))


if __name__ == "__main__":
    sys.exit(main())
