"""PLM-1.8B at its real sizes, with random weights: within memory, verified, and it makes tokens."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import edgeattn

#: Bytes of the weights in float32.
CHECKPOINT = 4 * 1_825_458_176


@pytest.mark.slow
def test_it_is_exported_within_memory_and_makes_tokens(
    own_cache: Path, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    bundle = edgeattn.export("plm-1.8b", "onnx", "w4", output=tmp_path, options={"cache": "float16"})
    manifest = bundle.manifest
    assert max(stage.peak_mb for stage in manifest.stages) * 1e6 <= 2.2 * CHECKPOINT
    assert manifest.weights.kind == "random"
    assert bundle.path.name == "plm-1.8b-random-float16.onnx.w4"
    assert manifest.facts["entries"]["decode"]["quantized"]["left_in_floats"] == []
    assert sum(i.size for name, i in manifest.files.items() if name.startswith("model.onnx")) < 0.16 * CHECKPOINT
    words = ("generate", str(bundle.path), "--prompt", "Return a new list", "--max-tokens", "8", "--json")
    done = edgeattn_cli(*words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tokens"] == 8
    assert said["context"] == 4096
    assert said["cache_bytes"] == 144 * 2**20  # as it is allocated: 4,096 tokens, 32 layers, float16
