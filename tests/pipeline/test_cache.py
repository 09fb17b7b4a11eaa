"""The cache: whole or not there, and checked when read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.pipeline.cache import Cache

KEY = "ab" + "0" * 62


def filled(cache: Cache, key: str = KEY) -> Path:
    scratch = cache.scratch()
    (scratch / "sub").mkdir()
    (scratch / "sub" / "data.bin").write_bytes(bytes(range(200)))
    return cache.put(scratch, "lower", key, {"a": [1, None]}, 1.5, 20.0).folder


def test_round_trip(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get(KEY) is None
    filled(cache)
    record = cache.get(KEY)
    assert record is not None
    assert (record.stage, record.facts, record.seconds, record.peak_mb) == ("lower", {"a": [1, None]}, 1.5, 20.0)
    assert (record.folder / "sub" / "data.bin").read_bytes() == bytes(range(200))
    assert list((tmp_path / "scratch").iterdir()) == []


@given(position=st.integers(0, 199), flip=st.integers(1, 255))
@settings(max_examples=20, deadline=None)
def test_a_flipped_byte_is_a_miss(tmp_path_factory: pytest.TempPathFactory, position: int, flip: int) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    path = filled(cache) / "sub" / "data.bin"
    data = bytearray(path.read_bytes())
    data[position] ^= flip
    path.write_bytes(bytes(data))
    assert cache.get(KEY) is None
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 3}'])
def test_a_damaged_record_is_a_miss(tmp_path: Path, text: str) -> None:
    cache = Cache(tmp_path)
    (filled(cache) / "record.json").write_text(text)
    assert cache.get(KEY) is None
    filled(cache)
    assert cache.get(KEY) is not None


def test_the_first_of_two_writers_stands(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = filled(cache)
    (first / "mark").touch()
    assert filled(cache) == first
    assert (first / "mark").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_sources_that_are_damaged_are_unknown(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put_sources("k", {"files": [], "distributions": []})
    assert cache.sources("k") == {"files": [], "distributions": []}
    (tmp_path / "sources" / "k.json").write_text("{")
    assert cache.sources("k") is None
