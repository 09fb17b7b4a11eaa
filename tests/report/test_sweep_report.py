"""The report of a sweep: states with their evidence, fronts, and names that stay text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgeattn.report.sweep import evidence, fronts, html, markdown, page, support
from tests.report.test_browser import Open, browser, view
from tests.report.test_escaping import NASTY as EACH

__all__ = ["browser", "view"]  # fixtures

NASTY = " ".join(EACH)
ERROR: dict[str, Any] = {"kind": "CheckFailed", "exit_code": 1, "what": "the numbers do not hold", "value": "0.4"}
ERROR |= {"where": "logits", "why": "0.3 is allowed", "fix": "edgeattn sensitivity m", "details": ["sample 0: 0.4"]}


def row(target: str, precision: str = "fp32", state: str = "held", **facts: Any) -> dict[str, Any]:
    model, device = facts.pop("model", "m"), facts.pop("device", None)
    made = {"model": model, "target": target, "precision": precision, "device": device, "state": state}
    made |= {"label": f"{model} {target} {precision}", "error": None if state == "held" else ERROR}
    if state in ("held", "failed"):
        made |= {"stage": "" if state == "held" else "verify", "bundle": f"b/{target}", "seconds": 1.0}
        made |= {"digest": "0123456789abcdef0123" if state == "held" else "", "facts": {"tolerance": 0.1, **facts}}
    return made


def of(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"name": "x", "edgeattn": "1", "created": "2026-01-01T00:00:00", "seconds": 1.0, "cells": list(cells)}


def test_the_matrix_says_what_was_found() -> None:
    held = row("onnx", relative_l2=1e-3, accuracy=0.975, weights="random")
    failed = row("onnx", "w4", "failed")
    table = support([held, failed, row("tflite", state="unsupported"), row("tflite", "w4", "toolchain")])
    assert [column.name for column in table.columns] == ["model", "precision", "onnx", "tflite"]
    assert [[cell.badges[0].text for cell in line[2:]] for line in table.rows] == [
        ["held", "unsupported"],
        ["failed: verify", "toolchain missing"],
    ]
    assert table.rows[0][2].small == evidence(held) == "L2 0.001 of 0.1, 97.5%, 0123456789ab"
    assert evidence(failed) == "the numbers do not hold (0.4): 0.3 is allowed"
    text = markdown(of(held, failed))
    assert "| m | fp32 | **held** (L2 0.001 of 0.1, 97.5%, 0123456789ab) |" in text
    assert "edgeattn sensitivity m" in text
    assert "1 cell with random weights" in text
    shown = html(of(held, failed))
    for words in ("failed: verify", "0.3 is allowed", "edgeattn sensitivity m", "sample 0: 0.4", "0123456789abcdef"):
        assert words in shown


def test_fronts_are_of_one_model_and_of_one_device_where_latency_counts() -> None:
    cells = [
        row("onnx", relative_l2=1e-6, size_mb=4.0, estimate_ms=3.0, device="a"),
        row("onnx", "fp16", relative_l2=1e-3, size_mb=2.0, estimate_ms=2.0, device="a"),
        row(
            "tflite", relative_l2=1e-2, size_mb=5.0, estimate_ms=9.0, device="b", accuracy=0.9, reference_accuracy=0.95
        ),
        row("onnx", relative_l2=0.1, size_mb=9.0, model="other"),
        row("onnx", "w4", "failed"),
    ]
    assert fronts(cells) == {
        "error, size": [0, 1, 3],
        "error, latency": [0, 1, 2],
        "accuracy, size": [2],
        "accuracy, latency": [2],
    }
    points = page(of(*cells)).data["records"]
    assert points[2]["drop"] == 5.0
    assert points[4]["relative_l2"] is None
    assert fronts([cells[-1]]) == {}
    assert "Pareto" not in html(of(cells[-1]))


def test_names_stay_text(view: Open) -> None:
    cells = [
        row(NASTY, NASTY, relative_l2=0.0, size_mb=2.0, estimate_ms=1.0, model=NASTY, device=NASTY, unproven=NASTY),
        row("onnx", relative_l2=1e-4, size_mb=1.0, estimate_ms=2.0, model=NASTY, device=NASTY),
        row("onnx", "w4", "failed", model=NASTY) | {"error": dict.fromkeys(ERROR, NASTY) | {"details": [NASTY]}},
    ]
    data = of(*cells) | {"name": NASTY}
    opened = view(html(json.loads(json.dumps(data))))
    assert opened.draw_all() == ["fronts"]
    assert len(opened.page.query_selector_all(".scatterlayer .point")) == 2
    opened.page.select_option(".choice", "error, latency")
    assert opened.draw_all() == ["fronts"]
    opened.page.fill("#filter", "no such cell")
    opened.page.wait_for_selector("#cells tbody tr:not([hidden])", state="detached")
    opened.check()
    assert not re.search(r"<(script|img|b)\b", markdown(data))


def test_a_matrix_is_readable_on_a_phone(view: Open, tmp_path: Path) -> None:
    opened = view(html(of(row("onnx", relative_l2=1e-3, size_mb=1.0), row("tflite", state="unsupported"))), width=390)
    opened.draw_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    opened.check()
