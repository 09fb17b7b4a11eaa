"""A runner that measures block by block, so that the blocks of several can take turns: see bundle/runner_profile.py."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from edgeattn.core.errors import CheckFailed
from edgeattn.profile.transports.base import parse_answer, result_of, runner_of

#: A process that lives longer than this, or takes longer for one answer over ssh, has gone wrong.
LIVE_S = 3600.0


class Live(ABC):
    """A process of ``run.py``; with ``--paced`` it waits to be asked.

    Attributes:
        where: the device, for errors.
    """

    where: str

    @abstractmethod
    def line(self) -> str:
        """Its next line of output; "" when there is none. Raises DeviceUnreachable."""

    @abstractmethod
    def send(self, text: str) -> None:
        """A line of input; "" ends it. Raises DeviceUnreachable."""

    @abstractmethod
    def ended(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, what it wrote to standard error, and the signal's name that killed it there."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once, if it has not ended."""

    def answer(self, key: str) -> Any:
        """What its next line says under ``key``.

        Raises:
            EdgeAttnError: it ended instead, with the runner's own error.
        """
        line = self.line()
        try:
            said = json.loads(line)
            return said[key]
        except (ValueError, KeyError, TypeError):
            pass
        result = self._result(line)
        raise CheckFailed("the runner ended early", where=self.where, details=[str(result)[:200]])

    def ready(self) -> dict[str, Any]:
        """Wait until it is warm; returns what it says of itself. Raises as ``answer``."""
        found: dict[str, Any] = self.answer("ready")
        return found

    def ask(self, key: str, **request: Any) -> Any:
        """Ask for a block (``times``) or the machine's ``state``. Raises as ``answer``."""
        self.send(json.dumps(request))
        return self.answer(key)

    def finish(self) -> dict[str, Any]:
        """End its input, and return its result.

        Raises:
            EdgeAttnError: of the runner's own exit code.
        """
        self.send("")
        return self._result("")

    def _result(self, begun: str) -> dict[str, Any]:
        text = begun
        while line := self.line():
            text += line
        code, errors, died = self.ended()
        return result_of(parse_answer(text, code, errors, self.where, died), self.where)


class Start(Protocol):
    """Starts runners of the bundles that a transport holds."""

    def __call__(self, bundle: Path, arguments: Sequence[str], file: Path | None = None) -> Live:
        """``run.py *arguments --json``; with ``file``, which is brought there, its path comes last."""
        ...


class LocalProcess(Live):
    """On this machine."""

    where = "local"

    def __init__(self, bundle: Path, arguments: Sequence[str], file: Path | None = None) -> None:
        words = [sys.executable, str(runner_of(bundle)), "--json", *arguments, *([str(file)] if file else [])]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._watchdog = threading.Timer(LIVE_S, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()

    def line(self) -> str:
        """See ``Live``."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def send(self, text: str) -> None:
        """See ``Live``."""
        assert self._process.stdin is not None
        try:
            if text:
                self._process.stdin.write(text + "\n")
                self._process.stdin.flush()
            else:
                self._process.stdin.close()
        except OSError:
            pass  # it has ended; its last words say why

    def ended(self) -> tuple[int, str, str]:
        """See ``Live``."""
        code = self._process.wait()
        self._errors.seek(0)
        return code, self._errors.read().decode(errors="replace"), ""

    def kill(self) -> None:
        """See ``Live``."""
        self._watchdog.cancel()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                    pipe.close()
        self._errors.close()
