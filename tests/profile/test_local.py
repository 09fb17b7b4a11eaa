"""The local transport."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.profile.transports import open_transport
from edgeattn.profile.transports.local import Local


def test_a_bundle_runs_here_and_is_left_as_it_was(digits: Bundle) -> None:
    before = sorted(digits.path.rglob("*"))
    answer = open_transport("local").run(digits.path, ["--profile", "--runs", "5", "--threads", "1"])
    assert answer["runs"] == 5
    assert answer["threads"] == 1
    assert sorted(digits.path.rglob("*")) == before


def test_a_crash_is_named(digits: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(digits.path, tmp_path / "copy"))
    (copy / "run.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(CheckFailed, match="crashed") as caught:
        Local().run(copy, ["--verify"])
    assert "SIGSEGV" in str(caught.value.why)
    (copy / "run.py").write_text("print('nothing')\n")
    with pytest.raises(CheckFailed, match="failed"):
        Local().run(copy, ["--verify"])
    (copy / "run.py").unlink()
    with pytest.raises(UsageError, match="no runner"):
        Local().run(copy, ["--verify"])


def test_check(digits: Bundle) -> None:
    found = {one.name: one for one in Local().check()}
    assert found["onnxruntime"].present
    assert found["ai-edge-litert"].present


def test_a_device_with_nothing_to_reach_it_by() -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        open_transport("raspberry-pi-4-32bit")
    with pytest.raises(UsageError):
        open_transport("qemu://cortex-a1")
    assert open_transport("raspberry-pi-5").url == "qemu://cortex-a76"
