"""Keys: a touch invalidates the stage that it concerns and those after it, and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeattn.bundle import Bundle
from edgeattn.core import tools
from edgeattn.core.errors import UsageError
from edgeattn.pipeline import plan as planning
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.stages import STAGES

#: Of an export that quantizes nothing.
OWN = [stage for stage in STAGES if stage.name != "quantize"]
ALL = tuple(stage.name for stage in OWN)
#: What follows from each stage, itself included.
AFTER: dict[str, set[str]] = {}
for _name in ALL:
    AFTER[_name] = {_name}
    for _stage in OWN:
        if AFTER[_name] & set(_stage.needs):
            AFTER[_name].add(_stage.name)


def keys(job: Job) -> dict[str, str]:
    return {p.stage.name: p.key for p in planning.make_plan(job, Cache.default())}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def job(digits: Bundle) -> Job:
    return make_job("fmvit-digits")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: Job) -> Path:
    """A copy of the package whose bytes count as the stages' code."""
    copy = tmp_path / "edgeattn"
    shutil.copytree(planning.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(planning, "PACKAGE", copy)
    return copy


def test_everything_is_cached_after_an_export(job: Job) -> None:
    planned = planning.make_plan(job, Cache.default())
    assert [p.stage.name for p in planned] == list(ALL)
    assert all(p.record for p in planned if p.stage.name != "bundle")


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("models/build.py", "build"),
        ("pipeline/stages/reference.py", "reference"),
        ("reparam/conv_bn.py", "reparameterize"),
        ("capture/export.py", "capture"),
        ("pipeline/stages/lower.py", "lower"),
        ("targets/onnx/lower.py", "lower"),
        ("targets/onnx_graph/fp16.py", "lower"),
        ("pipeline/diverge.py", "verify"),
        ("bundle/runner.py", "bundle"),
    ],
)
def test_touched_code_invalidates_the_stages_after_it(job: Job, package: Path, file: str, stage: str) -> None:
    before = keys(job)
    with (package / file).open("a") as handle:
        handle.write("# touched\n")
    assert changed(before, keys(job)) == AFTER[stage]


@pytest.mark.parametrize(
    "file",
    ["cli/export.py", "targets/null/__init__.py", "doctor.py", "pipeline/worker.py", "quant/observe.py"],
)
def test_code_of_no_stage_invalidates_nothing(job: Job, package: Path, file: str) -> None:
    before = keys(job)
    with (package / file).open("a") as handle:
        handle.write("# touched\n")
    assert changed(before, keys(job)) == set()


@pytest.mark.parametrize(
    ("tool", "stage"),
    [
        ("safetensors", "build"),
        ("torch", "build"),
        ("onnxscript", "lint"),
        ("onnxruntime", "verify"),
        ("edgeattn", "bundle"),
    ],
)
def test_another_version_invalidates_the_stages_after_it(
    job: Job, monkeypatch: pytest.MonkeyPatch, tool: str, stage: str
) -> None:
    before = keys(job)
    real = tools.version
    monkeypatch.setattr(tools, "version", lambda name: "0.0.0" if name == tool else real(name))
    assert changed(before, keys(job)) == AFTER[stage]


def _copied_recipe(folder: Path, edit: Callable[[str], str] = lambda text: text) -> Path:
    recipes = planning.PACKAGE.parent / "recipes"
    shutil.copytree(recipes, folder, dirs_exist_ok=True)
    path = folder / "fmvit-digits.toml"
    path.write_text(edit(path.read_text()))
    return path


@pytest.mark.parametrize(
    ("edit", "stage"),
    [
        (lambda text: text.replace('outputs = ["logits"]', 'outputs = ["logits"]\nseed = 7'), "build"),
        (lambda text: text.replace("shape = [1, 1, 32, 32]", "shape = [2, 1, 32, 32]"), "build"),
        (lambda text: text.replace("[heldout]\n", "[heldout]\ngolden = 3\n"), "reference"),
        (lambda text: text.replace("mean = [0.3054]", "mean = [0.3]"), "reference"),
        (lambda text: text.replace('description = "', 'description = "other words: '), "lower"),
    ],
    ids=["seed", "shape", "golden", "preprocessing", "description"],
)
def test_touched_recipe(job: Job, tmp_path: Path, edit: Callable[[str], str], stage: str) -> None:
    touched = make_job(str(_copied_recipe(tmp_path, edit)))
    # The sources of a model are noted by its configuration; a new one has to be built before its key is known.
    Cache.default().put_sources(planning.sources_key(touched), Cache.default().sources(planning.sources_key(job)) or {})
    same = make_job(str(_copied_recipe(tmp_path / "same")))
    Cache.default().put_sources(planning.sources_key(same), Cache.default().sources(planning.sources_key(job)) or {})
    assert changed(keys(job), keys(same)) == set()
    assert changed(keys(job), keys(touched)) == AFTER[stage] | (AFTER["lower"] if stage != "bundle" else set())


def test_touched_checkpoint(job: Job, tmp_path: Path) -> None:
    path = _copied_recipe(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "fmvit-digits.safetensors"
    data = bytearray(checkpoint.read_bytes())
    data[-1] ^= 1
    checkpoint.write_bytes(bytes(data))
    assert changed(keys(job), keys(make_job(str(path)))) == set(ALL)


def test_a_model_never_built_has_no_known_key(own_cache: Path) -> None:
    planned = planning.make_plan(make_job("fmvit-digits"), Cache.default())
    assert all(p.record is None for p in planned)
    assert not own_cache.exists() or not list(own_cache.rglob("record.json"))


@pytest.mark.parametrize("target", ["tflite", "rpi"])
def test_a_device_with_a_runtime_that_nobody_knows(target: str, tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(
        'name = "board"\nbase = "raspberry-pi-5"\n[runtimes]\nonnx = "onnxruntime"\ntflite = "tflite_runtime"\n'
    )
    with pytest.raises(UsageError, match="unknown runtime of target tflite") as caught:
        make_job("fmvit-digits", target=target, device=str(tmp_path / "board.toml"))
    assert caught.value.where == "device board, runtimes.tflite"
    assert caught.value.fix == "did you mean 'tflite-runtime'?"


def test_what_is_quantized_has_a_stage_more() -> None:
    job = make_job("fmvit-digits", precision="w8a8")
    assert [name for name in keys(job) if name not in ALL] == ["quantize"]
    other = make_job("fmvit-digits", precision="w8a8", keep=["head"])
    assert changed(keys(job), keys(other)) == {"quantize", "lower", "verify", "bundle"}
    fewer = make_job("fmvit-digits", precision="w8a8", samples=20)
    assert changed(keys(job), keys(fewer)) == {"quantize", "lower", "verify", "bundle"}
