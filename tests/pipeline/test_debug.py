"""Faults planted into artifacts' own files are found: the module by name, and for most the cause."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import Array
from edgeattn.pipeline import debug as module
from edgeattn.pipeline import sides
from edgeattn.pipeline.debug import Debugged, debug
from tests.pipeline import faults

NET = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, d=24, heads=3):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(d, d) for _ in range(4))
    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (f(x).reshape(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, d))

class Block(nn.Module):
    def __init__(self, d=24):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(d), Attention(d), nn.LayerNorm(d)
        self.up, self.act, self.down = nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d)
    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.act(self.up(self.norm2(x))))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU()
        self.depthwise, self.act2 = nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.ReLU6()
        self.bn, self.conv, self.bn2 = nn.BatchNorm2d(12), nn.Conv2d(12, 24, 3, 1, 1), nn.BatchNorm2d(24)
        self.pool, self.block = nn.AvgPool2d(2), Block()
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)
    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.bn(self.act2(self.depthwise(x)) + x)
        x = self.pool(self.bn2(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.block(x)).mean(1))

def build():
    torch.manual_seed(0)
    return Net()
"""
INPUT = ["x=1x3x32x32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the model's file and all bundles of it."""
    path = tmp_path_factory.mktemp("debug")
    (path / "net.py").write_text(NET)
    return path


@pytest.fixture(scope="module")
def exported(folder: Path) -> Callable[[str, str], Bundle]:
    """The model exported by the real pipeline, once for each target and precision."""
    made: dict[tuple[str, str], Bundle] = {}

    def export(target: str, precision: str) -> Bundle:
        if (target, precision) not in made:
            made[target, precision] = edgeattn.export(
                f"{folder}/net.py:build", target=target, precision=precision, inputs=INPUT, output=folder
            )
        return made[target, precision]

    return export


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    """Models in PyTorch are built once, as their deploy form is proven each time."""
    patch, models = pytest.MonkeyPatch(), {}
    build = module._model

    def once(text: str, *args: Any) -> Any:
        return models[text] if text in models else models.setdefault(text, build(text, *args))

    patch.setattr(module, "_model", once)
    yield
    patch.undo()


@pytest.fixture
def damaged(
    exported: Callable[[str, str], Bundle], tmp_path: Path, opened: None
) -> Callable[[str, str, Callable[[Path], None]], Bundle]:
    """A copy of a bundle whose model file is changed."""

    def damage(target: str, precision: str, plant: Callable[[Path], None]) -> Bundle:
        bundle = exported(target, precision)
        copied = tmp_path / bundle.path.name
        shutil.copytree(bundle.path, copied)
        plant(copied / bundle.artifact().entries["main"].file)
        return Bundle.open(copied)

    return damage


def swapped(axis: int) -> Callable[[Array], Array]:
    """Two channels along an axis change places."""

    def change(weight: Array) -> Array:
        weight = weight.copy()
        moved = np.moveaxis(weight, axis, 0)
        moved[[1, 4]] = moved[[4, 1]]
        return weight

    return change


def turned(weight: Array) -> Array:
    """The weight's transpose."""
    return weight.T


def doubled(weight: Array) -> Array:
    """Twice the weight."""
    return 2 * weight


def shifted(bias: Array) -> Array:
    """Some of the numbers and 0.1."""
    return (bias + 0.1 * (bias > 0)).astype(bias.dtype)


def huge(weight: Array) -> Array:
    """Products of these overflow float16."""
    return np.sign(weight) * 60000


def set_to(value: Any) -> Callable[[Array], Array]:
    """The same everywhere."""
    return lambda old: np.broadcast_to(np.asarray(value, old.dtype), old.shape)


Case = tuple[str, str, str, str, Callable[[Path], None]]
UP, PROJ = "block.up", "block.attention.proj"
Q, K, V = (f"block.attention.{name}" for name in "qkv")
UNEVEN = np.array([[0, 0], [0, 2], [0, 2], [0, 0]])
CASES: list[Case] = [
    ("onnx", "fp32", "stem", "wrong padding", lambda p: faults.onnx(p, "stem", "Conv", {"pads": [0, 0, 2, 2]})),
    ("onnx", "fp32", "conv", "wrong padding", lambda p: faults.onnx(p, "conv", "Conv", {"pads": [0, 0, 2, 2]})),
    ("onnx", "fp32", UP, "permuted channels", lambda p: faults.onnx(p, UP, "MatMul", swapped(1))),
    ("onnx", "fp32", "conv", "permuted channels", lambda p: faults.onnx(p, "conv", "Conv", swapped(1))),
    ("onnx", "fp16", "depthwise", "fp16 overflow", lambda p: faults.onnx(p, "depthwise", "Conv", huge)),
    ("onnx", "fp32", "conv", "bad scale", lambda p: faults.onnx(p, "conv", "Conv", doubled)),
    ("onnx", "fp32", "block.norm1", "epsilon",
     lambda p: faults.onnx(p, "block.norm1", "LayerNormalization", {"epsilon": 1e-3})),
    ("onnx", "fp32", "bn", "epsilon", lambda p: faults.onnx(p, "bn", "BatchNormalization", {"epsilon": 0.1})),
    ("onnx", "fp32", Q, "transposed weight", lambda p: faults.onnx(p, Q, "MatMul", turned)),
    ("onnx", "fp32", "block.act", "another formula",
     lambda p: faults.onnx(p, "block.act", "Gelu", {"approximate": "tanh"})),
    ("onnx", "fp32", "block.attention", "operation of its own",
     lambda p: faults.onnx(p, "block.attention", "Softmax", {"axis": 2})),
    ("onnx", "fp32", "head", "unknown", lambda p: faults.onnx(p, "head", "Gemm", shifted, 1)),
    ("tflite", "fp32", "stem", "wrong padding", lambda p: faults.tflite(p, "stem", "PAD", set_to(UNEVEN))),
    ("tflite", "fp32", "conv", "permuted channels", lambda p: faults.tflite(p, "conv", "CONV_2D", swapped(0))),
    ("tflite", "fp32", UP, "permuted channels", lambda p: faults.tflite(p, UP, "FULLY_CONNECTED", swapped(0))),
    ("tflite", "fp32", "depthwise", "fp16 overflow",
     lambda p: faults.tflite(p, "depthwise", "DEPTHWISE_CONV_2D", set_to(np.inf))),
    ("tflite", "fp32", "stem", "bad scale", lambda p: faults.tflite(p, "stem", "CONV_2D", doubled)),
    ("tflite", "fp32", "block.norm2", "epsilon", lambda p: faults.tflite(p, "block.norm2", "ADD", set_to(1e-2))),
    ("tflite", "fp32", K, "transposed weight", lambda p: faults.tflite(p, K, "FULLY_CONNECTED", turned)),
    ("tflite", "fp32", PROJ, "transposed weight", lambda p: faults.tflite(p, PROJ, "FULLY_CONNECTED", turned)),
    ("tflite", "fp32", "block.attention", "operation of its own",
     lambda p: faults.tflite(p, "block.attention", "MUL", doubled)),
    ("coreml", "fp32", "conv", "wrong padding",
     lambda p: faults.coreml(p, "conv", "conv", "pad", set_to([0, 2, 0, 2]))),
    ("coreml", "fp32", UP, "permuted channels", lambda p: faults.coreml(p, UP, "linear", "weight", swapped(0))),
    ("coreml", "fp16", UP, "fp16 overflow", lambda p: faults.coreml(p, UP, "linear", "weight", huge)),
    ("coreml", "fp32", "depthwise", "bad scale", lambda p: faults.coreml(p, "depthwise", "conv", "weight", doubled)),
    ("coreml", "fp32", "norm", "epsilon", lambda p: faults.coreml(p, "norm", "layer_norm", "epsilon", set_to(1e-3))),
    ("coreml", "fp32", V, "transposed weight", lambda p: faults.coreml(p, V, "linear", "weight", turned)),
    ("coreml", "fp32", "block.attention", "operation of its own",
     lambda p: faults.coreml(p, "block.attention", "softmax", "axis", set_to(2))),
]  # fmt: skip


def named(found: Debugged) -> tuple[str | None, str | None]:
    """Module and cause."""
    return found.comparison.culprit, found.cause.name if found.cause else None


@pytest.mark.parametrize(("target", "precision", "at", "cause", "plant"), CASES, ids=["-".join(c[:4]) for c in CASES])
def test_a_planted_fault_is_found_with_its_cause(
    target: str, precision: str, at: str, cause: str, plant: Callable[[Path], None], damaged: Any, folder: Path
) -> None:
    bundle = damaged(target, precision, plant)
    found = debug(f"{folder}/net.py:build@deploy", str(bundle.path), inputs=INPUT)
    assert named(found) == (at, cause)
    assert not found.holds
    assert any("not as it was exported" in note for note in found.notes)


@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml"])
@pytest.mark.parametrize("form", ["training", "deploy"])
def test_nothing_is_named_where_all_is_right(target: str, form: str, exported: Any, folder: Path, opened: None) -> None:
    found = debug(f"{folder}/net.py:build@{form}", str(exported(target, "fp32").path), inputs=INPUT)
    assert found.holds
    assert found.comparison.first is None
    assert all(met.error < 1e-5 for met in found.comparison.met)
    paths = [met.module for met in found.comparison.met]
    assert paths.index("depthwise" if target != "tflite" else "act2") < paths.index("block.norm1") < paths.index("head")
    assert sum(found.comparison.passed.values()) >= 1  # bn2 is fused, in tflite stem and depthwise too


def test_a_fault_that_does_not_reach_the_outputs_is_named_too(damaged: Any, folder: Path) -> None:
    # A softmax does not heed what is added to all of its arguments, which is all that the bias of keys does.
    def plant(path: Path) -> None:
        faults.onnx(path, K, "Add", lambda bias: bias + 1)

    found = debug(f"{folder}/net.py:build@deploy", str(damaged("onnx", "fp32", plant).path), inputs=INPUT)
    assert found.holds
    assert named(found) == (K, "bias")
    assert not found.comparison.reaches


def test_the_training_form_finds_it_as_well(damaged: Any, folder: Path) -> None:
    bundle = damaged("onnx", "fp32", lambda p: faults.onnx(p, Q, "MatMul", turned))
    found = debug(f"{folder}/net.py:build", str(bundle.path), inputs=INPUT)
    assert named(found) == (Q, "transposed weight")


def test_two_artifacts_and_a_witness(damaged: Any, exported: Any, folder: Path) -> None:
    good = str(exported("tflite", "fp32").path)
    bad = damaged("onnx", "fp32", lambda p: faults.onnx(p, "block.norm1", "LayerNormalization", {"epsilon": 1e-3}))
    alone = debug(good, str(bad.path))
    assert alone.comparison.culprit == "block.norm1"
    assert not alone.comparison.sure
    for pair in ((good, str(bad.path)), (str(bad.path), good)):
        both = debug(*pair, witness=f"{folder}/net.py:build@deploy", inputs=INPUT)
        assert named(both) == ("block.norm1", "epsilon")
        assert f"it is {bad.path} that is not" in both.notes[-1]


def test_a_file_is_compared_as_it_is(damaged: Any, exported: Any, tmp_path: Path) -> None:
    good = exported("onnx", "fp32")
    file = tmp_path / "edited.onnx"
    shutil.copy(good.path / "model.onnx", file)
    faults.onnx(file, "conv", "Conv", doubled)
    found = debug(str(good.path), str(file))
    assert named(found) == ("conv", "bad scale")
    assert not [note for note in found.notes if "taken for" in note]  # EdgeAttn's own files say their precision


def test_a_model_as_the_second_program(damaged: Any, folder: Path) -> None:
    bundle = damaged("onnx", "fp32", lambda p: faults.onnx(p, "conv", "Conv", doubled))
    found = debug(str(bundle.path), f"{folder}/net.py:build@deploy", inputs=INPUT)
    assert named(found) == ("conv", "bad scale")
    assert found.sides == (f"{folder}/net.py:build@deploy", str(bundle.path))


def test_training_and_deploy_form_agree(folder: Path, opened: None) -> None:
    found = debug(f"{folder}/net.py:build", f"{folder}/net.py:build@deploy", inputs=INPUT)
    assert found.holds
    assert found.sample == "random inputs of the recipe"
    assert found.comparison.first is None


def test_tensors_are_fetched_in_windows_that_are_bounded(
    exported: Any, damaged: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{folder}/net.py:build@deploy"
    bundle = damaged("onnx", "fp32", lambda p: faults.onnx(p, "norm", "LayerNormalization", {"epsilon": 1e-2}))
    whole = debug(path, str(bundle.path), inputs=INPUT)
    monkeypatch.setattr(sides.Windows.__init__, "__defaults__", (40_000,))
    monkeypatch.setattr(sides, "_FIRST", 2)
    parts = debug(path, str(bundle.path), inputs=INPUT)
    assert named(parts) == named(whole) == ("norm", "epsilon")
    (runs, held), (runs_whole, held_whole) = parts.comparison.windows, whole.comparison.windows
    assert runs > runs_whole
    assert held < 120_000 < held_whole


def test_given_inputs_are_used(exported: Any, folder: Path, opened: None) -> None:
    feeds = {"x": np.ones((1, 3, 32, 32), np.float32)}
    bundle = str(exported("onnx", "fp32").path)
    assert debug(f"{folder}/net.py:build@deploy", bundle, inputs=INPUT, feeds=feeds).sample == "the given inputs"
    with pytest.raises(UsageError, match="do not match"):
        debug(f"{folder}/net.py:build@deploy", bundle, inputs=INPUT, feeds={"y": feeds["x"]})


def test_other_programs_are_refused(exported: Any, digits: Bundle, tmp_path: Path) -> None:
    bundle = str(exported("onnx", "fp32").path)
    with pytest.raises(UsageError, match="another shape"):
        debug(bundle, str(digits.path))
    with pytest.raises(UsageError, match="no such file"):
        debug(bundle, str(tmp_path / "none.onnx"))
    with pytest.raises(UsageError, match="unknown form"):
        debug("fmvit-digits@other", bundle)
    (tmp_path / "broken.tflite").write_bytes(b"none")
    with pytest.raises(UsageError, match="cannot be read"):
        debug(bundle, str(tmp_path / "broken.tflite"))
    (tmp_path / "broken.onnx").write_bytes(b"none")
    with pytest.raises(UsageError, match="cannot be read"):
        debug(bundle, str(tmp_path / "broken.onnx"))
