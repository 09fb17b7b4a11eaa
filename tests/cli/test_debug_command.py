"""``edgeattn debug`` on the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeattn.bundle import Bundle
from tests.pipeline import faults

Cli = Callable[..., subprocess.CompletedProcess[str]]
AT = "stages.1.1.attention.k"


@pytest.fixture
def damaged(digits: Bundle, tmp_path: Path) -> Path:
    """The digits model's file with a doubled weight."""
    file = tmp_path / "edited.onnx"
    shutil.copy(digits.path / "model.onnx", file)
    faults.onnx(file, AT, "Conv", lambda weight: 2 * weight)
    return file


def test_programs_that_agree(edgeattn_cli: Cli, digits: Bundle) -> None:
    done = edgeattn_cli("debug", "fmvit-digits", digits.path)
    assert done.returncode == 0, done.stderr
    for words in ("agree", "golden/main-000.npz", "allowed 1e-05", "passed over", "more places compared"):
        assert words in done.stdout
    assert "first module to diverge" not in done.stdout


def test_the_first_divergence_is_marked_and_explained(edgeattn_cli: Cli, digits: Bundle, damaged: Path) -> None:
    done = edgeattn_cli("debug", "fmvit-digits@deploy", damaged)
    assert done.returncode == 1, done.stderr
    marked = [line for line in done.stdout.splitlines() if line.startswith(">")]
    assert len(marked) == 1
    assert AT in marked[0]
    text = " ".join(done.stdout.split())
    for words in ("diverge", f"{AT} is the first module to diverge", "bad scale (sure)", "random inputs", "not finite"):
        assert words in text


def test_json_and_given_inputs(edgeattn_cli: Cli, digits: Bundle, damaged: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1, 1, 32, 32)).astype(np.float32))
    words = ("debug", digits.path, damaged, "--input-file", f"x={tmp_path}/x.npy", "--json")
    done = edgeattn_cli(*words)
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    assert not data["holds"]
    assert (data["first"]["module"], data["first"]["sure"]) == (AT, False)
    assert data["first"]["error"] > 0.1
    assert data["inputs"] == "the given inputs"
    assert [row["error"] for row in data["modules"] if row["module"] == "stem.0.conv"] == [0.0]
    assert {r["nonfinite"] for r in data["first"]["ranges"]} == {0}
    witnessed = json.loads(edgeattn_cli(*words, "--model", "fmvit-digits@deploy").stdout)
    assert (witnessed["first"]["module"], witnessed["first"]["sure"]) == (AT, True)
    assert witnessed["first"]["cause"]["name"] == "bad scale"
    held = edgeattn_cli(*words, "--tolerance", "10")
    assert held.returncode == 0
    assert json.loads(held.stdout)["first"] is None


def test_bad_words(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    for words in (
        ("fmvit-digits@deploi", digits.path),
        ("fmvit-digitz", digits.path),
        (digits.path, tmp_path / "none.tflite"),
        (digits.path, tmp_path),
        (digits.path, f"{digits.path}@coreml"),
        ("fmvit-digits", digits.path, "--input-file", "x=none.npy"),
        ("fmvit-digits", digits.path, "--input-file", f"x={tmp_path}/x.npz"),
        ("fmvit-digits", digits.path, "--tolerance", "0"),
        ("fmvit-digits",),
    ):
        done = edgeattn_cli("debug", *words)
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr
