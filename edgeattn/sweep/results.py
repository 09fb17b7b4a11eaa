"""What came of cells, in a folder: one whole file for each, so that a sweep goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from edgeattn.core.files import write_whole
from edgeattn.pipeline.cells import Cell

_SCHEMA = 1


def plain(data: Any) -> Any:
    """Numbers that JSON has no word for are None."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, list | tuple) else data


def write(folder: Path, cell: Cell, outcome: dict[str, Any], attempts: int, seconds: float, peak_mb: float) -> None:
    """The file of a finished cell.

    Args:
        outcome: see ``pipeline.cells.run_cell``.
        attempts, seconds, peak_mb: of its process.
    """
    data = {"schema": _SCHEMA, "cell": cell.to_dict(), "attempts": attempts, "seconds": seconds, "peak_mb": peak_mb}
    text = json.dumps(plain(data | {"outcome": outcome}), indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(folder / f"{cell.sha256}.json", f"{text}\n".encode())


def read(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The file of a cell; None if there is none that is whole and of this kind."""
    try:
        data = json.loads((folder / f"{cell.sha256}.json").read_text(encoding="utf-8"))
        whole = data["schema"] == _SCHEMA and data["cell"] == json.loads(json.dumps(cell.to_dict()))
        outcome = data["outcome"]
        whole = whole and isinstance(outcome["held"], bool) and isinstance(outcome["key"], str)
        whole = whole and (outcome["held"] or isinstance(outcome["error"]["kind"], str))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return data if whole else None
