"""Outcomes and files of checks without any export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeattn.check.file import Wanted, read

FACTS: dict[str, Any] = {
    "relative_l2": 1e-6,
    "tolerance": 1e-5,
    "accuracy": 0.99,
    "reference_accuracy": 0.995,
    "size_mb": 2.0,
    "parameters": 1000,
    "macs": 5000,
    "bytes": 7000,
    "nodes": 20,
    "fallback": 0.25,
    "seconds": 10.0,
    "peak_mb": 800.0,
    "weights": "checkpoint",
    "unproven": "",
    "estimate_ms": None,
    "wall_s": 3.0,
}


def wanted(folder: Path, text: str) -> list[Wanted]:
    """The cells of a file with this text."""
    (folder / "edgeattn.toml").write_text(text)
    return read(folder / "edgeattn.toml", "edgeattn.toml")


def one(folder: Path, budgets: str = "", more: str = "") -> Wanted:
    """A single cell with budgets, a line each; the first of them is line 5."""
    text = f'[models.net]\nmodel = "fmvit-digits"\n{more}\n[budgets]\n{budgets}\n'
    (found,) = wanted(folder, text)
    return found


def outcome(of: Wanted, **facts: Any) -> dict[str, Any]:
    """Of an export that held."""
    return {
        "cell": of.cell.to_dict(),
        "held": True,
        "stage": "",
        "error": None,
        "folder": "",
        "bundle": "",
        "digest": "d",
        "key": "k",
        "artifacts": {"model.onnx": "a" * 64},
        "lint": [],
        "facts": {**FACTS, **facts},
        "stages": [],
    }


def failed(of: Wanted, stage: str, kind: str = "CheckFailed", what: str = "it broke", **parts: Any) -> dict[str, Any]:
    """Of an export that ended at a stage."""
    codes = {"CheckFailed": 1, "UsageError": 2, "ToolchainMissing": 3, "ConversionFailed": 4}
    error = {"kind": kind, "exit_code": codes[kind], "what": what, "value": None, "where": None, "why": None}
    error |= {"fix": None, "details": [], **parts}
    return {**outcome(of), "held": False, "stage": stage, "error": error, "artifacts": {}, "facts": {"wall_s": 1.0}}


def finding(severity: str = "warning", **fields: Any) -> dict[str, Any]:
    """A lint finding."""
    plain = {"rule": "a-rule", "severity": severity, "module": "blocks.0", "what": "a pattern", "detail": "a detail"}
    return {**plain, "mend": "write it otherwise", "file": "", "line": 0, "target": "onnx", **fields}
