"""What a stage sees while it runs in the worker."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeattn.core.numerics import Array
from edgeattn.pipeline.job import Job


@dataclass(frozen=True)
class Result:
    """A finished stage's files and facts."""

    folder: Path
    facts: dict[str, Any]


@dataclass
class Context:
    """Job, results of the stages before, a folder to write into, and values still in memory.

    Attributes:
        out: empty folder for the stage's files.
        results: finished stages by name.
        values: what stages left in memory: the built model, the deploy form, the program. Lost with the process.
        say: shows a line of progress.
    """

    job: Job
    out: Path
    results: dict[str, Result]
    values: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None

    def value(self, stage: str) -> Any:
        """What ``stage`` left in memory; brought back from its cached result where another process made it.

        A stage module's ``revive(context)`` loads it; without one the stage runs again beside the cached files, which
        is how modules come back: they are rebuilt from the recipe and never unpickled.
        """
        if stage not in self.values:
            module = importlib.import_module(f"edgeattn.pipeline.stages.{stage}")
            if hasattr(module, "revive"):
                self.values[stage] = module.revive(self)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    module.run(replace(self, out=Path(folder)))
        return self.values[stage]

    def golden(self) -> list[tuple[dict[str, Array], dict[str, Array]]]:
        """(inputs, reference outputs) of every golden sample."""
        import numpy as np

        samples = []
        for path in sorted((self.results["reference"].folder / "golden").glob("*.npz")):
            with np.load(path, allow_pickle=False) as data:
                feeds = {key[3:]: data[key] for key in data.files if key.startswith("in.")}
                outputs = {key[4:]: data[key] for key in data.files if key.startswith("out.")}
            samples.append((feeds, outputs))
        return samples
