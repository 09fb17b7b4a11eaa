"""Lines of keys in a TOML text."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.schema import lines_of

TEXT = '''# a comment
a = 1

[budgets]  # another
size_mb = 2
numerics = { fp32 = 1 }
long = [
  1,
  2,
]
# a comment
text = """
[models.fake]
"""
[models.digits]
model = "x"
[models.digits.budgets]
lint = "error"
[[cells]]
k = 1

[[cells]]
k = 2
'''


def test_every_kind_of_key_has_its_line() -> None:
    found = lines_of(TEXT)
    wanted = {
        ("a",): 2,
        ("budgets",): 4,
        ("budgets", "size_mb"): 5,
        ("budgets", "numerics", "fp32"): 6,
        ("budgets", "long"): 7,
        ("budgets", "text"): 12,
        ("models", "digits"): 15,
        ("models", "digits", "budgets", "lint"): 18,
        ("cells", 0, "k"): 20,
        ("cells", 1): 22,
        ("cells", 1, "k"): 23,
    }
    assert {path: found[path] for path in wanted} == wanted
    assert ("models", "fake") not in found


_KEY = st.text("abc-_ .#=[]\"'", min_size=1, max_size=6)
_VALUE = st.one_of(st.integers(-9, 9), st.booleans(), st.text("ab\n#=[]\"'", max_size=8), st.lists(st.integers(0, 9)))


@given(st.dictionaries(_KEY, st.dictionaries(_KEY, _VALUE, max_size=4), max_size=4), st.data())
def test_a_key_stands_where_it_was_written(tables: dict[str, dict[str, Any]], data: st.DataObject) -> None:
    lines: list[str] = []
    wanted = {}
    noise = st.lists(st.sampled_from(["", "  ", "# [x] a = 1"]), max_size=2)
    for name, table in tables.items():
        lines += data.draw(noise)
        lines.append(f"[{json.dumps(name)}]")
        wanted[(name,)] = len(lines)
        for key, value in table.items():
            lines += data.draw(noise)
            wanted[name, key] = len(lines) + 1
            if isinstance(value, list) and data.draw(st.booleans()):
                lines += [f"{json.dumps(key)} = [", *(f"  {n}, # ]" for n in value), "]"]
            else:
                lines.append(f"{json.dumps(key)} = {json.dumps(value)}")
    found = lines_of("\n".join(lines))
    assert {path: found[path] for path in wanted} == wanted
