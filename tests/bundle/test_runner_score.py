"""Scoring a bundle's held-out samples by its own runner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgeattn
from edgeattn.bundle import Bundle


def run(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / "run.py"), "--score", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("target", ["onnx", "tflite"])
def test_the_score_is_the_one_of_the_export(target: str, layout: str, tmp_path: Path) -> None:
    if target == "onnx" and layout == "nhwc":
        pytest.skip("the target takes no such layout")
    bundle = edgeattn.export("fmvit-digits", target, output=tmp_path, layout=layout)
    done = run(bundle.path, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    answer = json.loads(done.stdout)
    task = bundle.manifest.task
    assert task is not None
    assert (answer["correct"], answer["samples"]) == (task["artifact_correct"], task["samples"])
    assert answer["drop"] == 0
    assert f"{answer['correct']} of {answer['samples']}" in run(bundle.path).stdout


def test_without_held_out_samples_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(4, 2)\n")
    bundle = edgeattn.export(f"{tmp_path}/net.py:build", "onnx", output=tmp_path, inputs=["x=1x4"])
    assert not (bundle.path / "run_score.py").exists()
    done = run(bundle.path)
    assert done.returncode == 2
    assert "held-out" in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_samples_are_found(digits: Bundle, tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", output=tmp_path)
    (bundle.path / "heldout.npz").write_bytes(b"no samples")
    done = run(bundle.path)
    assert done.returncode == 1
    assert "heldout.npz was changed" in done.stderr
