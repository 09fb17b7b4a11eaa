"""The lock file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.check.lock import KEPT, Entry, Lock, changes, gone, read, write
from edgeattn.core.errors import UsageError

_NUMBER = st.one_of(st.none(), st.integers(0, 10**12), st.floats(0, 1e9, allow_nan=False))
_ENTRY = st.builds(
    Entry,
    artifacts=st.dictionaries(st.text(min_size=1), st.text("0123456789abcdef", min_size=64, max_size=64), max_size=2),
    facts=st.fixed_dictionaries(dict.fromkeys(KEPT, _NUMBER)),
    versions=st.dictionaries(st.text(min_size=1), st.one_of(st.none(), st.text(min_size=1)), max_size=2),
    machine=st.text(),
    seconds=st.floats(0, 1e6),
    peak_mb=st.one_of(st.none(), st.floats(0, 1e6)),
)
_LOCK = st.builds(Lock, cells=st.dictionaries(st.text(), _ENTRY, max_size=3))


@given(_LOCK)
def test_it_reads_back_as_it_was_written(lock: Lock) -> None:
    assert Lock.model_validate_json(lock.text()) == lock


@given(_ENTRY, _ENTRY)
def test_changes_are_none_exactly_where_nothing_that_counts_differs(a: Entry, b: Entry) -> None:
    assert not list(changes("x", a, a))
    facts = [
        [e.facts[n] if e.facts[n] is None else form.format(e.facts[n]) for n, form in KEPT.items()] for e in (a, b)
    ]
    differ = a.artifacts != b.artifacts or facts[0] != facts[1]
    versions = {k: v for k, v in a.versions.items() if v} != {k: v for k, v in b.versions.items() if v}
    assert bool(list(changes("x", a, b))) == (differ or versions)


def test_changes_are_sentences() -> None:
    facts = dict.fromkeys(KEPT) | {"nodes": 1200, "relative_l2": 1e-6}
    a = Entry(artifacts={"m": "0"}, facts=facts, versions={"onnx": "1"}, machine="", seconds=1, peak_mb=None)
    b = a.model_copy(update={"artifacts": {"m": "1"}, "facts": {**facts, "nodes": 1300}, "versions": {"onnx": "2"}})
    assert list(changes("x", a, b)) == ["x: onnx 1 -> 2", "x: nodes 1,200 -> 1,300", "x: other bytes in m"]
    assert list(changes("x", None, b)) == ["x: new"]
    assert gone(Lock(cells={"x": a, "y": a}), ["y"]) == ["x"]


def test_a_file_that_is_no_lock_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "edgeattn.lock"
    assert read(file) is None
    write(file, Lock())
    assert read(file) == Lock()
    for text in ("{", "[]", '{"cells": {"x": {}}, "schema_version": 1}', '{"schema_version": 2, "cells": {}}'):
        file.write_text(text)
        with pytest.raises(UsageError) as caught:
            read(file)
        assert "edgeattn.lock" in str(caught.value)
        assert caught.value.fix
