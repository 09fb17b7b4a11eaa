import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.hashing import canonical_json, sha256_bytes, sha256_data, sha256_file, sha256_sources

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_canonical_json_reads_back(data):
    assert json.loads(canonical_json(data)) == data


@given(st.dictionaries(st.text(max_size=5), st.integers(), min_size=2))
def test_the_order_of_keys_does_not_count(data):
    turned = dict(reversed(list(data.items())))
    assert canonical_json(turned) == canonical_json(data)
    assert sha256_data({"a": [turned]}) == sha256_data({"a": [data]})


def test_the_order_of_a_list_counts():
    assert sha256_data([1, 2]) != sha256_data([2, 1])


def test_the_text_is_fixed():
    assert canonical_json({"b": [1, 2.5, None, True], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null,true]}'
    assert sha256_data({}) == hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused(number):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": [number]})


def test_other_objects_are_refused():
    with pytest.raises(TypeError):
        canonical_json({"a": object()})


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_hashes_as_its_bytes(tmp_path, size):
    data = bytes(i % 251 for i in range(min(size, 1000))) * (size // 1000 + 1)
    (tmp_path / "f").write_bytes(data[:size])
    assert sha256_file(tmp_path / "f") == sha256_bytes(data[:size]) == hashlib.sha256(data[:size]).hexdigest()


def test_sources_count_by_name_and_content_and_compiled_files_do_not(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    before = sha256_sources(tmp_path, ["a", "b.py"])
    (tmp_path / "a/__pycache__").mkdir()
    (tmp_path / "a/__pycache__/x.pyc").write_text("compiled")
    (tmp_path / "c.py").write_text("not named")
    assert sha256_sources(tmp_path, ["b.py", "a"]) == before
    (tmp_path / "a/x.py").write_text("1 ")
    changed = sha256_sources(tmp_path, ["a", "b.py"])
    assert changed != before
    (tmp_path / "a/x.py").write_text("1")
    (tmp_path / "a/x.py").rename(tmp_path / "a/y.py")
    assert sha256_sources(tmp_path, ["a", "b.py"]) not in (before, changed)
