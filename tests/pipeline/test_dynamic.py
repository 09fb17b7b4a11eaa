"""Dimensions that may vary, through the stages: a target that takes them, one that does not, and what is recorded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from edgeattn import targets
from edgeattn.bundle.manifest import TensorInfo
from edgeattn.capture import Program
from edgeattn.core.errors import UsageError
from edgeattn.models.build import build
from edgeattn.pipeline import plan as planning
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.context import Context, Result
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.stages.lower import entries_of
from edgeattn.targets.base import Artifact, ArtifactEntry, LowerPlan, Tensor
from edgeattn.targets.feeds import check_feeds
from edgeattn.targets.null import NullTarget

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).relu().mean((2, 3)))
"""

RECIPE = """
name = "net"
outputs = ["logits"]
[model]
factory = "{file}:Net"
[inputs.x]
shape = [2, 3, 16, 12]
dynamic = {dynamic}
"""

IMAGES = '{"0" = [1, 2, 5], "2" = [8, 16, 32]}'
BATCH = '{"0" = [1, 2, 5]}'


class Wide(NullTarget):
    """The null target, taking inputs of several shapes."""

    dynamic: ClassVar[bool] = True

    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        program.save(out)
        entry = program.entries["main"]
        ranges = tuple((axis, *ends) for axis, ends in entry.dynamic["x"].items())
        sample = plan.samples[0]["x"]
        inputs = (Tensor("x", sample.shape, str(sample.dtype), dynamic=ranges),)
        outputs = (Tensor("logits", (sample.shape[0], 2), "float32", dynamic=ranges[:1]),)
        return Artifact(out, plan.precision, {"main": ArtifactEntry("main.pt2", inputs, outputs)}, {})


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``null`` a target with dynamic shapes."""
    real = targets.get
    monkeypatch.setattr(targets, "get", lambda name: Wide() if name == "null" else real(name))


def job_of(folder: Path, dynamic: str, more: str = "") -> Job:
    (folder / "net.py").write_text(NET)
    (folder / "net.toml").write_text(RECIPE.format(file=folder / "net.py", dynamic=dynamic) + more)
    return make_job(str(folder / "net.toml"), target="null")


def run(job: Job, folder: Path) -> tuple[dict[str, Result], dict[str, Any]]:
    """All stages from reference to verify, in this process."""
    results: dict[str, Result] = {}
    values: dict[str, Any] = {"build": build(job.resolved)}
    for name in ("reference", "reparameterize", "capture", "lint", "lower", "verify"):
        out = folder / "stages" / name
        out.mkdir(parents=True)
        facts = importlib.import_module(f"edgeattn.pipeline.stages.{name}").run(Context(job, out, results, values))
        results[name] = Result(out, json.loads(json.dumps(facts)))
    return results, values


def golden(results: Mapping[str, Result]) -> list[np.ndarray]:
    paths = sorted((results["reference"].folder / "golden").glob("*.npz"))
    return [np.load(path)["in.x"] for path in paths]


def keys(job: Job) -> dict[str, str]:
    return {p.stage.name: p.key for p in planning.make_plan(job, Cache.default())}


def test_a_target_with_dynamic_shapes_is_proven_at_the_ends_of_the_ranges(tmp_path: Path, wide: None) -> None:
    results, values = run(job_of(tmp_path, IMAGES), tmp_path)
    assert [x.shape for x in golden(results)] == [(2, 3, 16, 12), (1, 3, 8, 12), (5, 3, 32, 12)]
    ranges = {"x": {0: (1, 2, 5), 2: (8, 16, 32)}}
    assert values["capture"].entries["main"].dynamic == ranges
    assert (
        Program.load(results["capture"].folder, results["capture"].facts["entries"]).entries["main"].dynamic == ranges
    )
    assert results["lint"].facts["findings"] == []
    assert [name.split()[0] for name in results["verify"].facts["numerics"]] == ["main-000", "main-001", "main-002"]
    entry = entries_of(results["lower"].facts)["main"]
    assert entry.inputs[0].dynamic == ((0, 1, 2, 5), (2, 8, 16, 32))
    assert entry.outputs[0].dynamic == ((0, 1, 2, 5),)


def test_the_example_of_an_opt_of_one_is_not_taken_for_a_constant(tmp_path: Path, wide: None) -> None:
    job_of(tmp_path, "{}")
    results, _ = run(make_job(str(tmp_path / "net.toml"), target="null", inputs=["x=1..1..3x3x16x12"]), tmp_path)
    assert [x.shape[0] for x in golden(results)] == [1, 3]


def test_other_targets_keep_the_shape_and_say_so(tmp_path: Path) -> None:
    results, values = run(job_of(tmp_path, IMAGES), tmp_path)
    assert [x.shape for x in golden(results)] == [(2, 3, 16, 12)] * 2
    entry = values["capture"].entries["main"]
    assert not entry.dynamic
    assert not entry.graph.range_constraints
    (finding,) = results["lint"].facts["findings"]
    assert (finding["rule"], finding["severity"]) == ("fixed-shape", "note")
    assert finding["detail"] == "x: 1..2..5x3x8..16..32x12 became 2x3x16x12"
    assert entries_of(results["lower"].facts)["main"].inputs[0].dynamic == ()


def test_a_static_job_has_the_samples_and_the_findings_that_it_had(tmp_path: Path) -> None:
    results, _ = run(job_of(tmp_path, "{}"), tmp_path)
    spec = job_of(tmp_path, "{}").resolved.recipe.specs()[0]
    assert [x.tolist() for x in golden(results)] == [spec.random(seed).tolist() for seed in (1000, 2000)]
    assert results["lint"].facts["findings"] == []
    assert results["lower"].facts["entries"]["main"]["inputs"][0]["dynamic"] == []


HELDOUT = '\n[heldout]\nfile = "h.npz"\ngolden = 2\n'


@pytest.mark.parametrize(
    ("dynamic", "real", "data"),
    [(BATCH, True, "held-out samples"), (IMAGES, False, "held-out samples, random inputs at other sizes")],
)
def test_heldout_samples_of_other_batches(tmp_path: Path, wide: None, dynamic: str, real: bool, data: str) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 12)).astype(np.float32)
    np.savez(tmp_path / "h.npz", x=x, y=np.array([0, 1, 0, 1]))
    results, _ = run(job_of(tmp_path, dynamic, HELDOUT), tmp_path)
    first, second, smallest, largest = golden(results)
    assert np.array_equal(np.concatenate([first, second]), x)
    assert (len(smallest), len(largest)) == (1, 5)
    assert np.array_equal(largest, x[[0, 1, 2, 3, 0]]) == real
    assert np.array_equal(smallest, x[:1]) == real
    assert results["reference"].facts["data"] == data
    assert results["verify"].facts["task"]["samples"] == 4


def test_a_model_that_cannot_run_at_an_end_says_at_which_shape(tmp_path: Path, wide: None) -> None:
    job = job_of(tmp_path, IMAGES)
    (tmp_path / "net.py").write_text(NET.replace("mean((2, 3))", "mean((2, 3)).reshape(2, 4)"))
    with pytest.raises(UsageError, match="cannot run on these inputs") as caught:
        run(job, tmp_path)
    assert caught.value.value == "x=(1, 3, 8, 12)"


def test_ranges_are_in_the_keys_where_they_matter(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
        return {name for name in before if before[name] != after[name]}

    later = {"lower", "verify", "bundle"}
    static, varied = keys(job_of(tmp_path, "{}")), keys(job_of(tmp_path, BATCH))
    # The program of a target that takes one shape is the same; the recipe's digest is in the artifact, a note in lint.
    assert changed(static, varied) == {"lint", *later}
    monkeypatch.setattr(NullTarget, "dynamic", True)
    assert keys(job_of(tmp_path, "{}")) == static
    first, second = keys(job_of(tmp_path, BATCH)), keys(job_of(tmp_path, IMAGES))
    assert changed(varied, first) == {"reference", "reparameterize", "capture", "lint", *later}
    assert changed(first, second) == {"reference", "reparameterize", "capture", "lint", *later}


SPEC = Tensor("x", (2, 3, 16), "float32", dynamic=((0, 1, 2, 5), (2, 8, 16, 32)))


STEPS = Tensor("x", (2, 16), "float32", dynamic=((0, 1, 2, 5), (1, 8, 16, 32, 8)))


def test_feeds_in_steps() -> None:
    check_feeds([STEPS], {"x": np.zeros((3, 24), np.float32)})
    for size in (0, 12, 40):
        with pytest.raises(UsageError) as caught:
            check_feeds([STEPS], {"x": np.zeros((3, size), np.float32)})
        assert caught.value.why == "the artifact takes (1..2..5, 8..16..32/8) float32"


@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 3, 8), (5, 3, 32), (1, 3, 31)])
def test_feeds_within_the_ranges(shape: tuple[int, ...]) -> None:
    check_feeds([SPEC], {"x": torch.zeros(shape).numpy()})


@pytest.mark.parametrize(
    "shape", [(0, 3, 16), (6, 3, 16), (2, 4, 16), (2, 3, 7), (2, 3, 33), (2, 3), (2, 3, 16, 1), ()]
)
def test_feeds_out_of_the_ranges(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        check_feeds([SPEC], {"x": np.zeros(shape, np.float32)})
    assert caught.value.why == "the artifact takes (1..2..5, 3, 8..16..32) float32"


def test_a_manifest_says_ranges_only_where_there_are_some() -> None:
    # Bundles made before there were ranges are sealed over their own text.
    old = {"name": "x", "shape": [2, 3], "dtype": "float32", "layout": "", "pixels": []}
    assert TensorInfo.model_validate(old).model_dump(mode="json") == old
    new = {**old, "dynamic": [[0, 1, 2, 5]]}
    info = TensorInfo.model_validate(json.loads(json.dumps(new)))
    assert info.model_dump(mode="json") == new
    assert Tensor(**info.model_dump()) == Tensor("x", (2, 3), "float32", dynamic=((0, 1, 2, 5),))
    assert Tensor(**TensorInfo.model_validate(old).model_dump()) == Tensor("x", (2, 3), "float32")
