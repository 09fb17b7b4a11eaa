"""Which toolchains are installed, learned from package metadata: nothing is imported."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from pathlib import Path


@functools.cache
def version(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(distributions: tuple[str, ...]) -> dict[str, str | None]:
    """``version`` of each; ``python`` stands for the interpreter."""
    return {name: platform.python_version() if name == "python" else version(name) for name in distributions}


def host() -> dict[str, str]:
    """The host's architecture and system, as cache keys and manifests record them."""
    return {"machine": platform.machine(), "system": sys.platform}


@functools.cache
def cpu_extensions() -> tuple[str, ...]:
    """Of this machine's CPU, as Linux names them; none are known elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return tuple(next(found, []))
