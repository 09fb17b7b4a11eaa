"""No two processes build the same: locks, and two cells of one model at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgeattn.core.hashing import sha256_data
from edgeattn.pipeline import locks
from edgeattn.pipeline.cells import CALL, Cell
from edgeattn.pipeline.executor import Processes, Task
from edgeattn.pipeline.locks import locked
from tests.pipeline.test_executor import Noted

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
"""

HOLD = """
import sys, time
from pathlib import Path
from edgeattn.pipeline.locks import locked
with locked(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with locked(tmp_path / "locks" / "a", lambda: None):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80
    assert max(most) == 1
    assert not list((tmp_path / "locks").iterdir())


def test_a_lock_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []

    def waiting() -> None:
        said.append("waiting")
        holder.kill()

    with locked(lock, waiting):
        assert said == ["waiting"]
    holder.wait()
    with locked(lock, waiting):
        assert said == ["waiting"]


def test_an_error_inside_unlocks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), locked(tmp_path / "lock", lambda: None):
        raise ValueError("inside")
    with locked(tmp_path / "lock", lambda: pytest.fail("it is still held")):
        pass


def test_where_nothing_can_be_locked_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "lock", lambda: None):
        pass

    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locked(tmp_path / "lock", lambda: None):
        pass


def test_two_cells_of_one_model_at_once_build_it_once(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    cells = [Cell(f"{tmp_path}/net.py:build", target, inputs=("x=1x3x8x8",)) for target in ("null", "onnx")]
    tasks = [
        Task(sha256_data([cell.to_dict()]), CALL, {"cell": cell.to_dict(), "output": str(tmp_path / "out")}, cell.label)
        for cell in cells
    ]
    watch = Noted()
    outcomes = [done.result for done in Processes(workers=2).run(tasks, watch).values()]
    assert all(outcome and outcome["held"] for outcome in outcomes), outcomes
    stages = [stage for outcome in outcomes if outcome for stage in outcome["stages"]]
    fresh = [stage["key"] for stage in stages if stage["fresh"]]
    assert len(fresh) == len(set(fresh))
    shared = [stage["name"] for stage in stages if not stage["fresh"]]
    assert {"build", "reference"} <= set(shared)
    assert "waiting for another process that builds the same" in watch.words
