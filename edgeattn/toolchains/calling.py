"""Runs a script with a toolchain's Python: a request goes in as a file, a result comes out as one."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeattn.core.errors import ConversionFailed, ToolchainMissing
from edgeattn.core.files import remove as delete
from edgeattn.toolchains import environment
from edgeattn.toolchains.install import end, surroundings
from edgeattn.toolchains.known import get

REQUEST, RESULT, LOG = "request.json", "result.json", "log.txt"
_TAIL = 8


def script(name: str) -> Path:
    """One of the shipped scripts; they import nothing of EdgeAttn, since they run where it is not installed."""
    return Path(__file__).resolve().parent / "scripts" / f"{name}.py"


def call(name: str, script: Path, request: Mapping[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """Run ``script`` with the Python of toolchain ``name`` and return its result.

    The script gets ``folder`` as its one argument and as its working folder, reads ``request.json`` there and writes
    ``result.json``, an object. What it prints goes to ``log.txt``. It sees no package of ours (``-I``).

    Args:
        folder: made if it is not there; an old result and log in it are replaced.
        timeout: seconds, after which the script and its children are killed.

    Raises:
        UsageError: no such toolchain.
        ToolchainMissing: it is not added, or another process is adding or removing it.
        ConversionFailed: the script failed, crashed, took too long or wrote no result; with the end of its log.
    """
    _check(name)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    delete(folder / RESULT)
    (folder / REQUEST).write_text(json.dumps(dict(request), allow_nan=False, indent=1), encoding="utf-8")
    with environment.hold(name, alone=False) as lock:
        _check(name)  # again: until here another process may have removed it
        why = _run([str(environment.python(name)), "-I", str(script.resolve()), str(folder)], folder, timeout, lock)
    if not why:
        try:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            why = f"it ended without a {RESULT}"
        except (OSError, ValueError) as error:
            why = f"its {RESULT} cannot be read: {error}"
        else:
            if isinstance(result, dict):
                return result
            why = f"its {RESULT} is no object"
    log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    raise ConversionFailed(
        f"{script.stem} of toolchain {name} failed",
        where=str(folder / LOG),
        why=why,
        fix="read the log",
        details=[line for line in log.splitlines() if line.strip()][-_TAIL:],
    )


def _check(name: str) -> None:
    found = environment.installed(name)
    if not found.usable:
        raise ToolchainMissing(
            f"toolchain {name} is needed and not there",
            where=str(found.folder),
            why=found.why,
            fix=get(name).line,
        )


def _run(words: list[str], folder: Path, timeout: float, lock: int) -> str:
    """Run it to its end; why it failed, or nothing."""
    with (folder / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=surroundings(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=(lock,),
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"it did not end within {timeout:g} s and was killed"
        finally:
            end(process)
    if code < 0:
        name = signal.Signals(-code).name
        words_of = {"SIGKILL": "; the system does that when memory runs out", "SIGSEGV": " (a crash in compiled code)"}
        return f"its process was ended by {name}{words_of.get(name, '')}"
    return f"it ended with code {code}" if code else ""
