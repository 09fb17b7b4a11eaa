"""This machine: the bundle's runner in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgeattn.core.errors import CheckFailed
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
from edgeattn.profile.transports.live import Live, LocalProcess, Start

#: A run that takes longer than this has gone wrong.
TIMEOUT_S = 1800.0


class Local(Transport):
    """The Python that runs EdgeAttn, in a process of its own."""

    url = "local"

    def run(self, bundle: Path, arguments: Sequence[str], say: Say = silent) -> dict[str, Any]:
        """See ``Transport.run``; nothing is copied."""
        words = [sys.executable, str(runner_of(bundle)), *arguments, "--json"]
        environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=environ, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise CheckFailed("the runner does not end", value=f"{TIMEOUT_S:.0f} s", where=self.url) from error
        return result_of(parse_answer(done.stdout, done.returncode, done.stderr, self.url), self.url)

    @contextlib.contextmanager
    def hold(self, bundles: Sequence[Path], say: Say = silent) -> Iterator[Start]:
        """See ``Transport.hold``; nothing is copied."""
        started: list[Live] = []

        def start(bundle: Path, arguments: Sequence[str], file: Path | None = None) -> Live:
            started.append(LocalProcess(bundle, arguments, file))
            return started[-1]

        try:
            yield start
        finally:
            for live in started:
                live.kill()

    def check(self) -> list[Found]:
        """See ``Transport.check``."""
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        return found_of(json.loads(done.stdout))
