"""What is said of calibration samples by what they reach inside of a model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn import recipe
from edgeattn.core.specs import TensorSpec
from edgeattn.models.build import build
from edgeattn.quant.coverage import coverage
from edgeattn.reparam import reparameterize
from tests.quant.streams import IMAGE, TEXT, stream, text_arrays, yielded


class Small(nn.Module):
    """A convolution of which one channel is dead and one loud, an activation in place, and a sum of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.box = nn.Sequential(nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.conv.weight[2] = 0
            self.conv.weight[5] *= 300

    def forward(self, x):
        x = self.act(self.conv(x))
        x = x + self.box(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Small().eval()


def normal(n, seed=0, shape=(3, 8, 12)):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 7])
def test_coverage_against_all_activations_at_once(small, batch):
    x = normal(40)
    report = coverage(small, yielded(x, TensorSpec("x", (batch, 3, 8, 12))), "minmax")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    facts = {item["module"]: item for item in report["modules"]}
    # A container that hands on what its last module gave is no module of its own; the sum of the model's own is.
    assert list(facts) == ["conv", "act", "box.0", "head"]
    with torch.no_grad():
        whole = small.conv(torch.from_numpy(x))
    conv = facts["conv"]
    assert conv["lowest"] == pytest.approx(float(whole.min()), rel=1e-5)
    assert conv["highest"] == pytest.approx(float(whole.max()), rel=1e-5)
    assert (conv["channels"], conv["dead"], conv["loud"]) == (8, 1, 1)
    per_channel = whole.abs().amax((0, 2, 3))
    assert conv["channel_ratio"] == pytest.approx(float(per_channel[5] / per_channel.median()), rel=0.2)
    assert facts["act"]["lowest"] == 0
    assert facts["head"]["channels"] == 5
    assert report["samples"] == 40
    assert report["inputs"]["x"]["mean"] == pytest.approx(float(x.mean()), abs=1e-5)
    assert report["inputs"]["x"]["std"] == pytest.approx(float(x.std()), rel=1e-5)
    assert any("conv" in line and "as loud" in line for line in report["warnings"])


def test_the_loudest_sample_is_named(small):
    x = normal(50)
    x[17] *= 40
    report = coverage(small, yielded([*x]))
    assert {item["loudest_sample"] for item in report["modules"]} == {17}
    assert any(line.startswith("sample 17 of items is ") for line in report["warnings"])
    conv = report["modules"][0]
    assert conv["sample_ratio"] == pytest.approx(40, rel=0.5)
    assert conv["settled"] == 18
    assert report["settled"] == 18


def test_saturation_is_that_of_the_chosen_range(small):
    x = normal(64)
    by = {method: coverage(small, yielded([*x]), method)["modules"][0] for method in ("minmax", "percentile")}
    assert by["minmax"]["saturated"] == 0
    assert 1e-4 <= by["percentile"]["saturated"] <= 4e-4
    with torch.no_grad():
        whole = small.conv(torch.from_numpy(x)).numpy()
    low, high = by["percentile"]["range"]
    assert by["percentile"]["saturated"] == pytest.approx(float(((whole < low) | (whole > high)).mean()), rel=0.1)


def test_samples_like_those_in_use_bring_no_warning():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()).eval()
    assert coverage(model, yielded([*normal(256)]), golden=[{"x": normal(1, 5)}])["warnings"] == []


@pytest.mark.parametrize(
    ("x", "spec", "said"),
    [
        (normal(64) * 70 + 110, IMAGE, "look unnormalized: input x has mean 110"),
        (normal(64) / 255, IMAGE, "look unnormalized"),
        (normal(64), TensorSpec("x", (1, 3, 8, 12), low=0, high=1), "should be 0 to 1"),
        (normal(9), IMAGE, "only 9 calibration samples"),
        (np.concatenate([normal(40), np.zeros((3, 3, 8, 12), np.float32)]), IMAGE, "3 of 43 calibration samples are"),
        (
            normal(64) * np.float32(1.1) ** np.arange(64, dtype=np.float32)[:, None, None, None] / 20,
            IMAGE,
            "still grew",
        ),
    ],
)
def test_what_is_wrong_with_samples_is_said(small, x, spec, said):
    assert any(said in line for line in coverage(small, yielded([*x], spec))["warnings"])


def test_golden_samples_beyond_calibration_are_seen(small):
    report = coverage(small, yielded([*normal(64)]), golden=[{"x": normal(1, 9) * 6}])
    assert any(line.startswith("calibration does not cover the golden samples") for line in report["warnings"])
    conv = report["modules"][0]
    assert 0 < conv["golden_beyond"] < 1
    assert conv["golden_left"] > 0.25
    within = coverage(small, yielded([*normal(64)]), golden=[{"x": normal(64)[:1]}])
    assert {item["golden_beyond"] for item in within["modules"]} == {0.0}


class Masked(nn.Module):
    """Several inputs, a tuple for output, and numbers that are not finite on the way."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(99, 4)
        self.mask = nn.Identity()
        self.pair = Pair()

    def forward(self, ids, mask, h):
        scores = self.mask(self.embed(ids).sum(-1).masked_fill(~mask, -torch.inf))
        return self.pair(torch.nan_to_num(scores.softmax(-1)), h)


class Pair(nn.Module):
    def forward(self, a, b):
        return a * 2, b * 3


def test_coverage_of_several_inputs_and_outputs():
    torch.manual_seed(0)
    arrays = text_arrays(40)
    found = yielded([{k: v[i] for k, v in arrays.items()} for i in range(40)], *TEXT)
    report = coverage(Masked().eval(), found)
    facts = {item["module"]: item for item in report["modules"]}
    assert list(facts) == ["embed", "mask", "pair", "pair:1"]
    assert facts["mask"]["nonfinite"] == int((~arrays["mask"]).sum())
    assert any("module mask gives NaN or infinity" in line for line in report["warnings"])
    assert facts["pair:1"]["highest"] == pytest.approx(3 * arrays["h"].max(), rel=1e-5)
    json.dumps(report, allow_nan=False)


def test_coverage_of_the_trained_digits():
    resolved = recipe.resolve("fmvit-digits")
    built = build(resolved)
    model = reparameterize(built.model, tuple(built.random_inputs(0).values())).model.eval()
    found = stream(resolved.heldout, *built.specs, preprocess=resolved.recipe.preprocess, samples=48)
    report = coverage(model, found)
    assert report["warnings"] == []
    assert abs(report["inputs"]["x"]["mean"]) < 0.1
    assert 0.9 < report["inputs"]["x"]["std"] < 1.1
    raw = stream(resolved.heldout, *built.specs, samples=48)
    assert any("look unnormalized" in line for line in coverage(model, raw)["warnings"])
