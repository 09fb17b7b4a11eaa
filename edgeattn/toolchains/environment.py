"""Where a toolchain's environment stands, and in what state it is; nothing of it is imported.

An environment is made in its final place: a venv does not bear to be renamed, since its commands (``bin/polygraphy``)
name its Python by absolute path. So what says that it is whole is not its folder but a stamp, written last.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgeattn.core import schema
from edgeattn.core.errors import ToolchainMissing, UsageError
from edgeattn.toolchains.known import Toolchain, get

#: Written into a finished environment, with what it was made from.
STAMP = "toolchain.json"
LAYOUT = 1


@dataclass(frozen=True)
class State:
    """What stands in a toolchain's folder.

    Attributes:
        state: ``incomplete`` is what a killed ``add`` left; ``outdated`` was made for other pins, or was changed or
            broken since. Only ``installed`` is used.
        versions: of the pinned distributions, as found there.
        why: of a state that is not ``installed``.
    """

    name: str
    folder: Path
    state: Literal["installed", "not added", "incomplete", "outdated"]
    versions: dict[str, str] = field(default_factory=dict)
    why: str = ""

    @property
    def usable(self) -> bool:
        """It can be called."""
        return self.state == "installed"


def folder(name: str) -> Path:
    """Where the toolchain's environment is, or would be: beside the user's own recipes and devices."""
    return schema.folders("toolchains")[0] / get(name).name


def python(name: str) -> Path:
    """The environment's Python."""
    return folder(name) / "bin" / "python"


def stamp(toolchain: Toolchain) -> dict[str, Any]:
    """What an environment is made from."""
    return {"layout": LAYOUT, "requirements": list(toolchain.requirements)}


def packages(name: str) -> dict[str, str]:
    """Distribution -> version of all that is in the environment, read from its metadata."""
    found = {}
    for site in sorted(folder(name).glob("lib/python*/site-packages")):
        for distribution in importlib.metadata.distributions(path=[str(site)]):
            with contextlib.suppress(Exception):  # half-written metadata: the distribution is not there
                found[_plain(distribution.metadata["Name"])] = distribution.version
    return dict(sorted(found.items()))


def _plain(name: str) -> str:
    """Distributions are spelt with dashes, underscores and capitals as their authors like."""
    return name.lower().replace("_", "-")


def installed(name: str) -> State:
    """The state of a toolchain's environment. A few milliseconds; no network, and nothing is imported.

    Raises:
        UsageError: no such toolchain.
    """
    toolchain, place = get(name), folder(name)
    if not place.is_dir():
        return State(name, place, "not added", why="not added")
    try:
        made_from = json.loads((place / STAMP).read_text(encoding="utf-8"))["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return State(name, place, "incomplete", why="an add of it was cut off")
    there = packages(name)
    versions = {wanted: there[_plain(wanted)] for wanted in toolchain.pins if _plain(wanted) in there}
    if made_from != stamp(toolchain):
        why = "it was made for another version of EdgeAttn"
    elif not python(name).exists():
        why = "the Python that it was made with is gone"
    elif wrong := mismatches(toolchain, versions):
        why = wrong[0]
    else:
        return State(name, place, "installed", versions)
    return State(name, place, "outdated", versions, why)


def mismatches(toolchain: Toolchain, versions: dict[str, str]) -> list[str]:
    """Where ``versions`` are not the pinned ones; a local part (``+cpu``) is free unless it is pinned too."""
    found = []
    for name, pin in toolchain.pins.items():
        version = versions.get(name)
        if version is None:
            found.append(f"{name} is not in it")
        elif version != pin and version.partition("+")[0] != pin:
            found.append(f"{name} in it is {version}, not {pin}")
    return found


def size(name: str) -> int:
    """Bytes on the disk. It walks through tens of thousands of files: a second for a large environment."""
    total = 0
    for root, _, names in os.walk(folder(name)):
        for one in names:
            with contextlib.suppress(OSError):  # it is being removed
                total += os.lstat(os.path.join(root, one)).st_size
    return total


@contextlib.contextmanager
def hold(name: str, *, alone: bool) -> Iterator[int]:
    """Keep others from changing the environment, and from using it too if ``alone``; yields the lock's descriptor.

    A child that gets the descriptor holds the lock on, for as long as it lives: pip goes on for a while if the process
    that started it is killed, and nobody must begin anew beneath it.

    Raises:
        ToolchainMissing: another process has it. UsageError: the folder cannot be written.
    """
    import fcntl  # not on Windows, where nothing can be added but `doctor` and `list` still look

    place = folder(name)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Never removed: whoever waits on a lock's file that is then removed would hold nothing.
        mode = os.O_RDWR if alone else os.O_RDONLY  # one that somebody else added for all can be used, if not changed
        descriptor = os.open(place.with_name(f".{name}.lock"), mode | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(
            "the folder of toolchains cannot be written",
            value=place.parent,
            why=f"{error.strerror or error}: {error.filename}",
            fix="set EDGEATTN_HOME to a folder that can",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ToolchainMissing(
                f"toolchain {name} is busy",
                where=str(place),
                why="another process adds, removes or uses it",
                fix="wait until that one has ended, then try again",
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)
