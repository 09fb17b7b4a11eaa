"""Records as JSON, and in the history."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.profile import store
from edgeattn.profile.record import Record, parse, read, to_json
from tests.report.making import record

RECORD = record(model="net", threads=1)


def test_records_come_back_from_json(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(to_json([RECORD, record(model="other")]))
    assert read(file) == [RECORD, record(model="other")]
    assert parse(RECORD.model_dump(mode="json"), "x") == [RECORD]
    assert parse([RECORD.model_dump(mode="json")], "x") == [RECORD]


@given(st.text(), st.text(), st.floats(0.001, 1e6), st.lists(st.text()))
def test_any_names_come_back(model: str, device: str, ms: float, flags: list[str]) -> None:
    made = record(ms, model=model, device=device, flags=tuple(flags))
    try:
        text = to_json([made])
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    assert parse(json.loads(text), "x") == [made]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "newer EdgeAttn"),
        ({"schema_version": 0}, "older EdgeAttn"),
        ({"commit": "changed"}, "was changed"),
        ({"kind": "guessed"}, "not a record"),
        ({"more": 1}, "not a record"),
    ],
)
def test_what_is_no_record(change: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse({"records": [RECORD.model_dump(mode="json") | change]}, "some.json")
    assert "some.json, record 1" in str(caught.value.where)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"records": []}', '{"records": 5}', "7", '{"records": [7]}'])
def test_files_that_hold_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(UsageError):
        read(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "none.json")


def test_the_history_keeps_each_once_and_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "h.sqlite"
    second, first, third = many = [
        record(ms, model="net", created=f"2026-01-0{day}T00:00:00Z") for day, ms in ((2, 5.0), (1, 4.0), (3, 6.0))
    ]
    assert store.append([*many, record(model="other", device="mac")], file) == 4
    assert store.append(many[:1], file) == 0
    assert store.find("net", file=file) == [first, second, third]
    assert store.find("net.onnx.fp32", last=1, file=file) == [third]
    assert [r.subject.model for r in store.find(device="mac", file=file)] == ["other"]
    assert store.find("net' OR 1 --", file=file) == []
    assert store.names(file) == ["net", "other"]


def test_a_damaged_history_is_said_and_left(tmp_path: Path) -> None:
    file = tmp_path / "h.sqlite"
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(CheckFailed, match="damaged") as caught:
        store.append([RECORD], file)
    assert "mv " in str(caught.value.fix)
    assert file.read_bytes().startswith(b"no database")
    new = tmp_path / "new.sqlite"
    with sqlite3.connect(new) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="newer"):
        store.find(file=new)
    with pytest.raises(UsageError, match="cannot be opened"):
        store.find(file=tmp_path)


def test_two_writers_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    file = tmp_path / "h.sqlite"
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda n: store.append([record(model=f"m{n}")], file), range(24)))
    assert sum(added) == len(store.find(file=file)) == 24


def test_csv_has_the_figures_and_no_formulas() -> None:
    bad = record(model='=HYPERLINK("x")', device='a,b\n"c"')
    rows = list(csv.DictReader(io.StringIO(store.to_csv([RECORD, bad]))))
    assert RECORD.latency is not None
    assert [float(row["p50_ms"]) for row in rows] == [RECORD.latency.p50] * 2
    assert rows[1]["model"] == '\'=HYPERLINK("x")'
    assert rows[1]["device"] == 'a,b\n"c"'
    assert rows[0]["runs"] == str(RECORD.latency.runs)
    assert set(rows[0]) == set(store.COLUMNS)


def test_labels() -> None:
    assert RECORD.label == "net.onnx.fp32"
    more = RECORD.model_copy(update={"settings": RECORD.settings.model_copy(update={"threads": 2, "batch": 4})})
    assert isinstance(more, Record)
    assert more.label == "net.onnx.fp32, 2 threads, batch 4"
