"""The files that a run of checks leaves for CI."""

from __future__ import annotations

import json
from pathlib import Path

from edgeattn.core.files import write_whole
from edgeattn.lint import Finding
from edgeattn.report.checks.ci import code_quality
from edgeattn.report.checks.data import Run
from edgeattn.report.checks.html import html
from edgeattn.report.checks.junit import junit
from edgeattn.report.checks.markdown import markdown
from edgeattn.report.sarif import sarif


def write_all(run: Run, folder: Path, summary: str | None = None) -> None:
    """Write junit.xml, lint.sarif, code-quality.json, summary.md, report.html and checks.json, each whole.

    Args:
        summary: a file that the Markdown is added to, as GitHub names one in ``$GITHUB_STEP_SUMMARY``.
    """
    page = markdown(run)
    found = {}
    for cell in run.cells:
        for finding in cell.lint:
            data = {key: value for key, value in finding.data.items() if key != "target"}
            one = Finding(**{**data, "file": finding.place.file, "line": finding.place.line})
            found[finding.data["target"], one.rule, one.module, one.detail, finding.place] = (
                finding.data["target"],
                one,
            )
    texts = {
        "junit.xml": junit(run),
        "lint.sarif": json.dumps(sarif(list(found.values())), indent=1, ensure_ascii=False) + "\n",
        "code-quality.json": code_quality(run),
        "summary.md": page,
        "report.html": html(run),
        "checks.json": json.dumps(run.as_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_whole(folder / name, text.encode("utf-8", "replace"))
    if summary:
        with Path(summary).open("a", encoding="utf-8", errors="replace") as file:
            file.write(page)
