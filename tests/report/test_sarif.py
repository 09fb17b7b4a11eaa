"""SARIF: what its schema requires, and where findings lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeattn.lint import Finding
from edgeattn.report.sarif import sarif

FOUND = [
    ("onnx", Finding("a", "error", "m.n", "what", "d", "mend", "see https://a.example/b/1, and", "net.py", 7)),
    ("coreml", Finding("b", "note", "", "what", "<d>", "mend", "measured: here")),
    ("coreml", Finding("a", "warning", "m", "what", "d", "mend", "see https://a.example/b/1, and", "/far/net.py", 0)),
]


def check(log: dict[str, Any]) -> None:
    """What the schema of 2.1.0 requires of the objects that are written, and the values that it allows."""
    assert log["version"] == "2.1.0"
    assert set(log) <= {"$schema", "version", "runs"}
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        assert run["tool"]["driver"]["name"]
        assert len({rule["id"] for rule in rules}) == len(rules)
        for rule in rules:
            assert isinstance(rule["shortDescription"]["text"], str)
            assert isinstance(rule["help"]["text"], str)
            assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
            assert "helpUri" not in rule or rule["helpUri"].startswith("http")
        for result in run["results"]:
            assert result["message"]["text"]
            assert result["level"] in ("none", "note", "warning", "error")
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            for place in result["locations"]:
                physical = place["physicalLocation"]
                assert physical["artifactLocation"]["uri"]
                assert physical["region"]["startLine"] >= 1
                assert all(one["fullyQualifiedName"] for one in place["logicalLocations"])


def test_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = sarif(FOUND, tmp_path / "models", "timm:a b")
    check(log)
    check(sarif([]))
    assert json.loads(json.dumps(log)) == log
    (run,) = log["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["a", "b"]
    assert [rule.get("helpUri") for rule in run["tool"]["driver"]["rules"]] == ["https://a.example/b/1", None]
    assert [result["level"] for result in run["results"]] == ["error", "note", "warning"]
    places = [result["locations"][0] for result in run["results"]]
    assert places[0]["physicalLocation"] == {
        "artifactLocation": {"uri": "models/net.py"},
        "region": {"startLine": 7},
    }
    # Code scanning takes no result without a file.
    assert places[1]["physicalLocation"] == {"artifactLocation": {"uri": "timm%3Aa%20b"}, "region": {"startLine": 1}}
    assert places[1]["logicalLocations"][0]["fullyQualifiedName"] == "(model)"
    assert places[2]["physicalLocation"]["artifactLocation"]["uri"] == "file:///far/net.py"
