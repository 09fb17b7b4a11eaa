"""The main job to TFLite and to the Raspberry Pi, end to end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import edgeattn
from edgeattn import recipe
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed
from edgeattn.models.build import build
from edgeattn.models.layers.rlmhsa import RLMHSA


def heads(name: str) -> list[tuple[int, int]]:
    """(heads, tokens) of every attention block of a recipe's model."""
    built = build(recipe.resolve(name))
    found: list[tuple[int, int]] = []
    for module in built.model.modules():
        if isinstance(module, RLMHSA):
            module.register_forward_pre_hook(lambda block, x: found.append((block.heads, x[0][0, 0].numel())))
    with torch.no_grad():
        built.model(*built.random_inputs(0).values())
    return found


def moves(bundle: Bundle) -> list[dict[str, str]]:
    """The transposes that remain, each with its module and what it belongs to."""
    found: list[dict[str, str]] = bundle.manifest.facts["entries"]["main"]["transposes"]
    return found


def check(name: str, output: Path) -> None:
    """What must hold of every FMViT: numbers, no operator outside of XNNPACK, one transpose a multi-head block."""
    for precision, bound in (("fp32", 1e-5), ("fp16", 5e-3)):
        bundle = edgeattn.export(name, target="tflite", precision=precision, output=output)
        assert 0 < bundle.verify().worst.relative_l2 <= bound
        # Nothing moves where there is one token (the last block of the digits model) or, at the input, one channel.
        blocks = sum(count > 1 and tokens > 1 for count, tokens in heads(name))
        assert (blocks == 0) == (name == "fmvit-digits")
        image = bundle.manifest.entries["main"].inputs[0].shape
        assert Counter(move["of"] for move in moves(bundle)) == Counter(graph=blocks, input=int(image[1] > 1))
        assert {finding["rule"] for finding in bundle.manifest.lint} <= {"transpose"}


def test_digits(digits_tflite: Bundle, tmp_path: Path) -> None:
    check("fmvit-digits", tmp_path)
    task = digits_tflite.manifest.task
    assert task is not None
    assert task["samples"] == 360
    assert abs(task["artifact_correct"] - task["reference_correct"]) <= 1


@pytest.mark.slow
def test_channels_last(tmp_path: Path) -> None:
    first, last = (
        edgeattn.export("fmvit-t", target="tflite", layout=layout, inputs=["x=1x3x64x32"], output=tmp_path)
        for layout in ("nchw", "nhwc")
    )
    assert last.path.name == "fmvit-t-random-nhwc.tflite.fp32"
    assert [move for move in moves(first) if move["of"] != "input"] == moves(last)
    assert len(moves(first)) == len(moves(last)) + 1
    image = last.manifest.entries["main"].inputs[0]
    assert (image.shape, image.layout) == ((1, 64, 32, 3), "nhwc")
    ours, theirs = (next(b.golden()) for b in (last, first))
    assert np.array_equal(ours[2]["x"], theirs[2]["x"].transpose(0, 2, 3, 1))
    assert np.array_equal(ours[3]["logits"], theirs[3]["logits"])
    assert last.verify().worst.relative_l2 <= 1e-5


def test_held_out_samples_are_scored_with_channels_last(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", target="tflite", layout="nhwc", output=tmp_path)
    task = bundle.manifest.task
    assert task is not None
    assert abs(task["artifact_correct"] - task["reference_correct"]) <= 1


def test_wrong_numbers_fail_and_name_the_module(tmp_path: Path) -> None:
    """Also where it is the last one, whose tensor has the recipe's name: weights that int8 with a scale a row loses."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
        "    with torch.no_grad():\n        net[2].weight[:, 0] = 3e4\n        net[0].weight[0] = 0\n"
        "        net[0].bias[0] = 0\n    return net\n"
    )
    with pytest.raises(CheckFailed, match="numbers do not hold") as caught:
        edgeattn.export(f"{tmp_path}/net.py:build", "tflite", "w8", tmp_path, inputs=["x=4x64"])
    assert str(caught.value.where).startswith("module 2 is the first to diverge")
    assert list(tmp_path.glob("*.tflite.*")) == []


def test_a_raspberry_pi_gets_both(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", device="raspberry-pi-5", output=tmp_path)
    assert bundle.manifest.target == "rpi"
    assert {part.backend for part in bundle.manifest.artifacts} == {"onnx", "tflite"}
    assert bundle.manifest.choice["front"] == bundle.manifest.backend
    assert bundle.verify().worst.relative_l2 <= 1e-5
    first = next(bundle.golden())
    outputs = [bundle.run(first[2], first[1], part.backend)["logits"] for part in bundle.manifest.artifacts]
    assert np.allclose(*outputs, atol=1e-4)


def test_a_32_bit_pi_gets_what_its_runtime_takes(tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", device="raspberry-pi-4-32bit", precision="w8", output=tmp_path)
    assert [part.backend for part in bundle.manifest.artifacts] == ["tflite"]
    assert "tflite-runtime" in bundle.manifest.requirement
    assert bundle.verify().worst.relative_l2 <= 5e-2


@pytest.mark.slow
def test_fmvit_t(tmp_path: Path) -> None:
    check("fmvit-t", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s", "m", "b", "l"])
def test_fmvit(variant: str, tmp_path: Path) -> None:
    check(f"fmvit-{variant}", tmp_path)
