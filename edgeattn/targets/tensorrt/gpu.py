"""The engine on this machine's GPU, asked through the bundle's own ``run.py`` in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from edgeattn.core import tools
from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.targets.base import Artifact, Step, TraceValue, entry_of
from edgeattn.targets.feeds import check_feeds
from edgeattn.targets.tensorrt import PACKAGES

#: Seconds after which a run has gone wrong; the first one may build the engine.
TIMEOUT_S = 1800.0


def at_hand(artifact: Artifact) -> bool:
    """Whether there is a GPU, a TensorRT, and a bundle around the artifact, whose runner knows both."""
    if not (artifact.folder / "run.py").is_file() or not any(map(tools.version, PACKAGES.values())):
        return False
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except (OSError, AttributeError):
        return False


class EngineRuntime:
    """A bundle's engine, which has no tensors inside that could be looked at."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            UsageError: unknown entry, or feeds that do not fit. CheckFailed: the runner says no; in its words.
        """
        check_feeds(entry_of(self._artifact, entry).inputs, feeds)
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, str((self._artifact.folder / "run.py").resolve()), "--entry", entry]
            for i, (name, value) in enumerate(feeds.items()):
                np.save(Path(folder, f"{i}.npy"), value)
                words += ["--input", f"{name}={i}.npy"]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()]
                raise CheckFailed("the engine does not run on this machine's GPU", why=" ".join(said[-2:])[:600])
            names = [output.name for output in self._artifact.entries[entry].outputs]
            return {name: np.load(Path(folder, f"output.{name.replace('/', '_')}.npy")) for name in names}

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Nothing."""
        return iter(())

    def steps(self, entry: str) -> list[Step]:
        """Nothing."""
        return []
