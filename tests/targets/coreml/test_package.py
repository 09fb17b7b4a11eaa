"""Reading a package: whatever is damaged, missing or unknown is said, and nothing is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeattn.core.errors import ConversionFailed, UsageError
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from edgeattn.targets.coreml.mil.registry import OPS
from tests.targets.coreml.harness import mb, save

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
FEEDS = {"x": np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 64)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "whole.mlpackage"
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    save(lambda x: mb.linear(x=x, weight=weight, name="projected"), FEEDS, path)
    return path


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "m.mlpackage")
    return tmp_path / "m.mlpackage"


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _version(path: Path, number: int) -> None:
    spec = open_package(path).spec
    spec.specificationVersion = number
    (path / MODEL).write_bytes(spec.SerializeToString())


def _network(path: Path) -> None:
    spec = open_package(path).spec
    spec.neuralNetwork.SetInParent()
    (path / MODEL).write_bytes(spec.SerializeToString())


def _manifest(path: Path, file: str) -> None:
    data = json.loads((path / "Manifest.json").read_text())
    data["itemInfoEntries"][data["rootModelIdentifier"]]["path"] = file
    (path / "Manifest.json").write_text(json.dumps(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "model cut": (lambda p: _cut(p / MODEL, 0.5), "truncated"),
    "model gone": (lambda p: (p / MODEL).unlink(), "missing"),
    "manifest cut": (lambda p: _cut(p / "Manifest.json", 0.5), "damaged"),
    "manifest gone": (lambda p: (p / "Manifest.json").unlink(), "Manifest.json"),
    "manifest without root": (lambda p: (p / "Manifest.json").write_text("{}"), "damaged"),
    "manifest leads out": (lambda p: _manifest(p, "../../../secret"), "outside"),
    "weights gone": (lambda p: (p / WEIGHTS).unlink(), "No such file"),
    "weights cut": (lambda p: _cut(p / WEIGHTS, 0.5), "ends at byte"),
    "weights empty": (lambda p: (p / WEIGHTS).write_bytes(b""), "empty"),
    "weights zeroed": (lambda p: (p / WEIGHTS).write_bytes(bytes(100_000)), "no value begins"),
    "version too new": (lambda p: _version(p, 99), "specification version is 99"),
    "version too old": (lambda p: _version(p, 4), "specification version is 4"),
    "neural network": (_network, "neuralNetwork"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_said(what: str, package: Path) -> None:
    damage, said = DAMAGE[what]
    damage(package)
    with pytest.raises(UsageError) as caught:
        Function(open_package(package))
    assert said in f"{caught.value}"
    assert caught.value.fix


@pytest.mark.parametrize("path", ["missing.mlpackage", "file.mlpackage"])
def test_no_package(path: str, tmp_path: Path) -> None:
    (tmp_path / "file.mlpackage").write_text("no folder")
    with pytest.raises(UsageError, match="cannot be read"):
        open_package(tmp_path / path)


def test_weights_may_not_be_outside(package: Path) -> None:
    spec = open_package(package).spec
    function = spec.mlProgram.functions["main"]
    for operation in function.block_specializations[function.opset].operations:
        value = operation.attributes["val"]
        if value.WhichOneof("value") == "blobFileValue":
            value.blobFileValue.fileName = "@model_path/../../../weight.bin"
    (package / MODEL).write_bytes(spec.SerializeToString())
    with pytest.raises(UsageError, match="weight file"):
        Function(open_package(package))


FEED_FAULTS = {
    "missing": ({}, "do not match"),
    "unknown": ({**FEEDS, "y": FEEDS["x"]}, "do not match"),
    "shape": ({"x": FEEDS["x"][:1]}, "(2, 64) float32"),
    "rank": ({"x": FEEDS["x"][None]}, "(2, 64) float32"),
    "dtype": ({"x": FEEDS["x"].astype(np.float64)}, "(2, 64) float32"),
    "nan": ({"x": np.where(FEEDS["x"] > 0.9, np.nan, FEEDS["x"]).astype(np.float32)}, "NaN"),
}


@pytest.mark.parametrize("what", FEED_FAULTS)
def test_feeds_are_checked(what: str, whole: Path) -> None:
    feeds, said = FEED_FAULTS[what]
    with pytest.raises(UsageError) as caught:
        Function(open_package(whole)).run(feeds)
    assert said in str(caught.value)


def test_infinite_feeds_are_values(whole: Path) -> None:
    """A mask may hold -inf."""
    assert Function(open_package(whole)).run({"x": np.full((2, 64), -np.inf, np.float32)})


def test_function_and_mode_are_checked(whole: Path) -> None:
    with pytest.raises(UsageError, match="no such function"):
        Function(open_package(whole), "other")
    with pytest.raises(UsageError, match="fp32acc"):
        Function(open_package(whole), mode="fp8")


def test_an_operation_without_implementation_is_named(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OPS, "linear")
    with pytest.raises(ConversionFailed) as caught:
        Function(open_package(whole))
    assert caught.value.value == "linear"
    assert "projected" in str(caught.value.where)
