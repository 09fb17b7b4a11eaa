"""Core ML's own ``predict``, against a stand-in for ``MLModel``: nothing here ran on Apple hardware.

What stays unproven is all that Apple's framework does; tested is how it is asked, and what is made of its answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed
from edgeattn.recipe import Preprocess
from edgeattn.targets.base import Artifact, ArtifactEntry, Tensor
from edgeattn.targets.coreml import CoreMLTarget
from edgeattn.targets.coreml.predict import CoreMLRuntime
from edgeattn.targets.coreml.runtime import MilRuntime
from edgeattn.targets.feeds import own_feeds
from tests.bundle.coreml_stand_in import CONTEXT, ROWS, VOCABULARY, MLState, small_decoder
from tests.targets.coreml.harness import ct
from tests.targets.coreml.lowering import Lowered, lowered

LABELS = ("ant", "bee", "cat")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class StandIn:
    """Answers as the interpreter does, in the forms that Core ML's Python binding has."""

    seen: dict[str, Any]
    made: Lowered
    off: float = 0.0

    def __init__(self, path: str) -> None:
        assert Path(path).name == "main.mlpackage"

    def predict(self, given: dict[str, Any]) -> dict[str, Any]:
        StandIn.seen = given
        feeds = {}
        for spec in self.made.artifact.entries["main"].inputs:
            value = given[spec.name]
            if not isinstance(value, np.ndarray):  # a picture, red first
                value = np.asarray(value).transpose(2, 0, 1)[None]
                value = value[:, ::-1] if spec.layout == "bgr" else value
            feeds[spec.name] = value
        outputs = MilRuntime(self.made.artifact).run("main", feeds)
        if "classLabel" in outputs:
            numbers = dict(zip(LABELS, outputs["y"][0].tolist(), strict=True))
            return {"classLabel": str(outputs["classLabel"]), "y": dict(reversed(numbers.items()))}
        return {name: value + self.off for name, value in outputs.items()}


@pytest.mark.parametrize("image", ["rgb", "bgr"])
@pytest.mark.parametrize("classifier", ["no", "yes"])
def test_pictures_and_labels(image: str, classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (1, 3, 8, 8))
    preprocess = Preprocess(scale=1 / 255, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    made = lowered(
        Net(),
        {"x": (pixels / 255 - mean) / std},
        tmp_path,
        preprocess=preprocess,
        labels=LABELS,
        image=image,
        classifier=classifier,
    )
    monkeypatch.setattr(StandIn, "made", made, raising=False)
    monkeypatch.setattr(ct.models, "MLModel", StandIn)
    feeds = own_feeds(made.artifact.entries["main"].inputs, made.feeds)
    result = CoreMLRuntime(made.artifact).run("main", feeds)["y"]
    np.testing.assert_allclose(result, made.reference["y"], rtol=1e-3, atol=1e-4)
    first = np.asarray(StandIn.seen["x"])[..., 0]
    np.testing.assert_array_equal(first, pixels[0, 0 if image == "rgb" else 2])


def test_what_the_framework_says_is_told(tmp_path: Path) -> None:
    """Here it says that predictions need macOS."""
    if sys.platform == "darwin":
        pytest.skip("Core ML runs here")
    made = lowered(Net(), {"x": torch.randn(1, 3, 8, 8)}, tmp_path)
    with pytest.raises(CheckFailed, match="macOS"):
        CoreMLRuntime(made.artifact).run("main", made.feeds)
    assert CoreMLTarget().others(made.artifact) == {}


class Sums:
    """The decoder of ``tests.bundle.coreml_stand_in``, asked for by the name of its function."""

    def __init__(self, path: str, function_name: str | None = None) -> None:
        assert (Path(path).name, function_name) == ("model.mlpackage", "decode")

    def make_state(self) -> MLState:
        return MLState({ROWS: np.zeros((1, CONTEXT, 2), np.float16)})

    def predict(self, given: dict[str, Any], state: MLState) -> dict[str, Any]:
        assert set(given) == {"ids", "position"}
        rows, begin = state.read_state(ROWS), int(given["position"][0])
        made = small_decoder(given, rows)
        rows[:, begin : begin + 1] = made[f"new_{ROWS}"]
        state.write_state(ROWS, rows)
        return {"logits": made["logits"]}


def test_a_decoders_cache_is_put_into_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ct.models, "MLModel", Sums)
    inputs = (Tensor("ids", (1, 1), "int32"), Tensor("position", (1,), "int32"))
    entry = ArtifactEntry("model.mlpackage", inputs, (Tensor("logits", (1, VOCABULARY), "float32"),))
    artifact = Artifact(tmp_path, "fp16", {"decode": entry}, {"states": {ROWS: [1, CONTEXT, 2]}})
    rows = np.zeros((1, CONTEXT, 2), np.float32)
    rows[0, :3] = [[1, 0], [4, 1], [2, 2]]
    own = {"ids": np.array([[5]], np.int32), "position": np.array([3], np.int32)}
    runtime = CoreMLRuntime(artifact)
    for feeds, total in ((own | {ROWS: rows}, 12), (own, 5)):  # zeros where nothing is fed
        outputs = runtime.run("decode", feeds)
        assert outputs["logits"].argmax() == total % VOCABULARY
        if ROWS in feeds:
            np.testing.assert_array_equal(outputs[f"new_{ROWS}"], [[[5, 3]]])
        else:
            assert set(outputs) == {"logits"}


def test_verify_asks_both_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = edgeattn.export("fmvit-digits", target="coreml", output=tmp_path)

    class Made:
        artifact = bundle.artifact()

    monkeypatch.setattr(StandIn, "made", Made, raising=False)
    monkeypatch.setattr(ct.models, "MLModel", StandIn)
    monkeypatch.setattr(sys, "platform", "darwin")
    verified = Bundle.open(bundle.path).verify()
    assert {name.partition(":")[0] for name in verified.numerics} == {"coreml", "Core ML"}
    assert verified.unproven == ()
    monkeypatch.setattr(StandIn, "off", 1.0)
    with pytest.raises(CheckFailed, match="do not hold") as caught:
        Bundle.open(bundle.path).verify()
    assert all(line.startswith("Core ML") for line in caught.value.details)
