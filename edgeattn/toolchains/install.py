"""Adds and removes a toolchain's environment: a venv that pip fills. Only ever on explicit request."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeattn.core.errors import ToolchainMissing, UsageError
from edgeattn.core.files import remove as delete
from edgeattn.core.files import write_whole
from edgeattn.toolchains import environment
from edgeattn.toolchains.environment import State
from edgeattn.toolchains.known import Toolchain, get

Say = Callable[[str], None]


def surroundings() -> dict[str, str]:
    """The environment variables without Python's own: with PYTHONPATH our packages would pass for the toolchain's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "__PYVENV"))}


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads its own group, with its children: pip itself runs as a child of pip."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _check_machine(toolchain: Toolchain) -> None:
    oldest, newest = toolchain.python
    wrong = []
    if not oldest <= sys.version_info[:2] <= newest:
        spans = " to ".join(".".join(map(str, version)) for version in toolchain.python)
        wrong.append(f"it has wheels for Python {spans}, this is {platform.python_version()}")
    if toolchain.machines and platform.machine() not in toolchain.machines:
        wrong.append(f"it has wheels for {toolchain.machines[0]}, this is {platform.machine()}")
    if wrong:
        raise ToolchainMissing(
            f"toolchain {toolchain.name} cannot be added here",
            why="; ".join(wrong),
            fix="add it with an EdgeAttn that runs on such a Python and machine",
        )


def _check_space(toolchain: Toolchain, place: Path) -> None:
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e6
    if free < toolchain.size_mb:
        raise ToolchainMissing(
            f"toolchain {toolchain.name} cannot be added here",
            where=str(place),
            why=f"it takes about {toolchain.size_mb} MB, {free:.0f} MB are free",
            fix="free some, or set EDGEATTN_HOME to a folder on a larger disk",
        )


def _news(line: str) -> str:
    """What a line of pip's says, in a few words; nothing for most."""
    words = line.split()
    if words[0] in ("Collecting", "Downloading", "Processing", "Building"):
        return f"{words[0].lower()} {words[1].rpartition('/')[2]}" if len(words) > 1 else ""
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages"
    return ""


def _run(words: Sequence[str], what: str, cwd: Path, lock: int, say: Say) -> None:
    process = subprocess.Popen(
        list(words),
        cwd=cwd,
        env=surroundings(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(lock,),
    )
    last: deque[str] = deque(maxlen=8)
    assert process.stdout is not None
    try:
        with process.stdout:
            for line in filter(str.strip, process.stdout):
                last.append(line.rstrip())
                if news := _news(line):
                    say(news)
        code = process.wait()
    finally:
        end(process)
    if code:
        raise ToolchainMissing(
            f"{what} failed",
            value=Path(words[0]).name,
            why=f"it ended with code {code}" if code > 0 else f"it was ended by {signal.Signals(-code).name}",
            fix="look at its last lines, then add it again; nothing of it was kept",
            details=list(last),
        )


def add(name: str, say: Say) -> State:
    """Make a toolchain's environment, unless it is there; one that is incomplete or outdated is made anew.

    pip and its configuration (index, proxies, constraints) are those of this Python. Whatever stops it, nothing is
    left that would pass for installed.

    Raises:
        UsageError: no such toolchain, or its folder cannot be written.
        ToolchainMissing: no wheels for this Python or machine, no room on the disk, pip failed (with its last lines),
            the result does not load, or another process is at it.
    """
    toolchain = get(name)
    found = environment.installed(name)
    if found.usable:
        return found
    _check_machine(toolchain)
    _check_space(toolchain, found.folder)
    with environment.hold(name, alone=True) as lock:
        found = environment.installed(name)
        if found.usable:  # another process was first
            return found
        _clear(found.folder)
        try:
            _fill(toolchain, found.folder, lock, say)
        except BaseException:
            _clear(found.folder)
            raise
    return environment.installed(name)


def _fill(toolchain: Toolchain, place: Path, lock: int, say: Say) -> None:
    start = time.monotonic()
    own = str(environment.python(toolchain.name))
    say("making its environment")
    # Without a pip of its own: ours fills it, and it stays smaller.
    _run([sys.executable, "-m", "venv", "--without-pip", str(place)], "making a venv", place.parent, lock, say)
    pip = [sys.executable, "-m", "pip", "--python", own, "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--progress-bar=off", *toolchain.requirements]
    _run(pip, f"pip install of toolchain {toolchain.name}", place.parent, lock, say)
    say("trying whether it loads")
    _run([own, "-I", "-c", f"import {toolchain.probe}"], f"loading {toolchain.probe}", place.parent, lock, say)
    versions = environment.packages(toolchain.name)
    made = {
        "made_from": environment.stamp(toolchain),
        "python": platform.python_version(),
        "versions": versions,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_whole(place / environment.STAMP, json.dumps(made, indent=1).encode())


def remove(name: str) -> Path | None:
    """Delete a toolchain's environment; returns the folder that is gone, None where none was.

    Raises:
        UsageError: no such toolchain, or its folder cannot be deleted. ToolchainMissing: another process uses it.
    """
    place = environment.folder(name)
    if not place.exists() and not place.is_symlink():
        return None
    with environment.hold(name, alone=True):
        _clear(place)
    return place


def _clear(place: Path) -> None:
    # The stamp first: if this process is killed on the way, what is left does not look installed.
    delete(place / environment.STAMP)
    delete(place)
    if place.exists():
        raise UsageError("a folder cannot be deleted", value=place, fix="change its permissions, or delete it yourself")
