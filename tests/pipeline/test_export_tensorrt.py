"""Export to TensorRT without a GPU: parser, engines and the typed graph are real; nothing runs on a GPU here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, ConversionFailed, ToolchainMissing, UsageError

pytest.importorskip("tensorrt_rtx")

TYPES = {"fp32": "float", "fp16": "half", "w8a8": "int8", "fp8": "fp8"}
BOUNDS = {"fp32": 1e-5, "fp16": 5e-3, "w8a8": 1e-1, "fp8": 2e-1}


def entry(bundle: Bundle) -> dict:
    return bundle.manifest.facts["entries"]["main"]


def check(name: str, precision: str, output: Path, compute: str = "8.6,8.9,12.0") -> Bundle:
    """What must hold of every model: numbers on the typed graph, an engine for each compute capability."""
    bundle = edgeattn.export(name, target="tensorrt", precision=precision, output=output, options={"compute": compute})
    facts = entry(bundle)
    assert 0 < bundle.verify().worst.relative_l2 <= BOUNDS[precision]
    assert [e["compute_capability"] for e in facts["engines"]] == compute.split(",")
    for engine in facts["engines"]:
        assert (bundle.path / engine["file"]).stat().st_size == engine["bytes"] > facts["weight_bytes"] / 4
        assert engine["names_inside"]
        assert engine["seconds"] > 0
    assert facts["network"]["layers"]
    assert facts["network"]["layer_types"].get(TYPES[precision], 0) > 0
    spec = bundle.manifest.entries["main"].inputs[0]
    assert facts["network"]["inputs"] == [{"name": spec.name, "shape": list(spec.shape), "dtype": "float"}]
    assert "not run on a GPU" in bundle.manifest.unproven
    assert set(facts["modules"]) <= {n.name for n in onnx.load(bundle.path / "model.onnx").graph.node}
    return bundle


@pytest.mark.parametrize("precision", list(TYPES))
def test_digits(tmp_path: Path, precision: str) -> None:
    bundle = check("fmvit-digits", precision, tmp_path, "8.9,12.0" if precision == "fp8" else "8.6,8.9,12.0")
    task = bundle.manifest.task
    assert task is not None
    off = abs(task["artifact_accuracy"] - task["reference_accuracy"])
    assert off <= (0.01 if precision in ("w8a8", "fp8") else 1 / 360)
    for name in ("run.py", "run_tensorrt.py", "build.sh"):
        assert (bundle.path / name).is_file()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8"])
@pytest.mark.parametrize(
    "name",
    [
        "fmvit-t",
        *(pytest.param(f"fmvit-{size}", marks=pytest.mark.slow) for size in "smb"),
        pytest.param("fmvit-l", marks=pytest.mark.hand),
    ],
)
def test_fmvit(tmp_path: Path, name: str, precision: str) -> None:
    bundle = check(name, precision, tmp_path)
    if precision == "w8a8":
        quantized = entry(bundle)["quantized"]
        assert len(quantized["operations"]) > 0
        nodes = onnx.load(bundle.path / "model.onnx").graph
        biases = [n for n in nodes.node if n.op_type == "DequantizeLinear" and "bias" in n.input[0]]
        assert not biases
        zeros = [i for i in nodes.initializer if i.name.endswith("_zero")]
        assert zeros
        assert not any(onnx.numpy_helper.to_array(i).any() for i in zeros)


#: A guest with activations of 1e5 in front of a norm, and two modules that TensorRT's parser does not take.
GUEST = """
import torch
from torch import nn


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4)
        self.loud = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.loud.weight.mul_(3e5)

    def forward(self, x):
        return self.head(self.norm(self.loud(self.stem(x).mean((2, 3)))))


class Det(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x)


class Dets(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Det(), Det(), nn.Linear(1, 2)

    def forward(self, x):
        return self.head((self.first(x) + self.second(x * 2)).unsqueeze(-1))


class Shift(nn.Module):
    def forward(self, x):
        return torch.bitwise_left_shift(x.to(torch.int32), 2).float() * x


class Shifted(Dets):
    def __init__(self):
        super().__init__()
        self.shift = Shift()

    def forward(self, x):
        return super().forward(self.shift(x))


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


class Spectra(Dets):
    def __init__(self):
        super().__init__()
        self.spectrum = Spectrum()

    def forward(self, x):
        return super().forward(self.spectrum(x)[..., :2, :2])


class Plain(nn.Module):
    def forward(self, x):
        return x * 2


class Cancels(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(16) * 1.02)

    def forward(self, x):
        return self.linear(x) - x


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(4096, 4096)
        with torch.no_grad():
            self.scores.weight.mul_(1e-3)

    def forward(self, x):
        return torch.softmax(self.scores(x), -1) @ x.transpose(0, 1)
"""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guest") / "guest.py"
    path.write_text(GUEST)
    return path


def test_what_overflows_is_kept_in_float32_and_refused_when_strict(
    guest: Path, tmp_path: Path, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    words = {"target": "tensorrt", "precision": "fp16", "inputs": ["x=1x3x32x32"], "output": tmp_path}
    bundle = edgeattn.export(f"{guest}:Loud", **words)
    assert bundle.verify().worst.relative_l2 <= 5e-3
    kept = {k["module"] for k in entry(bundle)["kept_in_fp32"]}
    assert {"loud", "norm"} <= kept
    assert "head" not in kept
    refused = edgeattn_cli(
        "export",
        f"{guest}:Loud",
        "-t",
        "tensorrt",
        "-p",
        "fp16",
        "--strict",
        "-i",
        "x=1x3x32x32",
        "-o",
        tmp_path / "no",
    )
    assert refused.returncode == 1
    assert "module loud" in refused.stderr
    assert "norm" in refused.stderr
    assert not list((tmp_path / "no").glob("*"))


def test_strict_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to be strict about"):
        edgeattn.export("fmvit-digits", target="null", strict=True, output=tmp_path)


def test_a_long_softmax_is_kept_in_float32(guest: Path, tmp_path: Path) -> None:
    bundle = edgeattn.export(f"{guest}:Long", target="tensorrt", precision="fp16", inputs=["x=2x4096"], output=tmp_path)
    kept = [k for k in entry(bundle)["kept_in_fp32"] if k["op"] == "Softmax"]
    assert kept
    assert "float16 counts to 2048" in kept[0]["why"]


@pytest.mark.parametrize(  # the second has a weight at which the parser stops
    ("name", "also"), [("Dets", ""), ("Shifted", "BitShift in module shift"), ("Spectra", "DFT in module spectrum")]
)
def test_all_nodes_that_the_parser_refuses_are_listed(
    name: str, also: str, guest: Path, tmp_path: Path, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = edgeattn_cli("export", f"{guest}:{name}", "-t", "tensorrt", "-i", "x=2x4x4", "-o", tmp_path / "out")
    assert done.returncode == 4
    assert also in done.stderr
    assert "Det in module first" in done.stderr
    assert "Det in module second" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [
        ("fp32", {"compute": "7.5"}, "cannot multiply matrices in float32"),
        ("fp8", {"compute": "8.6"}, "has no fp8"),
    ],
)
def test_what_a_gpu_lacks_is_said_before_the_build(
    tmp_path: Path, precision: str, options: dict[str, str], words: str
) -> None:
    with pytest.raises(ConversionFailed, match=words):
        edgeattn.export("fmvit-digits", target="tensorrt", precision=precision, options=options, output=tmp_path)
    assert not list(tmp_path.glob("*"))


def test_a_turing_gpu_takes_fp16(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", device="t4", precision="fp16", output=tmp_path)
    assert [e["file"] for e in entry(bundle)["engines"]] == ["model.sm75.engine"]


def test_a_jetson_builds_its_engine_itself(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", device="jetson-orin-nano", precision="fp16", output=tmp_path)
    assert bundle.manifest.facts["flavour"] == "full"
    assert entry(bundle)["engines"] == []
    assert "built on the device" in bundle.manifest.unproven
    text = (bundle.path / "build.sh").read_text()
    assert "--stronglyTyped" in text
    assert "--fp16" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compute": "8.7"}, "flavour=full"),
        ({"compute": "8.6", "flavour": "full"}, "builds for the GPU that it runs on"),
        ({"strip": "yes"}, "stripped plan"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        edgeattn.export("fmvit-digits", target="tensorrt", options=options, output=tmp_path)


def test_inputs_of_several_sizes_become_a_profile(guest: Path, tmp_path: Path) -> None:
    words = {"inputs": ["x=1..2..4x3x32..48x32"], "options": {"compute": "8.6"}}
    bundle = edgeattn.export(f"{guest}:Loud", target="tensorrt", output=tmp_path, **words)
    assert entry(bundle)["profiles"] == {"x": {"min": [1, 3, 32, 32], "opt": [2, 3, 48, 32], "max": [4, 3, 48, 32]}}
    shapes = [feeds["x"].shape for _, _, feeds, _ in bundle.golden()]
    assert shapes == [(2, 3, 48, 32), (1, 3, 32, 32), (4, 3, 48, 32)]
    assert bundle.verify().worst.relative_l2 <= 1e-5
    assert bundle.manifest.entries["main"].outputs[0].dynamic == ((0, 1, 2, 4),)
    script = (bundle.path / "build.sh").read_text()
    assert "--minShapes=x:1x3x32x32" in script
    assert "--maxShapes=x:4x3x48x32" in script


def test_a_step_is_kept_by_the_bundle(guest: Path, tmp_path: Path) -> None:
    words = {"inputs": ["x=1..2..4x3x32..64/16x32"], "options": {"compute": "8.6"}}
    bundle = edgeattn.export(f"{guest}:Loud", target="tensorrt", output=tmp_path, **words)
    assert entry(bundle)["profiles"]["x"]["max"] == [4, 3, 64, 32]
    assert bundle.manifest.entries["main"].inputs[0].dynamic == ((0, 1, 2, 4), (2, 32, 64, 64, 16))
    (logits,) = bundle.run({"x": np.zeros((3, 3, 48, 32), np.float32)}).values()
    assert logits.shape == (3, 5)
    with pytest.raises(UsageError, match=r"\(1..2..4, 3, 32..64/16, 32\)"):
        bundle.run({"x": np.zeros((3, 3, 40, 32), np.float32)})
    np.save(tmp_path / "x.npy", np.zeros((3, 3, 40, 32), np.float32))
    runner = [sys.executable, bundle.path / "run.py", "--input", f"x={tmp_path / 'x.npy'}"]
    done = subprocess.run(runner, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "wanted is (1 to 4, 3, 32 to 64 by 16, 32) float32" in done.stderr


def test_modelopt_is_never_added_by_itself(
    tmp_path: Path, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    words = ("-t", "tensorrt", "-p", "w8a8", "-O", "quantizer=modelopt", "-o", tmp_path / "out")
    done = edgeattn_cli("export", "fmvit-digits", *words, EDGEATTN_HOME=str(tmp_path / "own"))
    assert done.returncode == 3
    assert "edgeattn toolchain add modelopt" in done.stderr


@pytest.mark.parametrize(("name", "words"), [("Plain", "nothing to quantize"), ("Cancels", "does not hold in w8a8")])
def test_what_int8_cannot_hold_is_refused(guest: Path, tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        edgeattn.export(f"{guest}:{name}", target="tensorrt", precision="w8a8", inputs=["x=2x16"], output=tmp_path)


def test_weight_streaming_builds(tmp_path: Path) -> None:
    bundle = edgeattn.export(
        "fmvit-digits",
        target="tensorrt",
        options={"weight_streaming": "yes", "level": "1", "workspace_mb": "512"},
        output=tmp_path,
    )
    assert "--allowWeightStreaming" in (bundle.path / "build.sh").read_text()
    assert entry(bundle)["engines"][0]["bytes"] > 0


def test_without_tensorrt_the_line_that_installs_it_is_said(tmp_path: Path) -> None:
    """Its module and metadata are hidden from a process; everything else works as before."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m, importlib.util as u\n"
        "version, spec = m.version, u.find_spec\n"
        "def hidden(name, *a):\n"
        "    if 'tensorrt' in name: raise m.PackageNotFoundError(name)\n"
        "    return version(name, *a)\n"
        "m.version = hidden\n"
        "u.find_spec = lambda n, *a: None if n.startswith('tensorrt') else spec(n, *a)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgeattn", *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)

    done = run("export", "fmvit-digits", "-t", "tensorrt", "-o", str(tmp_path / "out"))
    assert done.returncode == ToolchainMissing.exit_code
    assert "pip install 'edgeattn[tensorrt]'" in done.stderr
    assert run("targets").returncode == 0
    assert run("export", "fmvit-digits", "-t", "onnx", "-o", str(tmp_path / "out")).returncode == 0


def test_a_changed_weight_is_caught(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", target="tensorrt", precision="fp16", output=tmp_path)
    path = bundle.path / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(CheckFailed, match=r"model\.onnx|do not fit"):
        Bundle.open(bundle.path).verify()
