"""The plan: every stage of a job with its cache key, known before anything heavy is imported."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn import targets
from edgeattn.core import tools
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.hashing import sha256_data, sha256_file, sha256_sources
from edgeattn.device import Device
from edgeattn.pipeline.cache import Cache, Record
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.stages import PACKAGE, STAGES, Stage
from edgeattn.targets.base import Target


@dataclass(frozen=True)
class Planned:
    """A stage of a job.

    Attributes:
        key: SHA-256 over all that can change the result.
        record: the cached result, or None if the stage has to run.
    """

    stage: Stage
    key: str
    record: Record | None


def sources_key(job: Job) -> str:
    """Under which the files that a model is built from are noted."""
    return sha256_data(STAGES[0].config(job) | {"folder": job.resolved.folder})


def _content(path: Path) -> str | None:
    """Digest of a file's bytes, or of the names in a folder; None if it is gone."""
    try:
        return sha256_data(sorted(os.listdir(path))) if path.is_dir() else sha256_file(path)
    except OSError:
        return None


def _sources(job: Job, cache: Cache) -> dict[str, Any] | None:
    """Digests of the files and versions of the distributions that the model was built from last time.

    None before the first build. A factory that reads other files now differs in one of those that it read before.
    """
    noted = cache.sources(sources_key(job))
    if noted is None:
        return None
    return {
        "files": {name: _content(Path(name)) for name in noted["files"]},
        "distributions": {name: tools.version(name) for name in noted["distributions"]},
    }


def bundle_key(job: Job, cache: Cache) -> str:
    """Digest of all that goes into a job's bundle, which may hold several artifacts."""
    return joined_key(job, [make_plan(part, cache, look=False)[-1].key for part in job.parts])


def joined_key(job: Job, keys: Sequence[str]) -> str:
    """``bundle_key`` from those of the job's parts."""
    return keys[0] if len(keys) == 1 else sha256_data({"target": job.target, "parts": list(keys)})


def known_key(job: Job, cache: Cache) -> str | None:
    """``bundle_key`` where it can be known without building the model; looks at no result, so that it is quick."""
    return None if cache.sources(sources_key(job)) is None else bundle_key(job, cache)


def make_plan(job: Job, cache: Cache, upto: str = "bundle", look: bool = True) -> list[Planned]:
    """All stages up to ``upto`` in order. Reads files and package metadata only.

    Args:
        look: for cached results too, which reads all their bytes.
    """
    keys: dict[str, str] = {}
    planned = []
    for stage in (s for s in STAGES if s.applies(job)):
        content: dict[str, Any] = {
            "stage": stage.name,
            "config": stage.config(job),
            "code": sha256_sources(PACKAGE, stage.code(job)),
            "tools": tools.versions(stage.tools(job)),
            "python": ".".join(platform.python_version_tuple()[:2]),
            "host": tools.host(),
            "needs": {name: keys[name] for name in stage.needs if name in keys},
        }
        known = True
        if stage.name == "build":
            content["sources"] = _sources(job, cache)
            known = content["sources"] is not None
        key = sha256_data(content)
        keys[stage.name] = key
        # Without the sources the true key is not known yet, and nothing after the build can be found either.
        planned.append(Planned(stage, key, cache.get(key) if known and look else None))
        if stage.name == upto:
            break
    return planned


def _check_device(target: Target, device: Device) -> None:
    if target.name not in device.targets:
        raise UsageError(
            "the device does not run this target",
            value=f"{device.name}: {target.name}",
            why=f"it runs {', '.join(device.targets)}",
            fix="choose another --target or --device",
        )
    for part in map(targets.get, target.parts or (target.name,)):
        runtime = device.runtimes.get(part.name)
        if runtime is not None and runtime not in part.device_runtimes:
            where = f"device {device.name}, runtimes.{part.name}"
            raise unknown(f"runtime of target {part.name}", runtime, part.device_runtimes, where=where)


def check_choice(target: Target, precision: str, layout: str, device: Device | None, known: Sequence[str]) -> None:
    """Whether a target can hold a precision and a layout, and run on a device under the runtime that its file names.

    Raises:
        UsageError: says what would do.
    """
    if device is not None:
        _check_device(target, device)
    if layout not in target.layouts:
        raise UsageError(
            "the target cannot take images in this layout",
            value=layout,
            where=f"target {target.name}",
            why=f"it takes {', '.join(target.layouts)}",
            fix=f"--layout {target.layouts[0]}",
        )
    held = target.precisions(device)
    if precision not in held:
        raise UsageError(
            "the target cannot hold this precision" if precision in known else "unknown precision",
            value=precision,
            where=f"target {target.name}",
            why=f"it holds {', '.join(held)}",
            fix=f"--precision {held[0]}",
        )
