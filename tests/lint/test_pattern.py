"""The pattern language: conditions, nodes that patterns are met by, and mistakes in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from edgeattn.core.errors import UsageError
from edgeattn.lint import RuleBook
from edgeattn.lint.graph import parts_of
from edgeattn.lint.match import detail, holds
from edgeattn.lint.pattern import Condition, Pattern
from edgeattn.lint.rules import within
from tests.lint.test_rules import CASES, IDS, SIN, TOKENS, X, do, program

NUMBERS = st.integers(-50, 50) | st.floats(-50, 50)


@given(NUMBERS, NUMBERS)
def test_bounds_are_what_they_say(value: float, bound: float) -> None:
    assert Condition(min=bound).holds(value) == (value >= bound)
    assert Condition(max=bound).holds(value) == (value <= bound)
    assert Condition(above=bound).holds(value) == (value > bound)
    assert Condition(below=bound).holds(value) == (value < bound)
    assert Condition(min=bound, max=bound).holds(value) == Condition(equals=bound).holds(value)


@given(st.lists(NUMBERS, min_size=1, max_size=4), NUMBERS)
def test_of_a_list_one_number_is_enough(values: list[float], bound: float) -> None:
    assert Condition(above=bound).holds(values) == any(value > bound for value in values)


@given(st.one_of(st.none(), st.text(), st.booleans()))
def test_what_is_no_number_is_within_no_bounds(value: Any) -> None:
    assert not Condition(min=-1e9).holds(value)
    assert not Condition(max=1e9).holds(value)


@given(st.sampled_from([True, False, 0, 1, 0.0, 1.0, "1", "true"]))
def test_a_plain_value_stands_for_equals(value: Any) -> None:
    condition = Condition.model_validate(value)
    assert condition == Condition(equals=value)
    assert condition.holds(value)
    assert Condition(one_of=[value]).holds(value)
    assert not condition.holds(None)
    assert isinstance(value, bool) or not condition.holds(bool(value))


KINDS = st.fixed_dictionaries({}, optional={"rank": st.integers(0, 6), "dtype": st.sampled_from(["float*", "int64"])})
PATTERNS = st.recursive(
    st.fixed_dictionaries(
        {"op": st.sampled_from(["*", "sin", "m?l", "linear", "nothing"])}, optional={"output": KINDS.filter(bool)}
    ),
    lambda inner: st.fixed_dictionaries(
        {"op": st.just("*")}, optional=dict.fromkeys(("before", "after", "unless"), inner)
    ),
    max_leaves=4,
)
MADE = program((nn.Sequential(nn.Linear(16, 4), nn.Softmax(-1)), (TOKENS,)))


@given(PATTERNS)
def test_a_pattern_and_its_exception_part_all_nodes(data: dict[str, Any]) -> None:
    """What a pattern is met by, ``unless`` of it is not; one of ``any`` is as good as the pattern."""
    pattern = Pattern.model_validate(data)
    (part,) = parts_of(MADE.entries["main"])
    for node in part.nodes():
        met = holds(pattern, node, part)
        assert met != holds(Pattern.model_validate({"unless": data}), node, part)
        assert met == holds(Pattern.model_validate({"any": [{"op": "nothing"}, data]}), node, part)


@given(PATTERNS, st.sampled_from(["opp", "inputt", "befor", "x"]))
def test_an_unknown_key_is_an_error_wherever_it_stands(data: dict[str, Any], key: str) -> None:
    for wrong in ({**data, key: 1}, {"before": {**data, key: 1}}, {"op": "*", "input": {key: 1}}):
        with pytest.raises(ValidationError, match=key):
            Pattern.model_validate(wrong)


MET = [
    ({"op": "input", "output": {"rank": 3}}, SIN, 1),
    ({"op": "input", "output": {"dtype": ["int*"]}}, do(lambda i: i + 1, IDS), 1),
    ({"op": "input", "output": {"dtype": "float32", "sizes": {"-1": 16}}}, SIN, 1),
    ({"op": "sin", "output": {"largest": {"above": 16}}}, SIN, 0),
    ({"op": "sin", "after": {"op": "output"}}, SIN, 1),
    ({"op": "linear", "other": {"constant": True}}, (nn.Linear(16, 4), (TOKENS,)), 1),
    ({"op": "linear", "other": {"constant": False}}, (nn.Linear(16, 4), (TOKENS,)), 0),
    ({"op": "conv2d", "args": {"groups": {"given": False}}}, (nn.Conv2d(4, 4, 3), (X,)), 1),
    ({"op": "conv2d", "args": {"bias": {"given": True}}}, (nn.Conv2d(4, 4, 3, bias=False), (X,)), 0),
    ({"op": "conv2d", "args": {"groups": {"one_of": [1, 2]}}}, (nn.Conv2d(4, 4, 3), (X,)), 1),
    ({"op": "mul", "same": True}, do(lambda x: x * x), 1),
    ({"op": "mul", "same": True}, do(lambda x: x * 2.0), 0),
    ({"op": "sum", "before": {"op": "sin"}}, do(lambda x: x.sin().transpose(1, 2).sum()), 1),
    ({"op": "sum", "before": {"op": "sin"}}, do(lambda x: x.sin().mul(2.0).sum()), 0),
    ({"op": "sum", "before": {"op": "sin"}, "through": "pointwise"}, do(lambda x: x.sin().mul(2.0).sum()), 1),
    ({"op": "sum", "before": {"op": "sin"}, "through": "nothing"}, do(lambda x: x.sin().transpose(1, 2).sum()), 0),
    ({"op": "cond"}, CASES["branch"][0], 1),
    ({"op": "sub"}, CASES["branch"][0], 1),
]


@pytest.mark.parametrize(("data", "case", "count"), MET, ids=[str(i) for i in range(len(MET))])
def test_what_a_pattern_is_met_by(data: dict[str, Any], case: Any, count: int) -> None:
    pattern = Pattern.model_validate(data)
    nodes = [(node, part) for part in parts_of(program(case).entries["main"]) for node in part.nodes()]
    met = [node for node, part in nodes if holds(pattern, node, part)]
    assert len(met) == count
    assert all(detail(pattern, node) for node in met)


def test_a_dimension_that_varies() -> None:
    rows = {"inputs": ({1: torch.export.Dim("rows", min=2, max=64)},)}
    for made, dynamic in ((program(SIN, dynamic_shapes=rows), True), (program(SIN), False)):
        (part,) = parts_of(made.entries["main"])
        pattern = Pattern.model_validate({"op": "input", "output": {"dynamic": True}})
        assert next(holds(pattern, node, part) for node in part.nodes()) == dynamic


RULE = '[rules.mine]\nseverity = "note"\nwhat = "w"\nevidence = "e"\nmend = "m"\n'


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('pattern = { opp = "x" }', "rules.mine.pattern.opp: unknown key; did you mean 'op'?"),
        ('sevrity = "note"\npattern = { op = "x" }', "rules.mine.sevrity: unknown key; did you mean 'severity'?"),
        ("pattern = {}", "a pattern without conditions"),
        ('pattern = { op = "x", input = {} }', "nothing is asked of the tensor"),
        ('pattern = { op = "x", args = { dim = {} } }', "an empty condition"),
        ('pattern = { op = "x", through = "walls" }', "'views', 'pointwise' or 'nothing'"),
        ('pattern = { op = "x", output = { sizes = { last = 1 } } }', "an axis is a whole number in quotes"),
        ('pattern = { op = "x" }\nversions = { torch = "2.1" }', "'2.1' is no bound"),
        ("", "there is no code that would find it"),
        ('pattern = { op = "x" }\nfix = "gqa"', "fix = 'gqa'"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path: Path, more: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RULE + more)
    with pytest.raises(UsageError) as caught:
        RuleBook(path, users=True)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=3), st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_versions_compare_as_numbers(a: list[int], b: list[int]) -> None:
    own, other = (".".join(map(str, numbers)) for numbers in (a, b))
    first, second = (numbers + [0] * (3 - len(numbers)) for numbers in (a, b))
    assert within(own, f">={other}") == (first >= second)
    assert within(own, f"<{other}") == (first < second)
    assert within(own, f"=={other}") == (first == second)
    assert within(f"{own}+cpu", f">={other},<{other}") is False


def test_a_rule_of_another_version_is_a_note_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RULE.replace("note", "error") + 'pattern = { op = "x" }\nversions = { numpy = ">=1.0,<2" }')
    book = RuleBook(path, users=True)
    for version, severity, detail_ in (
        ("1.26.4", "error", "d"),
        (None, "error", "d"),
        ("2.0", "note", "d; measured with numpy >=1.0,<2, 2.0 is installed"),
    ):
        monkeypatch.setattr("edgeattn.core.tools.version", lambda name, version=version: version)
        found = book.finding("mine", "m", "d")
        assert (found.severity, found.detail) == (severity, detail_)
