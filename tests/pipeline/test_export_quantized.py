"""Quantized exports through the real pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgeattn
from edgeattn import recipe as recipes
from edgeattn.bundle import Bundle
from edgeattn.core.errors import UsageError
from edgeattn.core.schema import find
from edgeattn.pipeline.export import make_job

DROPS = {"w8": 0.005, "w8a8": 0.01, "w4": 0.02}


def export(precision: str, output: Path, target: str = "onnx", **options: object) -> Bundle:
    return edgeattn.export("fmvit-digits", target, precision, output, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", list(DROPS))
@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml"])
def test_the_trained_model_keeps_its_accuracy(target: str, precision: str, tmp_path: Path) -> None:
    manifest = export(precision, tmp_path, target).manifest
    task = manifest.task
    assert task is not None
    assert task["samples"] == 360
    assert task["reference_accuracy"] - task["artifact_accuracy"] <= DROPS[precision]
    quantized = manifest.facts["entries"]["main"]["quantized"]
    assert len(quantized["operations"]) >= 40
    modules = {item["module"] for item in quantized["operations"]}
    assert modules | set(quantized.get("modules_in_floats", ())) >= {"stem.0.conv", "head.linear"}


@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml"])
def test_float16_keeps_the_accuracy(target: str, tmp_path: Path) -> None:
    task = export("fp16", tmp_path, target).manifest.task
    assert task is not None
    assert task["samples"] == 360
    assert task["reference_accuracy"] - task["artifact_accuracy"] <= 0.005


def test_the_manifest_says_what_was_measured_and_on_what(tmp_path: Path) -> None:
    bundle = export("w8a8", tmp_path, samples=40)
    about = bundle.manifest.facts["quantize"]["calibration"]
    assert (about["samples"], about["seed"]) == (40, 0)
    assert about["of"] > 40
    assert about["source"] == "data/digits-calibration.npz"
    assert len(about["sha256"]) == 64
    assert any("40 of" in line for line in bundle.manifest.facts["quantize"]["words"])
    assert any("times as long as fp32" in line for line in bundle.manifest.facts["advice"])
    assert bundle.verify()


def test_other_calibration_samples_make_another_artifact(tmp_path: Path) -> None:
    known = find("recipes")["fmvit-digits"].parent / "data" / "digits-calibration.npz"
    with np.load(known) as data:
        np.save(tmp_path / "dark.npy", (data["x"] * 0.9).astype(np.uint8))
    usual = export("w8a8", tmp_path / "a")
    dark = export("w8a8", tmp_path / "b", calibration=str(tmp_path / "dark.npy"))
    scales = [
        [op["activation_scale"] for op in bundle.manifest.facts["entries"]["main"]["quantized"]["operations"]]
        for bundle in (usual, dark)
    ]
    assert scales[0][0] > 1.03 * scales[1][0]
    assert usual.manifest.key != dark.manifest.key


def test_a_kept_module_stays_in_floats(tmp_path: Path) -> None:
    bundle = export("w4", tmp_path, keep=["stages.1"])
    quantized = bundle.manifest.facts["entries"]["main"]["quantized"]
    assert quantized["modules_in_floats"]
    assert all(module.startswith("stages.1.") for module in quantized["modules_in_floats"])
    assert not any(item["module"].startswith("stages.1.") for item in quantized["operations"])


def test_a_recipe_keeps_modules_by_precision_and_target(tmp_path: Path) -> None:
    home = find("recipes")["fmvit-digits"].parent
    for name in ("checkpoints", "data"):
        shutil.copytree(home / name, tmp_path / name)
    text = (home / "fmvit-digits.toml").read_text()
    extra = '\n[[quant.keep]]\nmodules = ["head"]\nprecisions = ["w8"]\ntargets = ["onnx"]\nwhy = "a test"\n'
    (tmp_path / "own.toml").write_text(text + extra)
    for precision, target, floats in (("w8", "onnx", True), ("w4", "onnx", False), ("w8", "tflite", False)):
        job = make_job(str(tmp_path / "own.toml"), target=target, precision=precision)
        assert job.quant.scheme("head.linear").floats == floats


@pytest.mark.parametrize(
    ("options", "precision", "said"),
    [
        ({"keep": ["stages.0.0.ffn.contrac"]}, "w8", "did you mean 'stages.0.0.ffn.contract'"),
        ({"keep": ["head"]}, "fp16", "--precision w8a8"),
        ({"calibration": "nowhere.npz"}, "w8a8", "correct the path"),
        ({"samples": 0}, "w8a8", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, object], precision: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        export(precision, tmp_path, **options)
    assert said in f"{caught.value.fix} {caught.value.why}"
    assert not list(tmp_path.glob("fmvit*"))


def test_unfit_samples_are_refused_before_anything_is_quantized(tmp_path: Path) -> None:
    np.save(tmp_path / "black.npy", np.zeros((10, 1, 32, 32), np.uint8))
    with pytest.raises(UsageError, match="calibration"):
        export("w8a8", tmp_path, calibration=str(tmp_path / "black.npy"))
    assert not list(tmp_path.glob("fmvit*"))


def test_a_model_without_samples_says_so(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))\n"
    )
    bundle = edgeattn.export(f"{tmp_path}/net.py:build", "onnx", "w8a8", tmp_path, inputs=["x=1x3x16x16"])
    assert any("random inputs" in line for line in bundle.manifest.facts["quantize"]["words"])
    nodes = bundle.manifest.facts["entries"]["main"]["nodes"]
    assert nodes["QuantizeLinear"] >= 2


def test_weights_are_reduced_to_seven_bits_unless_the_device_cannot_saturate() -> None:
    def settled(**options: object) -> str:
        return make_job("fmvit-digits", target="onnx", precision="w8a8", **options).settled["weight_range"]  # type: ignore[arg-type]

    assert settled() == "reduced"
    assert settled(device="raspberry-pi-5") == "full"
    assert settled(options={"weight_range": "full"}) == "full"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "share"), [("w8", 0.30), ("w4", 0.18)])
@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml"])
def test_sizes_of_a_large_model(target: str, precision: str, share: float, tmp_path: Path) -> None:
    manifest = edgeattn.export("fmvit-b", target, precision, tmp_path).manifest
    parameters = manifest.reparam["after"]["parameters"]
    assert manifest.facts["entries"]["main"]["weight_bytes"] <= share * 4 * parameters


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "drop"), [("w8", 0.01), ("w8a8", 0.02), ("w4", 0.04)])
@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml"])
def test_a_harder_model_keeps_its_accuracy(target: str, precision: str, drop: float, tmp_path: Path) -> None:
    task = edgeattn.export("fmvit-scenes", target, precision, tmp_path).manifest.task
    assert task is not None
    assert task["samples"] == 1500
    assert task["reference_accuracy"] - task["artifact_accuracy"] <= drop


def test_the_coverage_is_kept_with_the_stage(own_cache: Path, tmp_path: Path) -> None:
    export("w8a8", tmp_path, samples=8)
    (file,) = own_cache.rglob("coverage.json")
    report = json.loads(file.read_text())
    assert report["samples"] == 8
    assert {facts["module"] for facts in report["modules"]} >= {"stem.0.conv", "head.linear"}


def test_resolved_calibration_is_part_of_the_digest(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 1, 32, 32), np.uint8))
    spec = recipes.CalibrationSpec(source=str(tmp_path / "a.npy"))
    first = recipes.resolve("fmvit-digits", calibration=spec).sha256
    np.save(tmp_path / "a.npy", np.ones((1, 1, 32, 32), np.uint8))
    assert recipes.resolve("fmvit-digits", calibration=spec).sha256 != first
