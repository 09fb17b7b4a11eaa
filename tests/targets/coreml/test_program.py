"""Functions of whole packages: modes, several functions, flexible shapes, images, classifiers, what is watched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeattn.core.errors import UsageError
from edgeattn.recipe import Preprocess
from edgeattn.targets.coreml.mil.package import open_package
from edgeattn.targets.coreml.mil.program import Function
from edgeattn.targets.coreml.runtime import MilRuntime, adopt
from edgeattn.targets.feeds import own_feeds
from tests.targets.coreml.harness import ct, mb, save
from tests.targets.coreml.lowering import lowered


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.conv(x).relu().mean((2, 3))))
        return y


def test_modes_round_as_they_say(tmp_path: Path) -> None:
    """fp32 differs from the reference by the weights alone; fp32acc and native round on the way, each otherwise."""
    torch.manual_seed(0)
    made = lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path, "fp16")
    values = {
        mode: [item.value for item in MilRuntime(made.artifact, mode).trace("main", made.feeds)]
        for mode in ("fp32", "fp32acc", "native")
    }
    assert {value.dtype for value in values["fp32acc"][:-1]} == {np.dtype(np.float32)}
    assert {value.dtype for value in values["native"][:-1]} == {np.dtype(np.float16)}
    for rounded in values["fp32acc"]:
        assert (rounded.astype(np.float16).astype(np.float32) == rounded).all()
    assert any((v.astype(np.float16).astype(np.float32) != v).any() for v in values["fp32"])
    for mode in values:
        assert made.numerics(mode)["y"].holds(5e-3)


def test_values_carry_their_modules(tmp_path: Path) -> None:
    made = lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path, "fp16")
    seen = {item.op: item.module for item in MilRuntime(made.artifact).trace("main", made.feeds)}
    assert {seen["conv"], seen["layer_norm"], seen["linear"]} == {"conv", "norm", "head"}


def _functions(path: Path) -> None:
    """One package whose functions double and negate."""
    folder = path.parent
    for name, factor in (("double", 2.0), ("negate", -1.0)):
        save(
            lambda x, f=factor: mb.mul(x=x, y=np.float32(f)),
            {"x": np.zeros((2, 3), np.float32)},
            folder / f"{name}.mlpackage",
        )
    described = ct.utils.MultiFunctionDescriptor()
    for name in ("double", "negate"):
        described.add_function(str(folder / f"{name}.mlpackage"), "main", name)
    described.default_function_name = "negate"
    ct.utils.save_multifunction(described, str(path))


def test_several_functions(tmp_path: Path) -> None:
    _functions(tmp_path / "both.mlpackage")
    package = open_package(tmp_path / "both.mlpackage")
    assert package.functions == ("negate", "double")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name, factor in (("double", 2), ("negate", -1), (None, -1)):
        (result,) = Function(package, name).run({"x": x}).values()
        np.testing.assert_array_equal(result, x * factor)
    artifact = adopt(tmp_path / "both.mlpackage")
    assert list(artifact.entries) == ["negate", "double"]
    (result,) = MilRuntime(artifact).run("double", {"x": x}).values()
    np.testing.assert_array_equal(result, x * 2)


def _foreign(shape: object, path: Path) -> nn.Module:
    """Converted by plain coremltools through jit.trace, as a stranger would."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    traced = torch.jit.trace(model.eval(), torch.randn(1, 3, 16, 16))
    ct.convert(
        traced,
        inputs=[ct.TensorType("x", shape)],
        outputs=[ct.TensorType("y")],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    return model


FLEXIBLE = {
    "range": (
        lambda: ct.Shape((1, 3, ct.RangeDim(8, 64, 16), ct.RangeDim(8, 64, 16))),
        [(8, 8), (64, 33)],
        [(7, 8), (65, 8)],
    ),
    "enumerated": (
        lambda: ct.EnumeratedShapes([[1, 3, 16, 16], [1, 3, 32, 32]], [1, 3, 16, 16]),
        [(16, 16), (32, 32)],
        [(16, 32)],
    ),
}


@pytest.mark.parametrize("kind", FLEXIBLE)
def test_flexible_shapes_of_a_foreign_package(kind: str, tmp_path: Path) -> None:
    shape, good, bad = FLEXIBLE[kind]
    model = _foreign(shape(), tmp_path / "m.mlpackage")
    function = Function(open_package(tmp_path / "m.mlpackage"))
    for size in good:
        x = torch.randn(1, 3, *size)
        np.testing.assert_allclose(function.run({"x": x.numpy()})["y"], model(x).detach(), rtol=1e-5, atol=1e-6)
    for size in bad:
        with pytest.raises(UsageError, match="another shape"):
            function.run({"x": np.zeros((1, 3, *size), np.float32)})


@pytest.mark.parametrize("image", ["rgb", "bgr"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_images_are_preprocessed_inside(image: str, precision: str, tmp_path: Path) -> None:
    """Pixels in, the same numbers out as with the preprocessing outside."""
    preprocess = Preprocess(scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = torch.randint(0, 256, (1, 3, 16, 16))
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    made = lowered(Net(), {"x": (pixels / 255 - mean) / std}, tmp_path, precision, preprocess=preprocess, image=image)
    entry = made.artifact.entries["main"]
    assert entry.inputs[0].dtype == "uint8"
    np.testing.assert_array_equal(own_feeds(entry.inputs, made.feeds)["x"], pixels)
    kind = open_package(tmp_path / "main.mlpackage").spec.description.input[0].type
    assert kind.WhichOneof("Type") == "imageType"
    assert made.numerics()["y"].holds(1e-4 if precision == "fp32" else 1e-2)


def test_what_was_no_image_is_refused(tmp_path: Path) -> None:
    made = lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path, preprocess=Preprocess(scale=1 / 255), image="rgb")
    with pytest.raises(UsageError, match="not made of pixels"):
        own_feeds(made.artifact.entries["main"].inputs, made.feeds)


@pytest.mark.parametrize(
    ("shape", "preprocess", "said"),
    [((1, 3, 16, 16), None, r"\[preprocess\]"), ((2, 3, 16, 16), Preprocess(), "no such image")],
)
def test_an_image_needs_one(shape: tuple[int, ...], preprocess: Preprocess | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        lowered(Net(), {"x": torch.randn(shape)}, tmp_path, preprocess=preprocess, image="rgb")


def test_a_classifier_gives_label_and_numbers(tmp_path: Path) -> None:
    labels = ("ant", "bee", "cat", "dog", "eel")
    made = lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path, labels=labels, classifier="yes")
    assert made.numerics()["y"].holds(1e-6)
    outputs = MilRuntime(made.artifact).run("main", made.feeds)
    assert outputs["classLabel"] == labels[int(made.reference["y"].argmax())]
    with pytest.raises(UsageError, match="labels"):
        lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path / "b", labels=labels[:2], classifier="yes")


@pytest.mark.parametrize("io", ["float32", "float16"])
def test_half_inputs_need_no_cast(io: str, tmp_path: Path) -> None:
    made = lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path, "fp16", io=io)
    entry = made.artifact.entries["main"]
    assert {t.dtype for t in (*entry.inputs, *entry.outputs)} == {io}
    assert ("cast" in made.facts["nodes"]) == (io == "float32")
    assert made.numerics()["y"].holds(5e-3)


@pytest.mark.parametrize(("deployment", "version"), [("iOS16", 7), ("macOS14", 8), ("iOS18", 9)])
def test_deployment_target(deployment: str, version: int, tmp_path: Path) -> None:
    lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path, deployment=deployment)
    assert open_package(tmp_path / "main.mlpackage").spec.specificationVersion == version


class Kinds(nn.Module):
    """Scalars, integers and truth values go in and come out."""

    def forward(self, x: Tensor, k: Tensor, flag: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * k, torch.logical_and(x > 0, flag), x.argmax(-1) + index


def test_kinds_of_inputs_and_outputs(tmp_path: Path) -> None:
    inputs = {
        "x": torch.randn(3, 4),
        "factor": torch.tensor(2.5),
        "flag": torch.tensor([True]),
        "index": torch.tensor([1, 2, 3]),
    }
    made = lowered(Kinds(), inputs, tmp_path, outputs=("product", "both", "sum"))
    assert [t.dtype for t in made.artifact.entries["main"].inputs] == ["float32", "float32", "int32", "int32"]
    assert all(n.holds(1e-6) for n in made.numerics().values())
    assert [item["op"] for item in made.facts["integer"]]


def test_nothing_of_this_machine_is_in_the_package(tmp_path: Path) -> None:
    lowered(Net(), {"x": torch.randn(1, 3, 16, 16)}, tmp_path)
    files = [path for path in (tmp_path / "main.mlpackage").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["Manifest.json", "model.mlmodel", "weight.bin"]
    here = str(Path(__file__).resolve().parents[3]).encode()
    assert not any(here in path.read_bytes() for path in files)
