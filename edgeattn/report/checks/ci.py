"""What CI systems show beside the code: GitHub's workflow commands, and GitLab's code quality report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from edgeattn.core.hashing import sha256_data
from edgeattn.report.checks.data import Item, Place, Run

#: Words of a lint finding for GitHub and for GitLab.
_GITHUB = {"error": "error", "warning": "warning", "note": "notice"}
_GITLAB = {"error": "critical", "warning": "minor", "note": "info"}


def workflow_commands(run: Run) -> Iterator[str]:
    """A line of standard output for everything that failed or warns, and for every lint finding that is no note.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    for cell, item in run.failures():
        if item.name != "lint" or not any(finding.fails for finding in cell.lint):
            yield command("error", item.place, f"{cell.label}: {item.name}", _words(item))
    for cell, item in run.warnings():
        yield command("warning", item.place, f"{cell.label}: {item.name}", _words(item))
    seen = set()
    for cell in run.cells:
        for finding in cell.lint:
            data = finding.data
            if data["severity"] == "note" and not finding.fails:
                continue
            level = "error" if finding.fails else _GITHUB[data["severity"]]
            line = command(level, finding.place, f"{cell.suite}: {data['rule']} ({data['target']})", _said(data))
            if line not in seen:  # other precisions have the same
                seen.add(line)
                yield line


def command(level: str, place: Place, title: str, message: str) -> str:
    """One of GitHub's workflow commands; ``level`` is error, warning or notice."""
    where = f"file={_property(place.file)}," + (f"line={place.line}," if place.line else "")
    return f"::{level} {where}title={_property(title)}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def _words(item: Item) -> str:
    return "\n".join(part for part in (item.words, item.why, item.fix and f"To do: {item.fix}") if part)


def _said(data: Mapping[str, Any]) -> str:
    module = data["module"] or "the model"
    return f"{data['what']}: {data['detail']}, in {module}\nTo do: {data['mend']}"


def code_quality(run: Run) -> str:
    """GitLab's report: https://docs.gitlab.com/ci/testing/code_quality/."""
    found = {}
    for cell, item in (*run.failures(), *run.warnings()):
        if item.name == "lint" and any(finding.fails for finding in cell.lint):
            continue
        severity = "major" if item.status == "failed" else "minor"
        one = _issue(item.name, cell.label, f"{cell.label}: {_words(item)}", severity, item.place)
        found[one["fingerprint"]] = one
    for cell in run.cells:
        for finding in cell.lint:
            words = f"{cell.suite} ({finding.data['target']}): {_said(finding.data)}"
            data = finding.data
            of = f"{cell.suite} {data['target']} {data['module']}"
            one = _issue(data["rule"], of, words, _GITLAB[data["severity"]], finding.place)
            found[one["fingerprint"]] = one
    return json.dumps(list(found.values()), indent=1, ensure_ascii=False) + "\n"


def _issue(name: str, of: str, words: str, severity: str, place: Place) -> dict[str, object]:
    """One issue; it is the same one as long as it is of the same check in the same place, whatever its numbers."""
    location = {"path": place.file, "lines": {"begin": max(place.line, 1)}}
    return {
        "description": words,
        "check_name": f"edgeattn/{name}",
        "severity": severity,
        "location": location,
        "fingerprint": sha256_data([name, of, place.file]),
    }
