"""Kill -9 at random moments: nothing that looks finished, no broken cache, and the next run succeeds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgeattn.bundle import Bundle
from edgeattn.pipeline.cache import Cache

COMMAND = [sys.executable, "-m", "edgeattn", "export", "fmvit-digits", "-o"]


def _export(output: Path, cache: Path) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "EDGEATTN_CACHE": str(cache)}
    return subprocess.Popen(
        [*COMMAND, str(output)],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A test run in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _check_nothing_false(output: Path, cache: Path) -> None:
    """Whatever looks like a bundle is one, and every cached record is sound."""
    for manifest in output.glob("*/manifest.json"):
        if not manifest.parent.name.startswith("."):
            Bundle.open(manifest.parent).check_files()
    for record in cache.glob("objects/*/*/record.json"):
        assert Cache(cache).get(record.parent.name) is not None
    for folder in cache.glob("objects/*/*"):
        assert (folder / "record.json").is_file()


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    start = time.perf_counter()
    assert _export(tmp_path / "whole", tmp_path / "cache-whole").wait() == 0
    whole = time.perf_counter() - start
    rng = random.Random(20)
    interrupted = 0
    for i in range(20):
        output, cache = tmp_path / f"out-{i}", tmp_path / f"cache-{i % 5}"
        process = _export(output, cache)
        children: list[psutil.Process] = []
        end = time.perf_counter() + rng.uniform(0, whole)
        while time.perf_counter() < end and process.poll() is None:
            time.sleep(0.01)
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True) or children
        interrupted += process.poll() is None
        process.kill()  # the parent alone: its worker must notice and end by itself
        process.wait()
        assert _gone(children, 20)
        _check_nothing_false(output, cache)
        assert not (output / "fmvit-digits.onnx.fp32").exists() or process.returncode == 0 or _is_whole(output)
        assert _export(output, cache).wait() == 0
        Bundle.open(output / "fmvit-digits.onnx.fp32").verify()
        _check_nothing_false(output, cache)
        assert [p.name for p in output.iterdir()] == ["fmvit-digits.onnx.fp32"]
        if i % 5 == 4:
            assert not list(cache.glob("scratch/*"))
            for used in range(5):
                _clear(tmp_path / f"cache-{used}")
    assert interrupted >= 10


def _is_whole(output: Path) -> bool:
    Bundle.open(output / "fmvit-digits.onnx.fp32").check_files()
    return True


def _clear(cache: Path) -> None:
    """Forget the results, so that later kills meet running stages again."""
    import shutil

    shutil.rmtree(cache, ignore_errors=True)


@pytest.mark.slow
def test_a_killed_worker_is_an_error_message(tmp_path: Path) -> None:
    environ = {**os.environ, "EDGEATTN_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([*COMMAND, str(tmp_path / "out")], env=environ, stderr=subprocess.PIPE, text=True)
    worker = None
    while worker is None and process.poll() is None:
        worker = next(iter(psutil.Process(process.pid).children()), None)
        time.sleep(0.02)
    assert worker is not None
    time.sleep(0.5)
    worker.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "SIGKILL" in said
    assert "memory runs out" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_ctrl_c_stops_cleanly(tmp_path: Path) -> None:
    process = _export(tmp_path / "out", tmp_path / "cache")
    time.sleep(1.5)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert _gone(children, 10)
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "cache").glob("scratch/*"))
