"""The history: records in a local SQLite file, so that a model's latency over commits and versions can be asked."""

from __future__ import annotations

import csv
import io
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.profile.record import Record, parse

#: Of the file's tables, as ``PRAGMA user_version``.
VERSION = 1
#: How long a second writer waits for the first.
BUSY_S = 30.0

_TABLE = """
CREATE TABLE IF NOT EXISTS records (
    id TEXT PRIMARY KEY,
    created TEXT NOT NULL,
    model TEXT NOT NULL,
    bundle TEXT NOT NULL,
    device TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS of_model ON records (model, device, created);
"""


def path() -> Path:
    """``history.sqlite`` in the user's own folder, ``$EDGEATTN_HOME`` or ``~/.config/edgeattn``."""
    home = os.environ.get("EDGEATTN_HOME")
    return (Path(home) if home else Path.home() / ".config" / "edgeattn") / "history.sqlite"


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """The file, made where there is none.

    Raises:
        UsageError: it cannot be opened, or is of a newer EdgeAttn. CheckFailed: it is damaged.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=BUSY_S)) as connection:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version > VERSION:
                raise UsageError(
                    "the history is of a newer EdgeAttn",
                    value=f"version {version}",
                    where=str(file),
                    why=f"this one knows {VERSION}",
                    fix="pip install --upgrade edgeattn",
                )
            if version < VERSION:
                connection.executescript(_TABLE + f"PRAGMA user_version = {VERSION};")
            with connection:
                yield connection
    except sqlite3.OperationalError as error:
        raise UsageError("the history cannot be opened", value=file, why=str(error)) from error
    except sqlite3.DatabaseError as error:
        fix = f"move it away, and a new one is made: mv {file} {file}.damaged"
        raise CheckFailed("the history is damaged", where=str(file), why=str(error), fix=fix) from error
    except OSError as error:
        raise UsageError("the history cannot be opened", value=file, why=error.strerror or str(error)) from error


def append(records: Iterable[Record], file: Path | None = None) -> int:
    """Add records; one that is there already is not added again. Returns how many were new."""
    rows = [(r.id, r.created, r.subject.model, r.subject.bundle, r.place.device, r.model_dump_json()) for r in records]
    with _opened(file or path()) as connection:
        before = connection.total_changes
        connection.executemany("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)", rows)
        return connection.total_changes - before


def find(
    model: str | None = None, device: str | None = None, last: int | None = None, file: Path | None = None
) -> list[Record]:
    """Records, oldest first.

    Args:
        model: name of a model or of a bundle. device: its name. last: the newest so many alone.

    Raises:
        CheckFailed: a record in there cannot be read.
    """
    where, values = ["1"], []
    if model is not None:
        where.append("? IN (model, bundle)")
        values.append(model)
    if device is not None:
        where.append("device = ?")
        values.append(device)
    wanted = file or path()
    with _opened(wanted) as connection:
        query = f"SELECT record FROM records WHERE {' AND '.join(where)} ORDER BY created DESC, rowid DESC LIMIT ?"
        rows = connection.execute(query, [*values, -1 if last is None else last]).fetchall()
    try:
        return [parse(json.loads(text), str(wanted))[0] for (text,) in reversed(rows)]
    except ValueError as error:
        raise CheckFailed("the history is damaged", where=str(wanted), why=str(error)) from error


def names(file: Path | None = None) -> list[str]:
    """The models that it knows."""
    with _opened(file or path()) as connection:
        return [name for (name,) in connection.execute("SELECT DISTINCT model FROM records ORDER BY model")]


#: Columns of the CSV file, and where a record has them.
COLUMNS = (
    "created", "kind", "model", "bundle", "target", "backend", "precision", "entry", "device", "unit", "threads",
    "batch", "p50_ms", "low_ms", "high_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "std_ms", "min_ms", "max_ms",
    "runs", "processes", "first_ms", "load_ms", "estimate_ms", "peak_rss_mb", "device_mb", "size_mb", "macs",
    "parameters", "accuracy", "reference_accuracy", "worst_relative_l2", "tolerance", "weights", "flags", "partial",
    "runtime", "cpu", "machine", "system", "fingerprint", "commit", "edgeattn", "id",
)  # fmt: skip


def row(record: Record) -> dict[str, object]:
    """A record's figures, by column; those that it does not have are ""."""
    latency, subject, place = record.latency, record.subject, record.place
    times = ("p50", "low", "high", "p90", "p95", "p99", "mean", "std", "min", "max")
    found: dict[str, object] = {
        **record.model_dump(include={"created", "kind", "partial", "commit", "edgeattn", "id"}),
        **subject.model_dump(exclude={"digest"}),
        **place.model_dump(include={"device", "runtime", "cpu", "machine", "system", "fingerprint"}),
        **record.settings.model_dump(include={"unit", "threads", "batch"}),
        **record.memory.model_dump(),
        **record.proof.model_dump(include={"accuracy", "reference_accuracy", "worst_relative_l2", "tolerance"}),
        "estimate_ms": record.breakdown.estimate_ms,
        "flags": "; ".join(record.flags),
    }
    if latency is not None:
        found |= {f"{name}_ms": getattr(latency, name) for name in times}
        found |= {"runs": latency.runs, "processes": len(latency.blocks)}
        found |= {name: getattr(latency, name)[0] for name in ("first_ms", "load_ms") if getattr(latency, name)}
    return {name: "" if found.get(name) is None else found[name] for name in COLUMNS}


def to_csv(records: Sequence[Record]) -> str:
    """The records' figures as CSV (RFC 4180), a line each below the names of ``COLUMNS``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row(record).items()} for record in records)
    return text.getvalue()


def _harmless(value: object) -> object:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
