"""What the runner does before it trusts a runtime, and what it measures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgeattn
from edgeattn.bundle import Bundle, runner


def run(bundle: Path, *words: str, python: str = sys.executable, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [python, str(bundle / "run.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, check=False)


def test_it_verifies_tflite(digits_tflite: Bundle) -> None:
    result = json.loads(run(digits_tflite.path, "--verify", "--json").stdout)
    assert result["holds"]
    assert result["runtime"].startswith("ai-edge-litert")
    assert result["worst_relative_l2"] <= 1e-5
    assert result["parts"][0]["proven"]


@pytest.mark.parametrize("fixture", ["digits", "digits_tflite"])
def test_it_profiles(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(fixture)
    before = sorted(bundle.path.rglob("*"))
    done = run(bundle.path, "--profile", "--runs", "20", "--warmup", "3", "--threads", "1", "--json")
    result = json.loads(done.stdout)  # nothing else on standard output
    assert (result["runs"], result["warmup"], result["threads"], result["unit"]) == (20, 3, 1, "ms")
    assert len(result["latencies"]) == 20
    assert result["min"] <= result["p50"] <= result["p90"] <= result["p99"] <= max(result["latencies"])
    assert result["load_ms"] > 0
    assert result["peak_rss_mb"] > 10
    assert {"temperature_c", "clock_mhz", "throttled", "load"} <= set(result["before"]) == set(result["after"])
    assert sorted(bundle.path.rglob("*")) == before
    shown = run(bundle.path, "--profile", "--runs", "5").stdout
    assert "p50" in shown
    assert "5 runs" in shown
    assert f"under {result['runtime']}, threads " in shown
    assert f"under {result['runtime']}, Python" in run(bundle.path).stdout


def test_throttling_is_read_from_the_firmware(digits: Bundle, tmp_path: Path) -> None:
    # A stand-in for the Pi's vcgencmd: that the real one prints this form is its documentation's word.
    tool = tmp_path / "vcgencmd"
    tool.write_text("#!/bin/sh\necho throttled=0x50005\n")
    tool.chmod(0o755)
    result = json.loads(run(digits.path, "--json", PATH=f"{tmp_path}:{os.environ['PATH']}").stdout)
    assert result["state"]["throttled"] == [
        "under-voltage",
        "throttled",
        "under-voltage has occurred",
        "throttled has occurred",
    ]


@pytest.fixture
def wrong(digits: Bundle, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A bundle on a machine whose ONNX Runtime computes something else; with the environment that has it."""
    fake = tmp_path / "fake" / "onnxruntime"
    fake.mkdir(parents=True)
    fake.joinpath("__init__.py").write_text(
        "import numpy\n__version__ = '0.0'\nSessionOptions = type('SessionOptions', (), {})\n"
        "class InferenceSession:\n    def __init__(self, *a, **k): pass\n"
        "    def run(self, names, feeds): return [numpy.zeros((1, 10), 'float32') for _ in names]\n"
    )
    return digits.path, {"PYTHONPATH": str(fake.parent), "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.mark.parametrize("words", [["--profile"], ["--input", "x={x}"]], ids=["profile", "input"])
def test_a_runtime_that_computes_something_else_is_refused(
    wrong: tuple[Path, dict[str, str]], words: list[str], tmp_path: Path
) -> None:
    bundle, environ = wrong
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 32, 32), np.float32))
    done = run(bundle, *(word.format(x=tmp_path / "x.npy") for word in words), "--json", **environ)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["error"].startswith("refused: onnxruntime")
    assert "onnxruntime" in result["fix"]
    assert not list(tmp_path.glob("output*"))


def test_a_runtime_that_crashes_is_named(wrong: tuple[Path, dict[str, str]]) -> None:
    bundle, environ = wrong
    module = Path(environ["PYTHONPATH"]) / "onnxruntime" / "__init__.py"
    module.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    for words in (["--verify"], ["--profile"]):
        done = run(bundle, *words, "--json", **environ)
        assert done.returncode == 1
        assert "crashed" in json.loads(done.stdout)["error"]
        assert "SIGSEGV" in json.loads(done.stdout)["error"]


def test_what_held_once_is_not_checked_again(digits: Bundle, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(digits.path, "--profile", "--runs", "1", **cache).returncode == 0
    notes = list((tmp_path / "cache" / "edgeattn" / "proven").iterdir())
    assert len(notes) == 1
    copy = Path(shutil.copytree(digits.path, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "model.onnx").write_bytes(bytes(data))
    done = run(copy, "--profile", "--runs", "1", **cache)  # the files are, every time
    assert done.returncode == 1
    assert "was changed" in done.stderr


def test_a_bundle_of_two_says_what_is_missing(home: Path, tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", device="raspberry-pi-4", output=home / "bundles")
    manifest = bundle.manifest
    assert manifest.target == "rpi"
    assert {info.backend for info in manifest.artifacts} == {"onnx", "tflite"}
    assert manifest.choice is not None
    assert manifest.choice["front"] == manifest.backend
    assert manifest.choice["expected"]
    assert "Expected, not measured on the device" in manifest.choice["why"]
    assert len(bundle.verify().numerics) == 8
    both = json.loads(run(bundle.path, "--json").stdout)
    assert {part["backend"] for part in both["parts"]} == {"onnx", "tflite"}
    block = tmp_path / "sitecustomize.py"
    block.write_text("import sys\nsys.modules['onnxruntime'] = None\n")
    one = json.loads(run(bundle.path, "--json", PYTHONPATH=str(tmp_path)).stdout)
    assert one["holds"]
    missing = [part for part in one["parts"] if "missing" in part]
    assert [part["backend"] for part in missing] == ["onnx"]
    assert "pip install numpy onnxruntime" in missing[0]["fix"]
    assert run(bundle.path, "--backend", "onnx", PYTHONPATH=str(tmp_path)).returncode == 3
    assert run(bundle.path, "--backend", "coreml").returncode == 2


def test_golden_samples_of_another_artifact_s_entries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("golden/decode-000.npz", "decode"), ("golden/decode_8-000.npz", "decode_8")]
    monkeypatch.setattr(runner, "golden_samples", lambda manifest, only="": files)
    monkeypatch.setattr(runner, "golden_data", lambda name: ({}, {"y": np.ones(1)}))
    part = {"backend": "onnx", "entries": {"decode": {"inputs": []}}, "runtimes": []}
    found = runner.compare_golden({"tolerance": 0}, part, lambda entry: (lambda feeds: {"y": np.ones(1)}, "x 1"))
    assert (found["golden"], found["holds"]) == (1, True)
    nothing = runner.compare_golden({"tolerance": 0}, {**part, "entries": {}}, lambda entry: (dict, "x 1"))
    assert not nothing["holds"]


@pytest.fixture(scope="module")
def old_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the real tflite-runtime 2.14.0 and a NumPy that it takes."""
    if sys.version_info[:2] > (3, 11):
        pytest.skip("tflite-runtime 2.14.0 has no wheel for this Python")
    folder = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "numpy<2", "tflite-runtime==2.14.0"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(done.stderr[-500:])
        pytest.skip(f"tflite-runtime cannot be installed: {done.stderr[-200:]}")
    return python


#: Each output from one kind of layer, whose channels have scales far apart.
LAYERS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(100, 32), nn.Linear(32, 48)
        self.heads = nn.Parameter(torch.randn(1, 4, 32, 16))
        self.grouped, self.depth = nn.Conv2d(8, 16, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 16, 4, 2, 1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.mul_(torch.rand(weight.shape[0], *[1] * (weight.ndim - 1)) * 4 + 0.1)

    def forward(self, ids, image):
        words = self.table(ids) * 1.5
        maps = self.grouped(image), self.depth(image), self.up(image)
        return words, self.linear(words), words[:, None] @ self.heads, *maps
"""


@pytest.mark.slow
class TestTFLiteRuntime214:
    """The real wheel, which computes some int8 programs wrongly without a word."""

    def test_fp32_runs_right(self, old_python: str, digits_tflite: Bundle) -> None:
        result = json.loads(run(digits_tflite.path, "--json", python=old_python).stdout)
        assert result["holds"], result
        assert result["runtime"] == "tflite-runtime 2.14.0"
        assert not result["parts"][0]["proven"]
        assert result["worst_relative_l2"] <= 1e-5

    def test_w8_with_a_scale_for_each_channel_is_refused(self, old_python: str, home: Path, tmp_path: Path) -> None:
        bundle = edgeattn.export("fmvit-digits", target="tflite", precision="w8", output=home / "bundles")
        done = run(bundle.path, "--verify", "--json", python=old_python)
        assert done.returncode == 1, done.stdout
        result = json.loads(done.stdout)
        assert not result["holds"]
        np.save(tmp_path / "x.npy", np.zeros((1, 1, 32, 32), np.float32))
        for words in (["--profile"], ["--input", f"x={tmp_path}/x.npy"]):
            done = run(bundle.path, *words, "--json", python=old_python, XDG_CACHE_HOME=str(tmp_path))
            assert done.returncode == 1, done.stdout
            assert "tflite-runtime" in json.loads(done.stdout)["error"]
            assert "ai-edge-litert" in json.loads(done.stdout)["fix"]

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "w8"])
    def test_what_is_made_for_it_runs_right(self, old_python: str, home: Path, precision: str) -> None:
        bundle = edgeattn.export(
            "fmvit-digits", device="raspberry-pi-4-32bit", precision=precision, output=home / "for-the-old"
        )
        assert bundle.manifest.facts["runtime"] == "tflite-runtime"
        result = json.loads(run(bundle.path, "--json", python=old_python).stdout)
        assert result["holds"], result

    def test_every_kind_of_layer_with_int8_weights_runs_right(self, old_python: str, tmp_path: Path) -> None:
        (tmp_path / "net.py").write_text(LAYERS)
        words = ("ids=1x16:int64:0..99", "image=1x8x9x9")
        bundle = edgeattn.export(
            f"{tmp_path}/net.py:Net", device="raspberry-pi-3b-32bit", precision="w8", inputs=words, output=tmp_path
        )
        nodes = bundle.manifest.facts["entries"]["main"]["nodes"]
        kinds = {"EMBEDDING_LOOKUP", "BATCH_MATMUL", "FULLY_CONNECTED", "TRANSPOSE_CONV", "DEPTHWISE_CONV_2D"}
        assert kinds <= set(nodes)
        result = json.loads(run(bundle.path, "--json", python=old_python).stdout)
        assert result["holds"], result

    def test_the_table_of_its_operators_is_what_it_says(self, old_python: str) -> None:
        from edgeattn.targets.tflite.versions import TFLITE_RUNTIME_2_14

        script = Path(__file__).resolve().parents[2] / "examples" / "tflite_operator_versions.py"
        done = subprocess.run([sys.executable, script, old_python], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == TFLITE_RUNTIME_2_14
