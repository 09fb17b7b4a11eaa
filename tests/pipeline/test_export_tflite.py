"""The main job to TFLite and to the Raspberry Pi, end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgeattn
from edgeattn import recipe
from edgeattn.bundle import Bundle
from edgeattn.models.build import build
from edgeattn.models.layers.rlmhsa import RLMHSA


def heads(name: str) -> list[int]:
    """The number of heads of every attention block of a recipe's model."""
    return [module.heads for module in build(recipe.resolve(name)).model.modules() if isinstance(module, RLMHSA)]


def moves(bundle: Bundle) -> list[dict[str, str]]:
    """The transposes that remain, each with its module and what it belongs to."""
    found: list[dict[str, str]] = bundle.manifest.facts["entries"]["main"]["transposes"]
    return found


def check(name: str, output: Path) -> None:
    """What must hold of every FMViT: numbers, no operator outside of XNNPACK, one transpose a multi-head block."""
    for precision, bound in (("fp32", 1e-5), ("fp16", 5e-3)):
        bundle = edgeattn.export(name, target="tflite", precision=precision, output=output)
        assert 0 < bundle.verify().worst.relative_l2 <= bound
        blocks = sum(count > 1 for count in heads(name))
        found = moves(bundle)
        assert len([move for move in found if move["of"] == "graph"]) == blocks
        assert len(found) == blocks + 1  # (B, C, H, W) at the input
        assert {finding["rule"] for finding in bundle.manifest.lint} <= {"transpose"}


def test_digits(digits_tflite: Bundle, tmp_path: Path) -> None:
    check("fmvit-digits", tmp_path)
    task = digits_tflite.manifest.task
    assert task is not None
    assert task["samples"] == 360
    assert abs(task["artifact_correct"] - task["reference_correct"]) <= 1


def test_channels_last(digits_tflite: Bundle, tmp_path: Path) -> None:
    bundle = edgeattn.export("fmvit-digits", target="tflite", layout="nhwc", output=tmp_path)
    assert bundle.path.name == "fmvit-digits-nhwc.tflite.fp32"
    assert len(moves(bundle)) == len(moves(digits_tflite)) - 1
    image = bundle.manifest.entries["main"].inputs[0]
    assert (image.shape[-1], image.layout) == (1, "nhwc")
    ours, theirs = (next(b.golden()) for b in (bundle, digits_tflite))
    (name,) = ours[2]
    assert np.array_equal(ours[2][name], theirs[2][name].transpose(0, 2, 3, 1))
    assert np.allclose(ours[3]["logits"], theirs[3]["logits"])
    assert bundle.verify().worst.relative_l2 <= 1e-5


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


def test_fmvit_t(tmp_path: Path) -> None:
    check("fmvit-t", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s", "m", "b", "l"])
def test_fmvit(variant: str, tmp_path: Path) -> None:
    check(f"fmvit-{variant}", tmp_path)
