"""``edgeattn sweep``: what it shows and writes, in this process, with an executor that does the cells here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeattn.cli.sweep import command
from edgeattn.core.errors import UsageError
from edgeattn.pipeline import executor
from edgeattn.pipeline.cells import run_cell
from edgeattn.pipeline.executor import Done, Task, Watcher

NET = """
import torch
from torch import nn

class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("[bold]broken[/bold]")

def sound():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

def broken():
    return Broken()
"""

MATRIX = """
targets = ["null"]
precisions = ["fp32", "fp16"]
[models."sound [red]"]
model = "net.py:sound"
inputs = ["x=1x3x8x8"]
[models.broken]
model = "net.py:broken"
inputs = ["x=1x3x8x8"]
precisions = ["fp32"]
"""


class Here:
    """An executor that does tasks in this process, one after the other."""

    stop_after = 99

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def run(self, tasks: Sequence[Task], watch: Watcher) -> dict[str, Done]:
        found = {}
        for number, task in enumerate(tasks):
            if number == self.stop_after:
                raise KeyboardInterrupt
            watch.started(task, 1)

            def say(text: str, task: Task = task) -> None:
                watch.said(task, text)

            found[task.key] = Done(task.key, run_cell(task.argument, say), None, 1.0, 2.0, 1)
            watch.finished(task, found[task.key])
        return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> Path:
    """A user's folder with two models and a matrix."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "matrix.toml").write_text(MATRIX)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executor, "Processes", Here)
    return tmp_path


def sweep(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["matrix.toml", *arguments])


def test_a_sweep_is_stopped_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dry = sweep("--dry-run")
    assert dry.exit_code == 0
    assert "3 cells: 2 to be run, 0 done before" in dry.stdout
    assert "the target cannot hold this precision" in " ".join(dry.stdout.split())
    assert not (place / "matrix-sweep").exists()

    monkeypatch.setattr(Here, "stop_after", 1)
    stopped = sweep()
    assert stopped.exit_code == 1  # click's own word for an abort; the program's main makes it 130
    assert "1 of 2 cells are done and kept; the same command goes on" in stopped.stderr
    monkeypatch.setattr(Here, "stop_after", 99)

    done = sweep()
    assert done.exit_code == 2  # a model that cannot be run is a mistake of its user
    assert "2 cells, 1 of them done before" in done.stderr
    assert "2/2" in done.stderr
    words = " ".join(done.stdout.split())
    assert "3 cells: 1 held, 1 failed, 1 unsupported; 1 kept from before" in words
    assert "sound [red] null fp32 held L2" in words
    assert "[bold]broken[/bold]" in words

    again = sweep("--json")
    assert again.exit_code == 2
    data = json.loads(again.stdout)
    assert data == json.loads((place / "matrix-sweep/sweep.json").read_text())
    states = {cell["label"]: cell["state"] for cell in data["cells"]}
    assert states == {
        "sound [red] null fp32": "held",
        "sound [red] null fp16": "unsupported",
        "broken null fp32": "failed",
    }
    held, _, broken = data["cells"]
    assert (place / held["bundle"] / "manifest.json").is_file()
    assert held["facts"]["weights"] == "random"
    assert broken["error"]["exit_code"] == 2
    for name in ("report.html", "report.md"):
        text = (place / "matrix-sweep" / name).read_text()
        assert "unsupported" in text
        assert held["digest"][:12] in text


def test_a_mistake_writes_nothing(place: Path) -> None:
    (place / "matrix.toml").write_text(MATRIX.replace("targets", "target"))
    found: Any = sweep().exception
    assert isinstance(found, UsageError)
    assert "did you mean 'targets'?" in str(found)
    assert sweep("--workers", "0").exit_code == 2
    assert not (place / "matrix-sweep").exists()


def test_a_folder_that_cannot_be_written_is_said_first(place: Path) -> None:
    (place / "file").touch()
    found = sweep("--output", "file/out").exception
    assert isinstance(found, UsageError)
    assert "cannot be written" in found.what
