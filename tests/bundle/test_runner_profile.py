"""The runner's warm-up, its blocks on demand, and its batches."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from edgeattn.bundle import Bundle, runner


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "run", runner)  # as it is called in a bundle
    return importlib.import_module("edgeattn.bundle.runner_profile")


def test_a_warm_up_ends_when_two_windows_agree(timing: Any) -> None:
    # Windows of five runs, as they take longer than 50 ms: 100, 60, 59 ms.
    times = iter([100.0] * 5 + [60.0] * 5 + [59.0] * 5)
    assert timing.warmed(lambda: next(times), None) == (15, True)
    fast = itertools.count()
    assert timing.warmed(lambda: 1.0 if next(fast) >= 0 else 0.0, None) == (100, True)  # 50 ms each
    assert timing.warmed(lambda: 1.0, 7) == (7, True)
    assert timing.warmed(lambda: 1.0, 0) == (0, True)


def test_times_that_never_settle_are_said(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_RUNS", 60)
    drift = itertools.count(1)
    count, steady = timing.warmed(lambda: 20.0 * 1.2 ** next(drift), None)
    assert (count, steady) == (60, False)


def test_blocks_are_measured_on_demand(digits: Bundle) -> None:
    words = [sys.executable, str(digits.path / "run.py"), "--json", "--profile", "--paced", "--threads", "1"]
    asked = [{"seconds": 0, "least": 3}, {"state": True}, {"seconds": 0.05, "least": 1}]
    text = "".join(json.dumps(one) + "\n" for one in asked)
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    ready, first, state, second, *rest = done.stdout.splitlines()
    about = json.loads(ready)["ready"]
    assert about["warm"] in (True, False)
    assert about["warmup"] >= 10
    assert 0 < about["clock_ms"] < 0.1
    assert len(json.loads(first)["times"]) == 3
    assert "temperature_c" in json.loads(state)["state"]
    times = json.loads(second)["times"]
    assert sum(times) >= 50 * 0.5
    result = json.loads("\n".join(rest))
    assert result["runs"] == 3 + len(times)
    assert result["holds"]


def test_a_paced_runner_that_is_asked_for_nothing_has_a_result(digits: Bundle) -> None:
    words = [sys.executable, str(digits.path / "run.py"), "--json", "--profile", "--paced"]
    done = subprocess.run(words, input="", capture_output=True, text=True, check=True)
    assert json.loads("\n".join(done.stdout.splitlines()[1:]))["latencies"] == []


@pytest.mark.parametrize(
    ("dynamic", "batch", "fits"),
    [([], 2, True), ([], 3, False), ([[0, 1, 2, 6]], 6, True), ([[0, 1, 2, 6]], 7, False), ([[0, 2, 4, 8, 2]], 6, True),
     ([[0, 2, 4, 8, 2]], 5, False), ([[1, 1, 2, 3]], 2, True), ([[1, 1, 2, 3]], 1, False)],
)  # fmt: skip
def test_a_batch_repeats_the_sample(
    timing: Any, dynamic: list[list[int]], batch: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    monkeypatch.setattr(runner, "golden_samples", lambda *_: [("g", "main")])
    monkeypatch.setattr(runner, "golden_data", lambda _: (sample, {}))
    spec = {"name": "x", "shape": [2, 3], "dtype": "float32", **({"dynamic": dynamic} if dynamic else {})}
    part = {"entries": {"main": {"inputs": [spec]}}}
    options = argparse.Namespace(entry="main", batch=batch)
    if fits:
        given = timing.feeds_of({}, part, options)["x"]
        assert given.shape == (batch, 3)
        assert (given[batch - 1] == sample["x"][(batch - 1) % 2]).all()
        return
    with pytest.raises(runner.Problem, match=f"no batch of {batch}"):
        timing.feeds_of({}, part, options)
