"""Counters of the kernel: the runner's own call, and what becomes of counts. Events of software stand in for those of
the processor, which virtual machines do not show."""

from __future__ import annotations

import errno
import importlib
import json
import mmap
import platform
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from edgeattn.bundle import Bundle, runner
from edgeattn.profile.gate import _instructions

#: perf_event.h: software events.
CLOCK, FAULTS = (1, 1), (1, 2)


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "run", runner)  # as it is called in a bundle
    return importlib.import_module("edgeattn.bundle.runner_profile")


@pytest.fixture
def opened(timing: Any) -> Any:
    """Opens a counter of an event, or skips where this system forbids all of them."""
    if not sys.platform.startswith("linux"):
        pytest.skip("perf_event_open is Linux's")

    def open_one(event: tuple[int, int]) -> int:
        file, why = timing.open_counter(event)
        if file < 0 and "forbids" in why:
            pytest.skip(why)
        assert why == ""
        return int(file)

    return open_one


def touch(pages: int) -> float:
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        for page in range(pages):
            memory[page * mmap.PAGESIZE] = 1
    return 0.0


def test_page_faults_are_counted(timing: Any, opened: Any) -> None:
    file = opened(FAULTS)
    few, many = (timing.counted(file, lambda n=n: touch(n)) for n in (64, 512))
    assert 64 <= few <= 64 + 40
    assert 448 - 40 <= many - few <= 448 + 40


def test_threads_that_start_later_are_counted_too(timing: Any, opened: Any) -> None:
    file = opened(CLOCK)

    def spin() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    def apart() -> float:
        thread = threading.Thread(target=spin)
        thread.start()
        thread.join()
        return 0.0

    assert timing.counted(file, apart) >= 45e6  # ns of CPU
    assert timing.counted(file, lambda: time.sleep(0.05) or 0.0) < 20e6


def test_no_counter_is_a_sentence_and_not_an_error(timing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, why = timing.open_counter((0, 999))
    assert file == -1
    assert why
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    assert timing.open_counter() == (-1, f"no counter is known on {platform.system()}, sparc64")
    monkeypatch.undo()
    monkeypatch.setattr(timing.ctypes, "get_errno", lambda: errno.EACCES)
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda *_, **__: type("libc", (), {"syscall": lambda *_: -1})())
    if sys.platform.startswith("linux"):
        assert "perf_event_paranoid" in timing.open_counter()[1]


def test_a_paced_runner_says_whether_it_counts_and_counts(digits: Bundle, timing: Any, opened: Any) -> None:
    """The bundle's own runner, with the event exchanged for one that is everywhere."""
    opened(CLOCK)
    program = (
        f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(digits.path)!r})\n"
        "import run; sys.modules['run_profile'] = profile = run.own('profile')\n"
        "opener = profile.open_counter; profile.open_counter = lambda: opener((1, 1)); sys.exit(run.main())\n"
    )
    words = ["run.py", "--json", "--profile", "--paced", "--threads", "1", "--warmup", "2"]
    asked = '{"count": 3}\n{"seconds": 0, "least": 2}\n'
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ready, counts, block, *_ = map(json.loads, done.stdout.splitlines()[:3])
    assert ready["ready"]["uncounted"] == ""
    assert len(counts["counted"]) == 3
    assert all(1e4 < count < 1e9 for count in counts["counted"])  # ns of a run of a tenth of a millisecond
    assert len(block["times"]) == 2


def test_counts_become_a_ratio_or_a_reason() -> None:
    found = _instructions(([[100, 100], [102]], ""), ([[101, 100, 101]], ""), ([[110, None, 111, 110]], ""))
    assert (found.base, found.head) == (100.5, 110)
    assert found.ratio == pytest.approx(1.0945, abs=1e-3)
    assert "itself by 1.00%" in found.why
    assert _instructions(([], "not here"), ([], ""), ([], "")).why == "no counter here: not here"
    assert "others wanted" in _instructions(*[([[None]], "")] * 3).why
    assert "nothing was counted" in _instructions(*[([], "")] * 3).why
