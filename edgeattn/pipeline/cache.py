"""The content-addressed cache of stage results: a folder a key, whole or not there, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeattn.core.errors import UsageError
from edgeattn.core.files import move_into, remove, scratch_folder, write_whole
from edgeattn.core.hashing import sha256_file

_RECORD = "record.json"


@dataclass(frozen=True)
class Record:
    """The result of one stage.

    Attributes:
        folder: holds its files.
        facts: plain data that later stages and the manifest use.
        seconds, peak_mb: what the stage took when it ran.
    """

    stage: str
    key: str
    folder: Path
    facts: dict[str, Any]
    files: dict[str, str]
    seconds: float
    peak_mb: float


class Cache:
    """Stage results by key under ``root``; several processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def default(cls) -> Cache:
        """In ``$EDGEATTN_CACHE``, else in the user's cache folder."""
        named = os.environ.get("EDGEATTN_CACHE")
        base = os.environ.get("XDG_CACHE_HOME")
        return cls(Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "edgeattn")

    def prepare(self) -> None:
        """Make the cache's folder.

        Raises:
            UsageError: it cannot be made or written.
        """
        try:
            for name in ("objects", "scratch", "sources", "logs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self.discard(self.scratch())
        except OSError as error:
            raise UsageError(
                "the cache folder cannot be written",
                value=self.root,
                why=f"{error.strerror}: {error.filename}",
                fix="set EDGEATTN_CACHE to a folder that can",
            ) from error

    def _folder(self, key: str) -> Path:
        return self.root / "objects" / key[:2] / key

    def get(self, key: str) -> Record | None:
        """The record of ``key`` with all its bytes as they were written; a damaged one is removed and is None."""
        folder = self._folder(key)
        if not folder.is_dir():
            # Nothing to be removed, above all not what another process may be putting there right now.
            return None
        try:
            data = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            record = Record(**{**data, "folder": folder})
            sound = record.key == key and all(sha256_file(folder / n) == sha for n, sha in record.files.items())
        except FileNotFoundError:
            sound = False
        except (OSError, ValueError, TypeError):
            sound = False
        if not sound:
            remove(folder)
            return None
        return record

    def scratch(self) -> Path:
        """An empty folder for a stage to write into; ``put`` moves it, ``discard`` drops it."""
        return scratch_folder(self.root / "scratch")

    def put(
        self, scratch: Path, stage: str, key: str, facts: Mapping[str, Any], seconds: float, peak_mb: float
    ) -> Record:
        """Move a filled scratch folder to its key."""
        files = {
            path.relative_to(scratch).as_posix(): sha256_file(path)
            for path in sorted(scratch.rglob("*"))
            if path.is_file()
        }
        record = Record(stage, key, self._folder(key), dict(facts), files, seconds, peak_mb)
        data = {k: v for k, v in asdict(record).items() if k != "folder"}
        (scratch / _RECORD).write_text(json.dumps(data, allow_nan=False), encoding="utf-8")
        move_into(scratch, record.folder)
        return record

    def discard(self, scratch: Path) -> None:
        """Drop a scratch folder."""
        remove(scratch)

    def sources(self, key: str) -> dict[str, Any] | None:
        """What ``put_sources`` noted for ``key``, or None."""
        try:
            data = json.loads((self.root / "sources" / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        lists = [data.get(name) for name in ("files", "distributions")] if isinstance(data, dict) else [None]
        texts = all(isinstance(found, list) and all(isinstance(text, str) for text in found) for found in lists)
        return data if texts else None

    def put_sources(self, key: str, data: Mapping[str, Any]) -> None:
        """Note which files and distributions a model was built from."""
        write_whole(self.root / "sources" / f"{key}.json", json.dumps(data).encode())
