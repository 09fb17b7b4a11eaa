"""What this process may use of its machine: cores and memory, as the system and its control group grant them."""

from __future__ import annotations

import math
import os
from pathlib import Path


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and of those above it, for either version of control groups."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number != "0" and controller not in names.split(","):
            continue
        top = base if number == "0" else base / names if (base / names).is_dir() else base / controller
        place = top / path.strip("/")
        # Inside of a container the path may be that of the host, which is not to be seen here.
        found += [f for f in (place, *place.parents) if f.is_relative_to(top) and f.is_dir()]
    return found


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return None  # not there, or "max"


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, at least 1: its affinity, and the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for folder in _groups(root, "cpu"):
        try:
            quota, period = map(float, (folder / "cpu.max").read_text(encoding="utf-8").split())
        except (OSError, ValueError):
            quota, period = _number(folder / "cpu.cfs_quota_us") or -1, _number(folder / "cpu.cfs_period_us") or 1
        if quota > 0 and period > 0:
            count = min(count, quota / period)
    return max(1, math.floor(count))


def free_gb(root: Path = Path("/")) -> float | None:
    """Memory in GB (1e9 bytes) that can still be had without swapping; None where the system does not say."""
    found = []
    try:
        for line in (root / "proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024 / 1e9)
    except (OSError, ValueError, IndexError):
        pass
    for folder in _groups(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                found.append(max(0.0, most - now + _cached(folder / "memory.stat")) / 1e9)
    return min(found) if found else None


def _cached(path: Path) -> float:
    """Bytes of files that the group has in memory, and that the system takes back first."""
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        return next((float(w[1]) for w in words if w[0] in ("inactive_file", "total_inactive_file")), 0.0)
    except (OSError, ValueError, IndexError):
        return 0.0


def places(cores: int, free_gb: float | None, each_gb: float) -> int:
    """How many processes fit at once, at least 1: one a core, as far as the memory goes."""
    fitting = math.inf if free_gb is None else free_gb // each_gb
    return max(1, int(min(cores, fitting)))
