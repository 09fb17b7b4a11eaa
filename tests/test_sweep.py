"""Sweeps: the cells of a matrix, what is run again and what is not, and a real one that is killed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.errors import UsageError
from edgeattn.core.schema import validate
from edgeattn.pipeline import cells
from edgeattn.pipeline.executor import Done, Task, Watcher
from edgeattn.sweep import matrix, run
from edgeattn.sweep.matrix import Entry, Matrix, combinations
from edgeattn.sweep.run import Plan

NETS = """
from torch import nn

def build(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "matrix.toml"
    path.write_text(text)
    return path


def entries_of(folder: Path, text: str) -> list[Entry]:
    path = written(folder, text)
    return matrix.entries(matrix.read(path), str(path))


GOOD = """
name = "both"
targets = ["onnx", "tflite"]
precisions = ["fp32", "w8a8"]
devices = ["raspberry-pi-5", "iphone-15-pro"]
[models.digits]
model = "fmvit-digits"
samples = 8
[models.plain]
model = "fmvit-digits"
targets = ["null"]
precisions = ["fp32", "fp16"]
devices = []
[[exclude]]
model = "digits"
target = "tflite"
precision = "w8a8"
"""


def test_a_matrix_and_what_cannot_be(tmp_path: Path) -> None:
    found = entries_of(tmp_path, GOOD.replace("devices = []\n", 'devices = ["raspberry-pi-5"]\n'))
    states = {entry.label.replace("raspberry-pi-5", "pi").replace("iphone-15-pro", "phone"): entry for entry in found}
    assert {label: entry.state for label, entry in states.items()} == {
        "digits onnx fp32 pi": "",
        "digits onnx fp32 phone": "unsupported",
        "digits onnx w8a8 pi": "",
        "digits onnx w8a8 phone": "unsupported",
        "digits tflite fp32 pi": "",
        "digits tflite fp32 phone": "unsupported",
        "plain null fp32 pi": "unsupported",
        "plain null fp16 pi": "unsupported",
    }
    phone = states["digits onnx fp32 phone"].error
    assert phone is not None
    assert (phone["what"], phone["exit_code"]) == ("the device does not run this target", 2)
    # What is for quantization alone is not asked of a plain export, which would refuse it.
    assert [states[f"digits onnx {p} pi"].cell.samples for p in ("fp32", "w8a8")] == [None, 8]
    folders = [entry.folder for entry in found if entry.cell.target == "onnx" and entry.cell.precision == "fp32"]
    assert folders == ["digits@raspberry-pi-5", "digits@iphone-15-pro"]


def test_a_precision_that_a_target_does_not_hold(tmp_path: Path) -> None:
    found = entries_of(tmp_path, 'models = ["fmvit-digits"]\ntargets = ["null"]\nprecisions = ["fp32", "fp16"]')
    assert [entry.state for entry in found] == ["", "unsupported"]
    assert found[1].error is not None
    assert "it holds fp32" in found[1].error["why"]


def test_a_missing_toolchain_is_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeattn.targets.base import Availability
    from edgeattn.targets.null import NullTarget

    gone = Availability(False, "not installed: torch", "pip install torch")
    monkeypatch.setattr(NullTarget, "availability", lambda self: gone)
    (entry,) = entries_of(tmp_path, 'models = ["fmvit-digits"]\ntargets = ["null"]')
    assert entry.state == "toolchain"
    assert entry.error is not None
    assert entry.error["fix"] == "pip install torch"
    data = run.summary("x", run.plan([entry], tmp_path, False), {}, 0.0)
    assert run.exit_code(data["cells"]) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("targets =", "target ="), "did you mean 'targets'?"),
        (('"tflite"]', '"tflit"]'), "did you mean 'tflite'?"),
        (('"fp32", "w8a8"]', '"fp32", "w8a9"]'), "did you mean 'w8a8'?"),
        (('"iphone-15-pro"]', '"iphone-15-por"]'), "did you mean 'iphone-15-pro'?"),
        (('model = "digits"', 'model = "digit"'), "did you mean 'digits'?"),
        (('precision = "w8a8"', 'precision = "w8a8x"'), "exclude.0.precision"),
        (('precision = "w8a8"', 'precisions = "w8a8"'), "did you mean 'precision'?"),
        (('"fmvit-digits"\nsamples', '"fmvit-digit"\nsamples'), "models.digits"),
        (("samples = 8", "samples = 0"), "models.digits.samples"),
        (('"onnx", "tflite"]', '"onnx", "onnx"]'), "given twice"),
        (('targets = ["null"]\nprecisions = ["fp32", "fp16"]\ndevices = []\n', ""), "two cells are the same"),
        (('name = "both"', 'name = "../both"'), "name"),
        (('targets = ["onnx", "tflite"]', ""), "there are no targets"),
        (('model = "digits"\ntarget = "tflite"\nprecision = "w8a8"', ""), "an exclusion is empty"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(UsageError) as caught:
        entries_of(tmp_path, GOOD.replace(*change, 1))
    assert says in str(caught.value)
    assert "matrix.toml" in str(caught.value)


def test_nothing_left_is_a_mistake(tmp_path: Path) -> None:
    text = 'models = ["fmvit-digits"]\ntargets = ["onnx"]\n[[exclude]]\ntarget = "onnx"'
    with pytest.raises(UsageError, match="no cell is left"):
        entries_of(tmp_path, text)


def some(of: Sequence[str], least: int = 0) -> Any:
    return st.lists(st.sampled_from(of), min_size=least, max_size=3, unique=True)


TARGETS, PRECISIONS, DEVICES = ("null", "onnx", "tflite"), ("fp32", "fp16", "w8a8"), ("host", "raspberry-pi-5")
AXES = {"targets": some(TARGETS), "precisions": some(PRECISIONS), "devices": some(DEVICES)}
MODELS = st.dictionaries(
    st.sampled_from(["a", "b", "c:d/e"]), st.fixed_dictionaries({"model": st.just("m"), **AXES}), min_size=1
)
EXCLUDES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["a", "b"]),
            "target": st.sampled_from(TARGETS),
            "precision": st.sampled_from(PRECISIONS),
            "device": st.sampled_from(DEVICES),
        },
    ).filter(bool),
    max_size=3,
)


@given(
    MODELS, st.fixed_dictionaries({**AXES, "targets": some(TARGETS, 1), "precisions": some(PRECISIONS, 1)}), EXCLUDES
)
def test_every_combination_is_there_unless_it_is_excluded(
    models: dict[str, Any], common: dict[str, Any], excluded: list[dict[str, str]]
) -> None:
    file = validate(Matrix, {"name": "x", "models": models, **common, "exclude": excluded}, "test")
    found = [(e.name, e.cell.target, e.cell.precision, e.cell.device) for e in combinations(file)]
    wanted = []
    for name, model in models.items():
        for target in model["targets"] or common["targets"]:
            for precision in model["precisions"] or common["precisions"]:
                for device in model["devices"] or common["devices"] or [None]:
                    own = {"model": name, "target": target, "precision": precision, "device": device}
                    if not any(all(own[key] == value for key, value in one.items()) for one in excluded):
                        wanted.append(tuple(own.values()))
    assert found == wanted
    folders = {(e.folder, e.cell.target, e.cell.precision) for e in combinations(file)}
    assert len(folders) == len(found)  # no two bundles in one place


class Fake:
    """An executor that runs nothing: each task comes to what ``made`` says of it."""

    def __init__(self, made: Callable[[Task, int], Done]) -> None:
        self.made = made
        self.tasks: list[str] = []

    def run(self, tasks: Sequence[Task], watch: Watcher) -> dict[str, Done]:
        found = {}
        for task in tasks:
            self.tasks.append(task.label)
            watch.started(task, 1)
            watch.said(task, "build")
            found[task.key] = self.made(task, self.tasks.count(task.label))
            watch.finished(task, found[task.key])
        return found


class Silent:
    def started(self, task: Task, attempt: int) -> None: ...
    def said(self, task: Task, text: str) -> None: ...
    def finished(self, task: Task, done: Done) -> None: ...


def outcome(task: Task, key: str, error: dict[str, Any] | None = None) -> Done:
    content = {"cell": task.argument["cell"], "held": error is None, "stage": "verify" if error else "", "key": key}
    content |= {"error": error, "bundle": "b", "digest": "d", "facts": {"relative_l2": float("nan")}, "lint": []}
    return Done(task.key, content | {"artifacts": {}, "stages": []}, None, 1.0, 2.0, 1)


FAILED = {"kind": "CheckFailed", "exit_code": 1, "what": "it does not hold", "why": "", "fix": "", "details": []}
CRASHED = {**FAILED, "kind": "Crashed", "exit_code": 4}
THREE = 'targets = ["onnx"]\nprecisions = ["fp32", "fp16", "w8"]\nmodels = ["fmvit-digits"]'


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What goes into each cell, as the test says by precision; every bundle is whole."""
    made: dict[str, str | None] = {"fp32": "1", "fp16": "1", "w8": "1"}
    monkeypatch.setattr(run, "planned_key", lambda cell: made[cell.precision])
    monkeypatch.setattr(cells, "_whole", lambda outcome: True)
    return made


def swept(folder: Path, executor: Fake, retry: bool = False) -> tuple[Plan, list[dict[str, Any]]]:
    plan = run.plan(entries_of(folder, THREE), folder / "out", retry)
    found = run.run(plan, folder / "out", executor, Silent())
    return plan, run.summary("x", plan, found, 1.0)["cells"]


def test_what_stands_is_not_run_again(tmp_path: Path, keys: dict[str, str | None]) -> None:
    def made(task: Task, attempt: int) -> Done:
        return outcome(task, "1", FAILED if "fp16" in task.label else None)

    executor = Fake(made)
    _, cells = swept(tmp_path, executor)
    assert [cell["state"] for cell in cells] == ["held", "failed", "held"]
    assert run.exit_code(cells) == 1
    assert len(executor.tasks) == 3
    json.loads((tmp_path / "out/cells" / f"{cells[0]['id']}.json").read_text(), parse_constant=pytest.fail)
    executor.tasks.clear()

    _, cells = swept(tmp_path, executor)
    assert executor.tasks == []
    assert [cell["kept"] for cell in cells] == [True, True, True]
    swept(tmp_path, executor, retry=True)
    assert executor.tasks == ["fmvit-digits onnx fp16"]
    executor.tasks.clear()

    keys |= {"fp16": "2", "w8": None}  # one with other inputs, one that cannot be known any more
    swept(tmp_path, executor)
    assert executor.tasks == ["fmvit-digits onnx fp16", "fmvit-digits onnx w8"]


def test_a_damaged_result_is_made_anew(tmp_path: Path, keys: dict[str, str | None]) -> None:
    executor = Fake(lambda task, attempt: outcome(task, "1"))
    _, cells = swept(tmp_path, executor)
    executor.tasks.clear()
    half, other, gone = (tmp_path / "out/cells" / f"{cell['id']}.json" for cell in cells)
    half.write_text(half.read_text()[:-40])
    other.write_text(other.read_text().replace('"schema": 1', '"schema": 0'))
    gone.unlink()
    swept(tmp_path, executor)
    assert len(executor.tasks) == 3


def test_a_held_cell_without_its_bundle_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "planned_key", lambda cell: "1")
    executor = Fake(lambda task, attempt: outcome(task, "1"))
    swept(tmp_path, executor)
    swept(tmp_path, executor)
    assert len(executor.tasks) == 6


def test_what_crashed_never_stands(tmp_path: Path, keys: dict[str, str | None]) -> None:
    def made(task: Task, attempt: int) -> Done:
        if "fp16" in task.label and attempt == 1:
            return outcome(task, "1", CRASHED)
        if "w8" in task.label:
            return Done(task.key, None, CRASHED, 1.0, 0.0, 2)
        return outcome(task, "1")

    executor = Fake(made)
    _, cells = swept(tmp_path, executor)
    assert [cell["state"] for cell in cells] == ["held", "failed", "failed"]
    assert [cell["error"] and cell["error"]["kind"] for cell in cells] == [None, "Crashed", "Crashed"]
    assert run.exit_code(cells) == 4
    _, cells = swept(tmp_path, executor)
    assert executor.tasks[3:] == ["fmvit-digits onnx fp16", "fmvit-digits onnx w8"]
    assert [cell["state"] for cell in cells] == ["held", "held", "failed"]


def test_models_take_turns(tmp_path: Path) -> None:
    text = 'targets = ["null", "onnx"]\nmodels = ["fmvit-digits", "vit-digits"]'
    plan = run.plan(entries_of(tmp_path, text), tmp_path, False)
    assert [entry.name for entry in plan.todo] == ["fmvit-digits", "vit-digits"] * 2


CELLS = 24


def _start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgeattn", "sweep", "matrix.toml", "--output", "out", "--workers", "2"]
    environ = {**os.environ, "EDGEATTN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _until(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    while not done():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def _pairs(sweep: int) -> list[tuple[psutil.Process, psutil.Process]]:
    """Tasks of a sweep that have a stage's worker right now, each with that."""
    found = []
    for task in psutil.Process(sweep).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [(task, worker) for worker in task.children()]
    return found


@pytest.mark.slow
def test_killed_and_stopped_all_cells_finish_and_none_is_built_twice(tmp_path: Path) -> None:
    """24 cells on two workers: a task and a stage's worker killed -9, then Ctrl-C, then started again, twice."""
    (tmp_path / "nets.py").write_text(NETS)
    models = "".join(
        f'[models.w{n}]\nmodel = "nets.py:build"\ninputs = ["x=1x3x8x8"]\nargs = {{width = {n}}}\n' for n in range(1, 9)
    )
    matrix_text = 'targets = ["null", "onnx"]\nprecisions = ["fp32", "fp16"]\n' + models
    written(tmp_path, matrix_text + '[[exclude]]\ntarget = "null"\nprecision = "fp16"\n')
    cells = tmp_path / "out" / "cells"

    def count() -> int:
        return len(list(cells.glob("*.json")))

    first = _start(tmp_path, tmp_path / "cache")
    _until(first, lambda: count() >= 2)
    _until(first, lambda: bool(_pairs(first.pid)))
    task, worker = _pairs(first.pid)[0]
    task.kill()
    assert not psutil.wait_procs([worker], timeout=30)[1]  # it ends with the task that it works for
    _until(first, lambda: count() >= 5)
    _until(first, lambda: bool(_pairs(first.pid)))
    _pairs(first.pid)[0][1].kill()
    _until(first, lambda: count() >= 9)
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 130
    assert re.search(rf"\d+ of {CELLS} cells are done and kept; the same command goes on", said)
    assert "started again" in said
    assert not psutil.wait_procs(family, timeout=30)[1]
    done = {path.name: path.read_bytes() for path in cells.iterdir()}
    assert all(json.loads(text)["outcome"]["held"] for text in done.values())
    assert 8 <= len(done) < CELLS

    second = _start(tmp_path, tmp_path / "cache")
    _, said = second.communicate(timeout=900)
    assert second.returncode == 0, said
    assert f"{CELLS} cells, {len(done)} of them done before" in said
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"]
    assert [cell["state"] for cell in found] == ["held"] * CELLS
    assert sum(cell["kept"] for cell in found) == len(done)
    for name, text in done.items():
        assert (cells / name).read_bytes() == text
    fresh = [stage["key"] for cell in found for stage in cell["stages"] if stage["fresh"]]
    assert len(fresh) == len(set(fresh))
    assert len(fresh) > CELLS
    for cell in found:
        assert (tmp_path / cell["bundle"] / "manifest.json").is_file()

    before = {path: path.stat().st_mtime_ns for path in cells.iterdir()}
    third = _start(tmp_path, tmp_path / "cache")
    shown, said = third.communicate(timeout=60)
    assert third.returncode == 0
    assert f"{CELLS} cells, {CELLS} of them done before" in said
    assert {path: path.stat().st_mtime_ns for path in cells.iterdir()} == before
    assert "24 held; 24 kept from before" in shown
