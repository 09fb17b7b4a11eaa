"""Lint's findings as SARIF 2.1.0, the form that code scanning reads (OASIS, 2020)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import edgeattn
from edgeattn.lint import Finding

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_URL = re.compile(r"https?://[^\s,;]+")


def _rule(finding: Finding) -> dict[str, Any]:
    text = f"{finding.what}. Evidence: {finding.evidence}. What to do: {finding.mend}."
    markdown = f"{finding.what}\n\n**Evidence**: {finding.evidence}\n\n**What to do**: {finding.mend}"
    found: dict[str, Any] = {
        "id": finding.rule,
        "shortDescription": {"text": finding.what},
        "help": {"text": text, "markdown": markdown},
        "defaultConfiguration": {"level": finding.severity},
    }
    url = _URL.search(finding.evidence)
    return {**found, "helpUri": url[0].rstrip(".)")} if url else found


def _place(finding: Finding, base: Path, model: str) -> dict[str, Any]:
    """Where a finding lies: its module, and its file, below the current folder where it can be.

    Code scanning refuses a log with a result that has no file: what has none stands under the model's name.
    """
    uri = quote(model)
    if finding.file:
        path = Path(os.path.relpath(base / finding.file))
        uri = path.as_posix() if path.parts[:1] != ("..",) else (base / finding.file).resolve().as_uri()
    return {
        "logicalLocations": [{"fullyQualifiedName": finding.module or "(model)", "kind": "module"}],
        "physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": max(1, finding.line)}},
    }


def sarif(findings: Sequence[tuple[str, Finding]], base: Path | None = None, model: str = "model") -> dict[str, Any]:
    """A log of one run.

    Args:
        findings: with the target of each. base: the folder that their files are relative to; the current one if None.
        model: what the model is called, for findings that have no file.
    """
    rules: dict[str, dict[str, Any]] = {}
    for _, finding in findings:
        rules.setdefault(finding.rule, _rule(finding))
    order = list(rules)
    results = [
        {
            "ruleId": finding.rule,
            "ruleIndex": order.index(finding.rule),
            "level": finding.severity,
            "message": {"text": f"{target}: {finding.what}: {finding.detail}. What to do: {finding.mend}"},
            "locations": [_place(finding, base or Path(), model)],
            "properties": {"target": target, "module": finding.module},
        }
        for target, finding in findings
    ]
    driver = {"name": "edgeattn", "semanticVersion": edgeattn.__version__, "rules": list(rules.values())}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
