"""Lint's findings as SARIF 2.1.0, the form that code scanning reads (OASIS, 2020)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def _place(finding: Finding, base: Path) -> dict[str, Any]:
    """Where a finding lies: in a file below the current folder, else in a module."""
    logical = {"fullyQualifiedName": finding.module or "(model)", "kind": "module"}
    place: dict[str, Any] = {"logicalLocations": [logical]}
    if finding.file:
        path = Path(os.path.relpath(base / finding.file))
        uri = path.as_posix() if path.parts[:1] != ("..",) else (base / finding.file).resolve().as_uri()
        place["physicalLocation"] = {
            "artifactLocation": {"uri": uri},
            "region": {"startLine": max(1, finding.line)},
        }
    return place


def sarif(findings: Sequence[tuple[str, Finding]], base: Path | None = None) -> dict[str, Any]:
    """A log of one run.

    Args:
        findings: with the target of each. base: the folder that their files are relative to; the current one if None.
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
            "locations": [_place(finding, base or Path())],
            "properties": {"target": target, "module": finding.module},
        }
        for target, finding in findings
    ]
    driver = {"name": "edgeattn", "semanticVersion": edgeattn.__version__, "rules": list(rules.values())}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
