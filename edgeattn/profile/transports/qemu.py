"""Emulated aarch64 CPUs: real code of the device's own wheels, hence true numbers, and times that mean nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edgeattn.core.errors import CheckFailed, ToolchainMissing, UsageError, unknown
from edgeattn.device import EMULATED
from edgeattn.profile.emulator import Emulator, find
from edgeattn.profile.transports.base import (
    PROBE,
    Found,
    Say,
    Transport,
    found_of,
    parse_answer,
    result_of,
    runner_of,
    silent,
)
from edgeattn.profile.transports.live import Start

#: Emulation takes some fifty times as long as a device; a run that takes longer than this has gone wrong.
TIMEOUT_S = 3600.0


class Qemu(Transport):
    """User-mode emulation of one CPU.

    Args:
        url: ``qemu://cortex-a53``, ``qemu://cortex-a72`` or ``qemu://cortex-a76``.

    Raises:
        UsageError: another CPU.
    """

    emulated = True

    def __init__(self, url: str) -> None:
        cpu = urlsplit(url).hostname or ""
        if cpu not in EMULATED:
            raise unknown("emulated CPU", cpu, EMULATED)
        self.url, self.cpu = url, cpu

    def _emulator(self) -> Emulator:
        emulator = find()
        if emulator is None:
            raise ToolchainMissing(
                "the emulator is not set up",
                value=self.url,
                why="it needs an aarch64 Python with its runtimes, and qemu 10",
                fix="edgeattn device setup qemu",
            )
        return emulator

    def _python(self, words: Sequence[str], home: Path) -> tuple[int, str, str]:
        """Run the emulated Python; its exit code, output and errors."""
        emulator = self._emulator()
        environ = {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home),
            "PATH": os.environ.get("PATH", ""),
            "PYTHONHOME": str(emulator.root / "usr"),
            "PYTHONPATH": str(emulator.packages),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "EDGEATTN_IN_PROCESS": "1",  # the kernel cannot start an emulated program's child
        }
        command = [str(emulator.qemu), "-cpu", self.cpu, "-L", str(emulator.root), str(emulator.python), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise CheckFailed("the emulated runner does not end", value=f"{TIMEOUT_S:.0f} s", where=self.url) from error
        return done.returncode, done.stdout, done.stderr

    def run(self, bundle: Path, arguments: Sequence[str], say: Say = silent) -> dict[str, Any]:
        """See ``Transport.run``; the answer says ``emulated``. Takes no ``--profile``: UsageError."""
        if "--profile" in arguments:
            raise self._no_latency()
        runner_of(bundle)
        self._emulator()
        say(f"emulating {self.cpu}")
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(bundle, Path(folder) / "bundle")
            code, output, errors = self._python([str(copy / "run.py"), *arguments, "--json"], Path(folder))
        # Emulated time is not the device's, nor is the host's temperature.
        answer = result_of(parse_answer(output, code, errors, self.url), self.url)
        return {**answer, "emulated": True, "cpu": f"{self.cpu}, emulated"}

    def _no_latency(self) -> UsageError:
        return UsageError(
            "an emulated CPU has no latency",
            value=self.url,
            why="emulation verifies numbers; its times say nothing of the device's",
            fix="profile on the device: edgeattn device add NAME ssh://user@host; or --estimate",
        )

    def hold(self, bundles: Sequence[Path], say: Say = silent) -> AbstractContextManager[Start]:
        """See ``Transport.hold``: UsageError, for it is there to measure."""
        raise self._no_latency()

    def check(self) -> list[Found]:
        """See ``Transport.check``."""
        with tempfile.TemporaryDirectory() as folder:
            code, output, errors = self._python(["-c", PROBE], Path(folder))
        if code:
            raise CheckFailed("the emulated Python does not run", where=self.url, details=errors.splitlines()[-5:])
        return found_of(json.loads(output))
