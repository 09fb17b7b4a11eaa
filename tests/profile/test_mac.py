"""A Mac as a device, as far as one can be made of this machine: no Apple hardware was at hand, and no macOS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, ToolchainMissing
from edgeattn.profile.transports.base import PROBE, found_of, parse_answer
from edgeattn.profile.transports.ssh import Ssh
from tests.bundle.mac import make_bundle, make_mac
from tests.profile.sshd import Sshd


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_bundle_is_profiled_there_and_nothing_stays(server: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    far = Ssh(server.url, python=str(make_mac(tmp_path / "mac").python))
    answer = far.run(bundle.path, ["--profile", "--runs", "3", "--backend", "coreml"])
    assert answer["cpu"] == "Apple M3"
    units = {unit["compute_unit"]: unit["holds"] for unit in answer["compute_units"]}
    assert units == {"CPU_ONLY": True, "CPU_AND_GPU": True, "CPU_AND_NE": False, "ALL": True}
    assert server.left() == []
    found = {one.name: one for one in far.check()}
    assert found["coremltools"].present
    assert (found["cpu"].detail.split(",")[0], found["system"].detail) == ("Apple M3", "macOS 15.5")


def test_what_cannot_be_installed_there_is_not_advised(server: Sshd, bundle: Bundle) -> None:
    with pytest.raises(ToolchainMissing, match="macOS only") as caught:
        Ssh(server.url, python=sys.executable).run(bundle.path, ["--verify"])
    assert "edgeattn verify BUNDLE" in str(caught.value.fix)
    assert "pip" not in str(caught.value.fix)


def test_a_mac_says_what_it_has(tmp_path: Path) -> None:
    environ = {**os.environ, **make_mac(tmp_path).environ}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, text=True, check=True)
    found = {one.name: one for one in found_of(json.loads(done.stdout))}
    assert found["python"].detail.endswith("on arm64")
    assert (found["coremltools"].present, found["coremltools"].detail) == (True, "9.0")
    assert found["system"].detail == "macOS 15.5"
    assert found["memory total"].detail == "25.77 GB"
    assert found["cpu"].detail == f"Apple M3, {os.cpu_count()} cores"


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("linux", "armv7l")])
def test_what_is_lacking_is_said_for_each_system(system: str, machine: str) -> None:
    facts = {"python": "3.9.6", "machine": machine, "system": system, "about": {}, "versions": {}}
    fixes = {one.name: str(one.fix) for one in found_of(facts)}
    assert ("coremltools" in fixes) == (system == "darwin")
    none = {name for name, fix in fixes.items() if fix == "no wheel exists for this machine"}
    assert none == {"arm64": {"tflite-runtime"}, "aarch64": set(), "armv7l": {"onnxruntime", "ai-edge-litert"}}[machine]
    if system == "darwin":
        assert fixes["coremltools"].endswith("pip install coremltools")


def test_a_crash_there_has_the_name_that_the_signal_has_there() -> None:
    # 10 is SIGBUS on macOS and SIGUSR1 on Linux.
    with pytest.raises(CheckFailed) as caught:
        parse_answer("", -10, "", "ssh://mac", "SIGBUS")
    assert "SIGBUS" in str(caught.value.why)
    with pytest.raises(CheckFailed) as caught:
        parse_answer("", -signal.SIGSEGV, "", "local")
    assert "SIGSEGV" in str(caught.value.why)


def test_a_runner_that_is_killed_there_is_named(server: Sshd, bundle: Bundle, tmp_path: Path) -> None:
    mac = make_mac(tmp_path / "mac")
    with (tmp_path / "mac" / "python" / "sitecustomize.py").open("a") as file:
        file.write("import os\nif '--verify' in sys.orig_argv:\n    os.kill(os.getpid(), 9)\n")
    with pytest.raises(CheckFailed, match="crashed") as caught:
        Ssh(server.url, python=str(mac.python)).run(bundle.path, ["--verify"])
    assert "SIGKILL" in str(caught.value.why)
