"""SHA-256 of files, of plain data and of source code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Hex digest of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def canonical_json(data: Any) -> str:
    """The one JSON text of plain data: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a NaN or an infinity. TypeError: something that is not plain data.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_data(data: Any) -> str:
    """Hex digest of ``canonical_json(data)``."""
    return sha256_bytes(canonical_json(data).encode())


def sha256_sources(root: Path, names: Iterable[str]) -> str:
    """Digest of the Python and data files under ``root`` that ``names`` list: files, or folders with all they hold.

    Compiled files do not count, so that running the code does not change its own version.
    """
    found: dict[str, str] = {}
    for name in names:
        path = root / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if "__pycache__" not in file.parts:
                found[file.relative_to(root).as_posix()] = sha256_file(file)
    return sha256_data(found)
