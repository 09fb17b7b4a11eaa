"""What a target promises inside the whole pipeline: a bundle that proves itself, also in another process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import edgeattn
from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.conformance.kit import Kit
from edgeattn.conformance.promises import environment
from edgeattn.conformance.result import Skipped, demand
from edgeattn.core.errors import CheckFailed, ConversionFailed, EdgeAttnError, UsageError

#: A trained model, and the smallest there is, for targets that know few operations.
_TRAINED, _DECODER = "fmvit-digits", "plm-tiny"
_SMALLEST = "edgeattn.conformance.models:rectified"


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Nothing comes out of the user's cache, and nothing goes into it."""
    before = os.environ.get("EDGEATTN_CACHE")
    os.environ["EDGEATTN_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("EDGEATTN_CACHE")
        os.environ |= {"EDGEATTN_CACHE": before} if before is not None else {}


def _models(kit: Kit) -> list[dict[str, Any]]:
    if kit.model:
        return [{"model": kit.model}]
    parts = [targets.get(part) for part in kit.target.parts] or [kit.target]
    decoder = [{"model": _DECODER}] if all(part.cache for part in parts) else []
    return [{"model": _TRAINED}, *decoder, {"model": _SMALLEST, "inputs": ["x=2x64"]}]


def export(kit: Kit) -> str:
    """A model goes through the whole pipeline, and its bundle proves itself here and in a fresh process."""
    if not kit.name:
        raise Skipped(f"not registered: give it an entry point of group {targets.GROUP}, and name that")
    refused, bundle = [], None
    with _own_cache(kit.folder / "cache"):
        for asked in _models(kit):
            try:
                bundle = edgeattn.export(**asked, target=kit.name, precision=kit.precision, output=kit.folder / "out")
                break
            except EdgeAttnError as error:
                stopped = isinstance(error, CheckFailed) and not error.what.startswith("lint:")
                own = isinstance(error, ConversionFailed) and error.what.startswith("stage ")
                if stopped or own or not isinstance(error, CheckFailed | ConversionFailed | UsageError):
                    raise
                refused.append(f"{asked['model']}: {error.what} ({error.value or error.where})")
    mend = "name one that it takes: --model package.module:factory"
    demand(bundle is not None, "a model that it takes", "; ".join(refused), mend)
    assert bundle is not None
    parts = {kit.name, *kit.target.parts}
    front = bundle.manifest.backend
    demand(front in parts, f"a bundle of {', '.join(sorted(parts))}", front, "Target.name is the entry point's")
    worst = Bundle.open(bundle.path).verify().worst.relative_l2
    command = [sys.executable, "-m", "edgeattn", "verify", str(bundle.path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    said = done.stderr.strip() or done.stdout.strip()
    demand(done.returncode == 0, "edgeattn verify to hold", said, "keep nothing outside of the artifact's folder")
    left = f"; refused {', '.join(line.partition(':')[0] for line in refused)}" if refused else ""
    return f"{bundle.manifest.name}: relative L2 {worst:.1e}, here and in a fresh process{left}"
