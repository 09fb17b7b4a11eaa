"""What the commands show."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgeattn
from edgeattn.bundle import Bundle

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_export_says_what_was_proven_and_what_to_do_next(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    done = edgeattn_cli("export", "fmvit-digits", "-o", tmp_path)
    assert done.returncode == 0
    path = tmp_path / "fmvit-digits.onnx.fp32"
    for words in ("held", "reparameterized", "blocks fused", "relative L2", "358 of 360", "model.onnx", "stages"):
        assert words in done.stdout
    following = [line.strip() for line in done.stdout.partition("next:")[2].splitlines() if line.strip()]
    assert following[0] == f"edgeattn verify {path}"
    *commands, runner = following
    assert [line.split()[1] for line in commands] == ["verify", "profile", "inspect"]
    for line in commands:
        assert edgeattn_cli(*line.split()[1:]).returncode == 0
    run = runner.partition("(")[0].split()
    assert subprocess.run([sys.executable, *run[1:]], capture_output=True).returncode == 0


def test_random_weights_are_called_random(edgeattn_cli: Cli, tmp_path: Path) -> None:
    done = edgeattn_cli("export", "fmvit-t", "-i", "x=1x3x32x32", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random: nothing was trained" in done.stdout
    bundle = Bundle.open(tmp_path / "fmvit-t-random.onnx.fp32")
    assert bundle.manifest.weights.kind == "random"
    assert "RANDOM" in (bundle.path / "README.md").read_text()


def test_verify_works_without_torch(digits: Bundle) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from edgeattn.cli import main\n"
        f"main(['verify', {str(digits.path)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "held" in done.stdout


def test_verify_json(edgeattn_cli: Cli, digits: Bundle) -> None:
    result = json.loads(edgeattn_cli("verify", digits.path, "--json").stdout)
    assert result["holds"]
    assert result["numerics"]["golden/main-000.npz"]["logits"]["relative_l2"] <= 1e-5


def test_plan_before_and_after(edgeattn_cli: Cli, own_cache: Path, tmp_path: Path) -> None:
    def cached(*words: str) -> list[bool]:
        return [
            s["cached"] for s in json.loads(edgeattn_cli("plan", "fmvit-digits", "--json", *words).stdout)["stages"]
        ]

    assert cached() == [False] * 8
    assert not own_cache.exists()
    edgeattn.export("fmvit-digits", output=tmp_path)
    assert cached() == [True] * 7 + [False]
    assert cached("-p", "fp16") == [True] * 5 + [False] * 3


def test_reparam_shows_every_block_and_what_was_not_fused(edgeattn_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def fused():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "def plain():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
        "def padded():\n    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))\n"
    )
    words = ("-i", "x=1x3x8x8")
    fused = edgeattn_cli("reparam", "net.py:fused", *words, cwd=tmp_path)
    assert fused.returncode == 0, fused.stderr
    assert "1 block fused" in fused.stdout
    assert "conv" in fused.stdout
    assert "Nothing was fused" in edgeattn_cli("reparam", "net.py:plain", *words, cwd=tmp_path).stdout
    assert "pad" in edgeattn_cli("reparam", "net.py:padded", *words, cwd=tmp_path).stdout
    proof = json.loads(edgeattn_cli("reparam", "net.py:fused", *words, "--json", cwd=tmp_path).stdout)
    assert proof["fused"][0]["errors"]["float64_real"] <= 1e-10


def test_lists(edgeattn_cli: Cli, home: Path) -> None:
    recipes = edgeattn_cli("recipes").stdout
    for variant in "tsmbl":
        assert f"fmvit-{variant}" in recipes
    shown = json.loads(edgeattn_cli("recipes", "show", "fmvit-digits").stdout)
    assert shown["recipe"]["inputs"]["x"]["shape"] == [1, 1, 32, 32]
    assert shown["checkpoint"].endswith("fmvit-digits.safetensors")
    assert "host" in edgeattn_cli("devices").stdout
    assert json.loads(edgeattn_cli("devices", "show", "host").stdout)["targets"] == ["onnx", "tflite", "rpi"]
    targets = edgeattn_cli("targets").stdout
    assert "onnx" in targets
    assert "fp32, fp16" in targets


def test_a_users_own_recipe_comes_first(edgeattn_cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "recipes"
    own.mkdir()
    (own / "mine.toml").write_text(
        'name = "mine"\n[model]\nfactory = "torch.nn:Identity"\n[inputs.x]\nshape = [1, 3]\n'
    )
    (own / "fmvit-t.toml").write_text("name = 3\n")
    done = edgeattn_cli("recipes", EDGEATTN_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "mine" in done.stdout
    assert "not valid" in done.stdout


def test_doctor_never_throws(edgeattn_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "def broken(*a, **k):\n    raise ValueError('broken metadata')\n"
        "m.version = broken\nm.entry_points = broken\n"
    )
    done = edgeattn_cli("doctor", "--json", PYTHONPATH=str(tmp_path), EDGEATTN_CACHE="/proc/nowhere")
    assert done.returncode == 0, done.stderr
    found = {item["name"]: item for item in json.loads(done.stdout)}
    assert not found["torch"]["found"]
    assert "broken metadata" in found["torch"]["detail"]


def test_inspect(edgeattn_cli: Cli, digits: Bundle) -> None:
    shown = edgeattn_cli("inspect", digits.path).stdout
    for words in ("model.onnx", "Conv", "logits", "onnxruntime", "358 of 360"):
        assert words in shown
    assert json.loads(edgeattn_cli("inspect", digits.path, "--json").stdout)["schema_version"] == 3


@pytest.mark.slow
def test_another_input_size_is_exported_and_said_not_to_be_scored(edgeattn_cli: Cli, tmp_path: Path) -> None:
    done = edgeattn_cli("export", "fmvit-digits", "-i", "x=2x1x64x32", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not scored" in done.stdout
    manifest = Bundle.open(tmp_path / "fmvit-digits.onnx.fp32").manifest
    assert manifest.task is None
    assert manifest.entries["main"].inputs[0].shape == (2, 1, 64, 32)
    done = edgeattn_cli("export", "fmvit-digits", "-i", "x=8x1x32x32", "-o", tmp_path / "batch")
    assert "358 of 360" in done.stdout


def test_what_follows_an_export_for_a_device_names_it_as_it_was_given(edgeattn_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "shed.toml").write_text('name = "board"\nbase = "raspberry-pi-5"\ntargets = ["onnx"]\n[runtimes]\n')
    for device, added in ((str(tmp_path / "shed.toml"), False), ("raspberry-pi-5", True)):
        words = ("-t", "onnx", "--device", device, "-o", tmp_path / str(added))
        done = edgeattn_cli("export", "fmvit-digits", *words)
        assert done.returncode == 0, done.stderr
        following = done.stdout.partition("next:")[2]
        assert f"fmvit-digits.onnx.fp32 --device {device}    (emulated)" in following
        assert "edgeattn device setup qemu" in following
        assert (f"edgeattn device add NAME ssh://user@host --base {device}" in following) == added
        assert edgeattn_cli("devices", "show", device).returncode == 0
