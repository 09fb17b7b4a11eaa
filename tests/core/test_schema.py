from typing import Literal

import pytest
from pydantic import Field

from edgeattn.core import schema
from edgeattn.core.errors import UsageError


class Inner(schema.Strict):
    length: int
    names: tuple[str, ...] = ()


class Outer(schema.Strict):
    title: str
    rate: float = 1.0
    on: bool = False
    kind: Literal["big", "small"] = "big"
    inner: Inner | None = None
    many: dict[str, Inner] = Field(default_factory=dict)
    free: dict[str, object] = Field(default_factory=dict)


GOOD = {"title": "t", "inner": {"length": 1, "names": ["a", "b"]}, "many": {"x": {"length": 2}}, "free": {"k": [1, 2]}}


def refused(data: dict[str, object]) -> UsageError:
    with pytest.raises(UsageError) as caught:
        schema.validate(Outer, {**GOOD, **data}, "file.toml")
    assert caught.value.where == "file.toml"
    assert caught.value.exit_code == 2
    return caught.value


def test_arrays_become_tuples_where_tuples_are_declared_and_nowhere_else():
    outer = schema.validate(Outer, GOOD, "f")
    assert outer.inner.names == ("a", "b")
    assert outer.free == {"k": [1, 2]}
    assert schema.validate(Outer, {"title": "t", "rate": 2}, "f").rate == 2.0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"titel": 1}, "titel: unknown key; did you mean 'title'?"),
        ({"zzzz": 1}, "zzzz: unknown key; known keys here: title, rate, on, kind, inner, many, free"),
        ({"inner": {"length": 1, "nmaes": []}}, "inner.nmaes: unknown key; did you mean 'names'?"),
        ({"many": {"title": {"length": 1, "lenght": 1}}}, "many.title.lenght: unknown key; did you mean 'length'?"),
        ({"many": {"inner": {"length": 1, "lenght": 1}}}, "many.inner.lenght: unknown key; did you mean 'length'?"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_closest(data, text):
    assert refused(data).why == text


@pytest.mark.parametrize(
    ("data", "key", "value"),
    [
        ({"title": 3}, "title", "3"),
        ({"rate": "1.0"}, "rate", "'1.0'"),
        ({"rate": True}, "rate", "True"),
        ({"on": 1}, "on", "1"),
        ({"on": "true"}, "on", "'true'"),
        ({"kind": "middle"}, "kind", "'middle'"),
        ({"inner": {"length": 1.0}}, "inner.length", "1.0"),
        ({"inner": {"length": "1"}}, "inner.length", "'1'"),
        ({"inner": {"length": True}}, "inner.length", "True"),
        ({"inner": {"length": 1, "names": "ab"}}, "inner.names", "'ab'"),
        ({"inner": {"length": 1, "names": ["a", 2]}}, "inner.names.1", "2"),
        ({"many": {"x": {"length": None}}}, "many.x.length", "None"),
        ({"many": []}, "many", "[]"),
    ],
)
def test_a_bad_value_names_its_key_and_is_never_converted(data, key, value):
    why = str(refused(data).why)
    assert why.startswith(f"{key}: given {value}; ")


def test_all_mistakes_are_listed():
    error = refused({"titel": 1, "rate": "x", "inner": {}})
    assert sorted([str(error.why), *error.details]) == [
        "inner.length: missing",
        "rate: given 'x'; Input should be a valid number",
        "titel: unknown key; did you mean 'title'?",
    ]


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.toml").write_text("a = [1,\nb = 2")
    (tmp_path / "latin.toml").write_bytes(b"a = '\xff'")
    for name, word in [
        ("bad.toml", "line 2"),
        ("latin.toml", "utf-8"),
        ("none.toml", "there is no such file"),
        (".", "directory"),
    ]:
        with pytest.raises(UsageError) as caught:
            schema.read_toml(tmp_path / name)
        assert word in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_the_users_own_folder_hides_a_shipped_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEATTN_HOME", str(tmp_path))
    shipped = schema.find("recipes")
    assert "fmvit-digits" in shipped
    (tmp_path / "recipes").mkdir()
    for name in ("fmvit-digits", "mine"):
        (tmp_path / f"recipes/{name}.toml").write_text("")
    found = schema.find("recipes")
    assert found["fmvit-digits"] == tmp_path / "recipes/fmvit-digits.toml"
    assert set(found) == {*shipped, "mine"}
    assert list(found) == sorted(found)
