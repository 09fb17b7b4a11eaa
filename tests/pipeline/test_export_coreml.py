"""The main job to Core ML, end to end on any machine. Nothing here ran on Apple hardware."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.bundle.manifest import FileInfo
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.core.hashing import sha256_file
from edgeattn.core.schema import find
from edgeattn.targets.coreml.facts import operations
from edgeattn.targets.coreml.mil.package import open_package

MODEL = "main.mlpackage/Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "main.mlpackage/Data/com.apple.CoreML/weights/weight.bin"

NET = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.feed = nn.LayerNorm(16), nn.Linear(8, 8), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.feed(self.mix(self.norm(x).transpose(1, 2)).relu().transpose(1, 2))


def build():
    return nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(128, 10))
"""


def check(name: str, output: Path) -> None:
    """What must hold of every FMViT: numbers, no tensor above rank 4, no integers, no batch norm."""
    for precision, bound in (("fp32", 1e-5), ("fp16", 1e-2)):
        bundle = edgeattn.export(name, target="coreml", precision=precision, output=output)
        assert 0 < bundle.verify().worst.relative_l2 <= bound
        facts = bundle.manifest.facts["entries"]["main"]
        assert facts["high_rank"] == facts["integer"] == []
        assert "batch_norm" not in facts["nodes"]
        for item in operations(open_package(bundle.path / "main.mlpackage")):
            for value in item.outputs:
                tensor = value.type.tensorType
                assert (tensor.rank <= 4, tensor.dataType in (10, 11)) == (True, True), item.type
        if bundle.manifest.task:
            assert bundle.manifest.task["top1_agreement"] == 1.0


def test_digits(tmp_path: Path) -> None:
    check("fmvit-digits", tmp_path)


@pytest.mark.slow
def test_fmvit_t(tmp_path: Path) -> None:
    check("fmvit-t", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s", "m", "b", "l"])
def test_fmvit(variant: str, tmp_path: Path) -> None:
    check(f"fmvit-{variant}", tmp_path)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    (folder / "net.py").write_text(NET)
    return folder / "net.py"


@pytest.fixture
def exported(net: Path, tmp_path: Path) -> Bundle:
    return edgeattn.export(f"{net}:build", "coreml", output=tmp_path, inputs=["x=2x8x16"])


def sealed(bundle: Bundle) -> Bundle:
    """The bundle with a manifest that fits its files, as whoever changed them would leave it."""
    files = {
        name: FileInfo(sha256=sha256_file(bundle.path / name), size=(bundle.path / name).stat().st_size)
        for name in bundle.manifest.files
    }
    manifest = bundle.manifest.model_copy(update={"files": files}).sealed()
    (bundle.path / "manifest.json").write_text(manifest.text(), encoding="utf-8")
    return Bundle.open(bundle.path)


def _constants(path: Path, kind: str, parameter: str) -> tuple[Any, list[Any]]:
    """The model, and the constants that operations of one kind take for a parameter."""
    spec = open_package(path).spec
    function = spec.mlProgram.functions["main"]
    listed = function.block_specializations[function.opset].operations
    names = [item.inputs[parameter].arguments[0].name for item in listed if item.type == kind]
    return spec, [item for item in listed if item.type == "const" and item.outputs[0].name in names]


def _change_epsilon(bundle: Path) -> None:
    spec, found = _constants(bundle / "main.mlpackage", "layer_norm", "epsilon")
    for item in found:
        item.attributes["val"].immediateValue.tensor.floats.values[:] = [1e-3]
    (bundle / MODEL).write_bytes(spec.SerializeToString())


def _swap_permutation(bundle: Path) -> None:
    spec, found = _constants(bundle / "main.mlpackage", "transpose", "perm")
    assert found
    for item in found:
        item.attributes["val"].immediateValue.tensor.ints.values[:] = [0, 1, 2]
    (bundle / MODEL).write_bytes(spec.SerializeToString())


def _corrupt_weight(bundle: Path) -> None:
    spec = open_package(bundle / "main.mlpackage").spec
    function = spec.mlProgram.functions["main"]
    for item in function.block_specializations[function.opset].operations:
        value = item.attributes["val"] if item.type == "const" else None
        if value is not None and value.WhichOneof("value") == "blobFileValue":
            place = value.blobFileValue.offset + 64  # its data begin after 64 bytes of metadata
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[place : place + 4] = np.float32(3.0).tobytes()
    (bundle / WEIGHTS).write_bytes(data)


@pytest.mark.parametrize("damage", [_change_epsilon, _corrupt_weight])
def test_a_changed_package_is_caught(damage: Callable[[Path], None], exported: Bundle) -> None:
    damage(exported.path)
    with pytest.raises(CheckFailed, match="files do not fit"):
        exported.verify()
    with pytest.raises(CheckFailed, match="numbers do not hold"):
        sealed(exported).verify()


def test_a_swapped_permutation_is_caught(exported: Bundle) -> None:
    """Here the shapes no longer fit; where they would, the numbers do not."""
    _swap_permutation(exported.path)
    with pytest.raises(CheckFailed, match=r"cannot be computed|do not hold"):
        sealed(exported).verify()


def test_verify_says_what_it_proves(
    exported: Bundle, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    said = "graph and weights verified by interpreter; not run on Apple hardware"
    assert exported.manifest.unproven == said
    assert said in (exported.path / "README.md").read_text()
    done = edgeattn_cli("verify", exported.path)
    assert (done.returncode, said in done.stdout) == (0, True)
    assert json.loads(edgeattn_cli("verify", exported.path, "--json").stdout)["unproven"] == [said]
    assert said in " ".join(edgeattn_cli("inspect", exported.path).stdout.split())


def test_wrong_numbers_fail_and_name_the_module(tmp_path: Path) -> None:
    """A sum beyond the range of float16."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Large(nn.Module):\n    def forward(self, x):\n"
        "        return (x * 300) * 300 / 90000\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(8, 8), Large(), nn.Linear(8, 8))\n"
    )
    with pytest.raises(CheckFailed, match="numbers do not hold") as caught:
        edgeattn.export(f"{tmp_path}/net.py:build", "coreml", "fp16", tmp_path, inputs=["x=4x8"])
    assert str(caught.value.where).startswith("module 1 is the first to diverge")
    assert list(tmp_path.glob("*.coreml.*")) == []


def test_no_temporary_file_outlives_the_export(
    net: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter leaves its own copy of each package to the end of its process, which is killed before."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    edgeattn.export(f"{net}:build", "coreml", output=tmp_path / "out", inputs=["x=2x8x16"])
    assert not list((tmp_path / "temporary").iterdir())
    assert not list((own_cache / "scratch").iterdir())


def test_what_cannot_be_converted_names_operation_and_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Odd(nn.Module):\n    def forward(self, x):\n"
        "        return torch.special.i0e(x)\n\n\ndef build():\n    return nn.Sequential(nn.Linear(8, 8), Odd())\n"
    )
    with pytest.raises(ConversionFailed) as caught:
        edgeattn.export(f"{tmp_path}/net.py:build", "coreml", output=tmp_path, inputs=["x=4x8"])
    assert "i0e" in str(caught.value.value)
    assert caught.value.where == "module 1, rule unsupported-operator"


def test_a_device_says_which_system(net: Path, tmp_path: Path) -> None:
    bundle = edgeattn.export(f"{net}:build", device="iphone-15-pro", output=tmp_path, inputs=["x=2x8x16"])
    assert bundle.manifest.target == "coreml"
    options = bundle.manifest.facts["options"]
    assert options["deployment"] == bundle.manifest.facts["entries"]["main"]["minimum_system"] == "iOS18"


def test_options_are_checked(net: Path, tmp_path: Path) -> None:
    for options, said in (({"deploymnt": "iOS17"}, "deployment"), ({"deployment": "iOS12"}, "iOS16")):
        with pytest.raises(UsageError, match=said):
            edgeattn.export(f"{net}:build", "coreml", output=tmp_path, inputs=["x=2x8x16"], options=options)
    with pytest.raises(UsageError, match="option"):
        edgeattn.export("fmvit-digits", "onnx", output=tmp_path, options={"image": "gray"})


def test_digits_as_a_classifier_of_pixels(tmp_path: Path) -> None:
    """An app's own pictures go in, a label comes out; the numbers are those of the model outside."""
    text = Path(find("recipes")["fmvit-digits"]).read_text()
    folder = Path(find("recipes")["fmvit-digits"]).parent
    text = text.replace('"checkpoints/', f'"{folder}/checkpoints/').replace('"data/', f'"{folder}/data/')
    labels = json.dumps([str(number) for number in range(10)])
    named = f'labels = {labels}\nauthor = "Someone"\n{text}'
    (tmp_path / "digits.toml").write_text(named)
    options = {"image": "gray", "classifier": "yes"}
    bundle = edgeattn.export(str(tmp_path / "digits.toml"), "coreml", "fp16", tmp_path, options=options)
    assert bundle.path.name == "fmvit-digits-classifier-gray.coreml.fp16"
    task = bundle.manifest.task
    assert task is not None
    assert (task["samples"], task["top1_agreement"]) == (360, 1.0)
    _, _, feeds, reference = next(bundle.golden())
    assert feeds["x"].dtype == np.uint8
    assert bundle.run(feeds)["classLabel"] == str(reference["logits"].argmax())
    description = open_package(bundle.path / "main.mlpackage").spec.description
    assert description.metadata.author == "Someone"
    assert description.metadata.userDefined["edgeattn.recipe_sha256"] == bundle.manifest.recipe_sha256


@pytest.mark.slow
def test_run_a_strangers_package(tmp_path: Path, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Made by plain coremltools through torch.jit, float16, for iOS18."""
    from tests.targets.coreml.harness import ct

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(392, 5)
    )
    x = torch.randn(1, 3, 16, 16)
    ct.convert(
        torch.jit.trace(model.eval(), x),
        inputs=[ct.TensorType("x", x.shape)],
        outputs=[ct.TensorType("y", dtype=np.float32)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    ).save(str(tmp_path / "Theirs.mlpackage"))
    dtype = open_package(tmp_path / "Theirs.mlpackage").spec.description.input[0].type.multiArrayType.dataType
    np.save(tmp_path / "x.npy", x.numpy().astype(np.float16 if dtype == 65552 else np.float32))
    done = edgeattn_cli("run", "Theirs.mlpackage", "--input", "x=x.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = np.load(tmp_path / "output.y.npy")
    np.testing.assert_allclose(result, model(x).detach(), atol=5e-3)
    for words, said in (
        (["--input", "x=none.npy"], "No such file"),
        ([], "do not match"),
        (["--input", "x=x.npy", "--entry", "other"], "no such entry"),
    ):
        done = edgeattn_cli("run", "Theirs.mlpackage", *words, cwd=tmp_path)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    done = edgeattn_cli("run", "None.mlpackage", "--input", "x=x.npy", cwd=tmp_path)
    assert (done.returncode, "no such folder" in done.stderr) == (2, True)


def test_run_a_bundle(exported: Bundle, edgeattn_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    _, _, feeds, reference = next(exported.golden())
    np.save(exported.path.parent / "x.npy", feeds["x"])
    done = edgeattn_cli("run", exported.path, "--input", "x=x.npy", "--json", cwd=exported.path.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"]["output"]["shape"] == [2, 10]
    np.testing.assert_allclose(np.load(exported.path.parent / "output.output.npy"), reference["output"], atol=1e-5)
