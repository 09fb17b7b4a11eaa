"""The latency of cells against their baselines' bundles, both measured here and now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeattn.bundle import Bundle
from edgeattn.check.file import Latency, Wanted
from edgeattn.check.lock import Entry
from edgeattn.core.errors import EdgeAttnError, ToolchainMissing
from edgeattn.core.files import whole_folder, write_whole
from edgeattn.core.hashing import sha256_data, sha256_sources
from edgeattn.pipeline.stages import PACKAGE
from edgeattn.profile.measure import UNPACED
from edgeattn.report.checks.data import Item, Status

_UPDATE = "edgeattn check --update makes one of what is there now; --baseline FOLDER takes another commit's bundles"


class Gates:
    """Measures cells, one after the other.

    Args:
        work: where accepted bundles are, and what was measured before.
        baseline: folder of another commit's bundles, in place of the accepted ones.
        machine: this one in words. again: measure also what was measured before.
    """

    def __init__(
        self, work: Path, baseline: Path | None, machine: str, say: Callable[[str], None], again: bool = False
    ) -> None:
        self._work, self._machine, self._say, self._again = work, machine, say, again
        self._given = baseline is not None
        self._baseline = baseline or work / "baseline"

    def accept(self, one: Wanted, bundle: Path) -> None:
        """Make a cell's bundle its baseline."""
        with whole_folder(self._work / "baseline" / one.folder / bundle.name, replace=True) as folder:
            shutil.copytree(bundle, folder, dirs_exist_ok=True)

    def check(
        self, one: Wanted, outcome: Mapping[str, Any], locked: Entry | None
    ) -> tuple[Item, dict[str, Any] | None]:
        """The item of a cell with a budget of latency, and the verdict as plain data if there was one."""
        assert one.budgets.latency is not None
        place = one.place("latency")
        if not outcome["held"]:
            return Item("latency", "skipped", f"the export ended at stage {outcome['stage']}", place), None
        head = Bundle.open(outcome["bundle"])
        try:
            base = Bundle.open(self._baseline / one.folder / head.path.name)
            base.check_files()
        except EdgeAttnError as error:
            words = f"nothing was measured: there is no baseline ({error.what})"
            return Item("latency", "warned", words, place, fix=_UPDATE), None
        if not self._given and (locked is None or _artifacts(base, locked) != locked.artifacts):
            words = "nothing was measured: the baseline at hand is not the one that the lock file names"
            return Item("latency", "warned", words, place, fix=_UPDATE), None
        if head.manifest.backend in UNPACED:
            words = f"runs of {head.manifest.backend} cannot take turns with others"
            return Item("latency", "skipped", words, place), None
        try:
            verdict = self._verdict(one, base, head, one.budgets.latency)
        except EdgeAttnError as error:
            status: Status = "skipped" if isinstance(error, ToolchainMissing) else "failed"
            words = f"it cannot be measured here: {error.what}"
            return Item("latency", status, words, place, error.why or "", error.fix or ""), None
        return _item(verdict, one), verdict

    def _verdict(self, one: Wanted, base: Bundle, head: Bundle, asked: Latency) -> dict[str, Any]:
        """Measured, or as it was measured before of the same two on the same machine."""
        from edgeattn.profile.gate import gate

        key = sha256_data(
            {
                "base": base.manifest.digest,
                "head": head.manifest.digest,
                "asked": asked.model_dump(mode="json"),
                "machine": self._machine,
                "code": sha256_sources(PACKAGE, ("profile", "bundle")),
            }
        )
        file = self._work / "results" / f"{sha256_data(one.id)}.latency.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["key"] == key and not self._again:
                return dict(data["verdict"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._say(f"{one.id}: latency against the baseline")
        measured = gate(base.path, head.path, asked.device, margin=asked.margin, threads=asked.threads, say=self._say)
        verdict = measured.as_dict()
        # Another minute may tell what this one could not.
        if verdict["verdict"] in ("pass", "regress"):
            write_whole(file, json.dumps({"key": key, "verdict": verdict}, allow_nan=False).encode())
        return verdict


def _artifacts(bundle: Bundle, locked: Entry) -> dict[str, str]:
    """SHA-256 of the files that a lock file's entry names, as far as the bundle has them."""
    files = bundle.manifest.files
    return {name: files[name].sha256 for name in locked.artifacts if name in files}


def _item(verdict: Mapping[str, Any], one: Wanted) -> Item:
    assert one.budgets.latency is not None
    policy: Status = "failed" if one.budgets.latency.inconclusive == "fail" else "warned"
    # What was refused was not measured fairly, and that is never a pass.
    known: dict[str, Status] = {"pass": "held", "inconclusive": policy}
    status = known.get(verdict["verdict"], "failed")
    words, ratio = verdict["verdict"], verdict["ratio"]
    if ratio:
        words += f": {ratio['value']:.3f}x the baseline [{ratio['low']:.3f} to {ratio['high']:.3f}]"
    fix = "edgeattn check --update accepts it" if verdict["verdict"] == "regress" else verdict["fix"]
    allowed = f"allowed is {1 + one.budgets.latency.margin:.2f}x"
    return Item("latency", status, f"{words}, {allowed}", one.place("latency"), verdict["why"], fix)
