"""The trained checkpoint, scored again on the held-out images, in both forms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from edgeattn.models.fmvit import FMViT, fmvit_digits
from edgeattn.reparam import reparameterize

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CHECKPOINT = RECIPES / "checkpoints" / "fmvit-digits.safetensors"


@pytest.fixture(scope="module")
def facts() -> dict[str, str]:
    with safe_open(CHECKPOINT, "pt") as file:
        return dict(file.metadata())


@pytest.fixture(scope="module")
def model() -> FMViT:
    model = fmvit_digits()
    model.load_state_dict(load_file(CHECKPOINT), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def heldout(facts: dict[str, str]) -> tuple[Tensor, Tensor]:
    with np.load(RECIPES / "data" / "digits-heldout.npz") as file:
        x, y = file["x"], file["y"]
    assert (x.dtype, x.shape[1:], y.dtype) == (np.uint8, (1, 32, 32), np.int64)
    assert len(x) == len(y) == int(facts["test_images"])
    pixels = torch.from_numpy(x).float() / 255.0
    return (pixels - float(facts["mean"])) / float(facts["std"]), torch.from_numpy(y)


@torch.no_grad()
def test_accuracy_is_the_recorded_one(model: FMViT, heldout: tuple[Tensor, Tensor], facts: dict[str, str]) -> None:
    x, y = heldout
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    assert accuracy >= 0.97
    assert accuracy == pytest.approx(float(facts["test_accuracy"]), abs=0.003)


@torch.no_grad()
def test_deploy_form_gives_the_same_answers(model: FMViT, heldout: tuple[Tensor, Tensor]) -> None:
    x, _ = heldout
    deploy = reparameterize(model, x[:2]).model
    torch.testing.assert_close(deploy(x), model(x), rtol=1e-3, atol=1e-3)


def test_files_stay_small_and_every_class_is_held_out(heldout: tuple[Tensor, Tensor]) -> None:
    assert CHECKPOINT.stat().st_size <= 2_000_000
    assert torch.bincount(heldout[1], minlength=10).min() >= 30


def test_the_example_holds_the_same_images_out_and_writes_what_loads(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = RECIPES.parent / "examples" / "train_digits.py"
    command = [sys.executable, str(script), "--epochs", "1", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(RECIPES.parent)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout
    fmvit_digits().load_state_dict(load_file(tmp_path / "checkpoints" / CHECKPOINT.name), strict=True)
    name = Path("data") / "digits-heldout.npz"
    with np.load(tmp_path / name) as new, np.load(RECIPES / name) as kept:
        assert all(np.array_equal(new[key], kept[key]) for key in ("x", "y"))
