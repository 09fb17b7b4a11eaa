"""Accuracy of an optical bundle under effects, and when what happens in it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.device import Effects
from edgeattn.pipeline.optics import (
    KINDS,
    Point,
    curves,
    find_costs,
    hits,
    open_optical,
    scored,
    timeline,
    wilson,
)
from edgeattn.recipe import preprocessed

GUEST = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 5),
    )
"""

RECIPE = """
name = "small"
outputs = ["logits"]
[model]
factory = "guest.py:small"
checkpoint = "small.safetensors"
[inputs.x]
shape = [{batch}, 1, 10, 10]
[preprocess]
scale = 0.0078125
mean = [1.0]
std = [0.5]
[heldout]
file = "heldout.npz"
golden = 1
"""

DEVICE = """
name = "bench"
description = "small planes"
kind = "optical"
machine = "any"
targets = ["optical"]
[optics]
rows = 96
cols = 80
frame_rate_hz = 1000.0
mask_rate_hz = 2000.0
readout_px_s = 1e7
electronics_ops_s = 1e6
mask_pj_px = 2.0
[optics.effects]
sign = "{sign}"
{more}
"""


def write_recipe(folder: Path, sign: str = "kernel_split", more: str = "", batch: int = 1, labels: bool = True) -> Path:
    """A recipe whose held-out samples have the classes that the model itself gives them; the device beside it."""
    from safetensors.torch import save_file

    (folder / "guest.py").write_text(GUEST)
    (folder / "small.toml").write_text(RECIPE.format(batch=batch))
    (folder / "bench.toml").write_text(DEVICE.format(sign=sign, more=more))
    scope: dict[str, Any] = {}
    exec(GUEST, scope)
    model = scope["small"]().eval()
    save_file(model.state_dict(), folder / "small.safetensors")
    raw = np.random.default_rng(0).integers(0, 256, (40, 1, 10, 10)).astype(np.uint8)
    x = torch.from_numpy(preprocessed(raw, edgeattn.recipe.Preprocess(scale=1 / 128, mean=(1.0,), std=(0.5,))))
    with torch.no_grad():
        logits = model(x)
        # Classes of even sizes: of plain random weights one class would win nearly always.
        model[-1].bias -= logits.mean(0)
        model[-1].weight /= logits.std(0, keepdim=True).T
        save_file(model.state_dict(), folder / "small.safetensors")
        y = model(x).argmax(-1).numpy()
    np.savez(folder / "heldout.npz", x=raw, **({"y": y} if labels else {}))
    return folder / "small.toml"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("small")
    recipe = write_recipe(folder, more="adc_bits = 14\nfull_well_e = 1e8")
    return edgeattn.export(str(recipe), target="optical", device=str(folder / "bench.toml"), output=folder / "bundles")


def test_ideal_planes_have_the_models_own_accuracy(small: Bundle) -> None:
    task = small.manifest.task
    assert task is not None
    assert scored(small, None, 1000, 16) == (task["reference_correct"], task["samples"]) == (40, 40)
    assert scored(small, None, 7) == (7, 7)
    assert hits(small, None, 40).tolist() == hits(small, None, 40, 3).tolist()


@pytest.mark.parametrize("sign", ["reference", "offset", "kernel_split", "full_split"])
def test_absurd_settings_ruin_it_and_generous_ones_do_not(small: Bundle, sign: str) -> None:
    ruined = Effects.model_validate({"sign": sign, "full_well_e": 1.0, "adc_bits": 1})
    held = Effects.model_validate({"sign": sign, "full_well_e": 1e9, "adc_bits": 16, "input_amplitude_bits": 16})
    assert scored(small, ruined, 40)[0] < 25
    assert scored(small, held, 40)[0] >= 38
    assert hits(small, ruined, 40).tolist() == hits(small, ruined, 40).tolist()  # what is random has a seed


def test_curves(small: Bundle) -> None:
    said: list[str] = []
    kinds = [replace(kind, settings=kind.settings[:2]) for kind in KINDS]
    found = curves(small, 12, said.append, kinds=kinds, on_planes=6)
    assert (found.reference.correct, found.reference.of) == (40, 40)
    assert (found.ideal.correct, found.ideal.of) == (12, 12)
    assert (found.sign, found.scheme.correct) == ("kernel_split", 12)
    assert found.device is not None
    assert found.device.correct >= 11
    whole = {sweep.kind.field: sweep.whole for sweep in found.sweeps}
    assert whole == {
        "full_well_e": False,
        "adc_bits": False,
        "laser_drift": False,
        "input_amplitude_bits": False,
        "mask_amplitude_bits": True,
        "mask_phase_bits": True,
        "mask_shift_px": True,
        "camera_shift_px": True,
    }
    for sweep in found.sweeps:
        count = 6 if sweep.whole else 12
        assert [point.of for point in (*sweep.points, sweep.ideal)] == [count] * 3
        assert sweep.ideal.correct == count
    shift = next(sweep for sweep in found.sweeps if sweep.kind.field == "mask_shift_px")
    assert [point.setting for point in shift.points] == [0.0, 1.0]
    assert shift.points[0].correct == 6  # no shift has no effect
    assert any("12 samples" in text for text in said)
    data = found.as_dict()
    assert data["sweeps"][0]["points"][0]["interval"][0] < data["sweeps"][0]["points"][0]["accuracy"]


def test_a_device_without_a_camera_is_swept_under_the_literatures_scheme(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, sign="field", batch=3)
    made = edgeattn.export(
        str(recipe), target="optical", device=str(tmp_path / "bench.toml"), output=tmp_path / "bundles"
    )
    found = curves(made, 10, kinds=KINDS[:1])
    assert found.sign == "kernel_split"
    assert found.device is None
    assert found.ideal == Point(0.0, 10, 10)  # the last batch of three is filled up, and counts once
    assert found.sweeps[0].points[-1].correct >= 9


def test_wilsons_interval() -> None:
    """Against a table: 0 and 10 of 10, 81 of 263 (Newcombe 1998, Statistics in Medicine 17, 857-872)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_the_timeline_is_what_is_paid_for(small: Bundle) -> None:
    opened = open_optical(small)
    spans, costs = timeline(opened), find_costs(opened.program)
    for kind, seconds in costs.one.seconds.items():
        assert math.fsum(span.seconds for span in spans if span.kind == kind) == pytest.approx(seconds)
    ops = sum(span.count for span in spans if span.kind == "electronics")
    assert ops == opened.program.electronic_ops
    assert [span.name for span in spans if span.kind == "frames"] == ["0", "2", "5"]


def test_the_batch_that_fills_the_planes(small: Bundle) -> None:
    program = open_optical(small).program
    full = find_costs(program)
    assert (full.one.batch, full.filled.batch, full.doubled.batch) == (1, 1, 2)
    assert full.doubled.frames > full.one.frames
    costs = find_costs(replace(program, optics=program.optics.model_copy(update={"rows": 300, "cols": 300})))
    assert costs.one.batch == 1
    assert costs.filled.batch > 1
    assert costs.doubled.batch == 2 * costs.filled.batch
    assert costs.filled.frames == costs.one.frames < costs.doubled.frames
    assert costs.filled.per_input_s < costs.one.per_input_s


def test_operations_by_name(small: Bundle) -> None:
    opened = open_optical(small)
    assert opened.operation(None).module == "0"  # 3600 multiply-accumulates, the second one has 3456
    assert opened.operation("5").op in ("Gemm", "MatMul")
    assert opened.operation(opened.program.operations[1].name).module == "2"
    with pytest.raises(UsageError, match="unknown operation"):
        opened.operation("3")


def test_what_is_refused(small: Bundle, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    recipe = write_recipe(tmp_path / "plain", labels=False)
    other = edgeattn.export(str(recipe), target="null", output=tmp_path)
    with pytest.raises(UsageError, match="not of target optical") as caught:
        open_optical(other)
    assert caught.value.value == "target null"
    with pytest.raises(UsageError, match="no held-out samples"):
        scored(other, None, 4)
    with pytest.raises(UsageError, match="unknown entry"):
        open_optical(small, "prefill")
    masks = next((small.path / "optical" / "masks").glob("*.npy"))
    kept = masks.read_bytes()
    masks.write_bytes(kept[:-8])
    try:
        with pytest.raises(CheckFailed):
            open_optical(small)
    finally:
        masks.write_bytes(kept)
