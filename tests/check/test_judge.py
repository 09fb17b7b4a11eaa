"""What a cell is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeattn.check.judge import findings_of, judge, locked_bytes
from edgeattn.check.lock import Entry
from edgeattn.report.checks.data import Item
from tests.check.making import FACTS, failed, finding, one, outcome

ENTRY = Entry(
    artifacts={"model.onnx": "a" * 64},
    facts={k: FACTS[k] for k in ("relative_l2", "accuracy", "size_mb", "parameters", "macs", "bytes", "nodes")},
    versions={"torch": "1"},
    machine="here",
    seconds=5.0,
    peak_mb=700.0,
)


def items(of: Any, result: dict[str, Any], locked: Entry | None = None, machine: str = "here") -> dict[str, Item]:
    found = judge(of, result, locked, machine, lambda file: file)
    assert len({item.name for item in found}) == len(found)
    return {item.name: item for item in found}


@pytest.mark.parametrize(
    ("budget", "name", "value", "words"),
    [
        ("size_mb = 1.9", "size", 2.0, "2.000 MB, allowed 1.900 MB"),
        ("parameters = 999", "parameters", 1000, "1,000, allowed 999"),
        ("nodes = 19", "nodes", 20, "20, allowed 19"),
        ("macs = 4999", "MACs", 5000, "5,000, allowed 4,999"),
        ("max_fallback = 0.2", "fallback", 0.25, "25.0%, allowed 20.0%"),
        ("export_memory_mb = 799.0", "export memory", 800, "800 MB, allowed 799 MB"),
    ],
)
def test_a_budget_fails_above_it_and_holds_at_it(
    budget: str, name: str, value: float, words: str, tmp_path: Path
) -> None:
    of = one(tmp_path, budget)
    item = items(of, outcome(of))[name]
    assert (item.status, item.words, item.place.line) == ("failed", words, 5)
    at = one(tmp_path, f"{budget.split(' = ')[0]} = {value}")
    assert items(at, outcome(at))[name].status == "held"
    assert name not in items(one(tmp_path), outcome(of)), "nobody asked"


def test_what_is_not_known_is_skipped_and_not_held(tmp_path: Path) -> None:
    of = one(tmp_path, "max_fallback = 0.5\naccuracy_drop = 0.1\npeak_memory_mb = 9.0")
    found = items(of, outcome(of, fallback=None, accuracy=None, run_mb=None))
    assert {found[name].status for name in ("fallback", "accuracy", "peak memory")} == {"skipped"}
    assert items(of, outcome(of, run_mb=9.5))["peak memory"].status == "failed"


def test_an_export_that_ends_early_is_one_failure_and_the_rest_is_skipped(tmp_path: Path) -> None:
    of = one(tmp_path, "size_mb = 1.0\nnumerics = { fp32 = 1e-9 }")
    result = failed(of, "verify", what="the artifact's numbers do not hold", value="y: relative L2 0.1", fix="try")
    found = items(of, result)
    assert {name: item.status for name, item in found.items()} == {
        "numerics": "failed",
        "export": "skipped",
        "lint": "skipped",
        "size": "skipped",
    }
    assert (found["numerics"].place.line, found["numerics"].fix) == (6, "try")
    assert "relative L2 0.1" in found["numerics"].words
    converted = items(of, failed(of, "lower", "ConversionFailed"))
    assert [n for n, i in converted.items() if i.status == "failed"] == ["export"]
    scored = failed(of, "verify", what="the artifact's accuracy differs from the model's")
    assert [n for n, i in items(of, scored).items() if i.status == "failed"] == ["accuracy"]


def test_lint_fails_at_its_level_and_is_the_only_failure(tmp_path: Path) -> None:
    ended = one(tmp_path)
    result = failed(ended, "lower", what="lint: a pattern") | {"lint": [finding("note"), finding("error")]}
    found = items(ended, result)
    assert [n for n, i in found.items() if i.status == "failed"] == ["lint"]
    assert found["lint"].fix == "write it otherwise"
    # Found in the artifact: the stage that would have listed it ended with it.
    late = items(ended, failed(ended, "lower", what="lint: a late pattern"))
    assert (late["lint"].status, late["lint"].words) == ("failed", "lint: a late pattern")
    # A conversion that fails beside a warning is no lint failure.
    of = one(tmp_path, 'lint = "warning"')
    both = items(of, failed(of, "lower", "ConversionFailed") | {"lint": [finding("warning")]})
    assert [n for n, i in both.items() if i.status == "failed"] == ["export", "lint"]
    for level, status in (("error", "held"), ("warning", "failed"), ("note", "failed")):
        of = one(tmp_path, f'lint = "{level}"')
        assert items(of, outcome(of) | {"lint": [finding("warning")]})["lint"].status == status


def test_findings_stand_in_the_models_source_or_at_the_model(tmp_path: Path) -> None:
    of = one(tmp_path)
    (tmp_path / "net.py").touch()
    gone, outside = finding(file="gone.py", line=8), finding(file=str(Path(__file__)), line=9)
    result = outcome(of) | {"lint": [finding(file="net.py", line=7), gone, outside, finding()], "folder": str(tmp_path)}
    inside = {str(tmp_path / "net.py"): "sub/net.py", str(tmp_path / "gone.py"): "sub/gone.py"}.get
    places = [str(found.place) for found in findings_of(of, result, inside)]
    assert places == ["sub/net.py:7", *["edgeattn.toml:1"] * 3]


def test_an_error_in_the_models_source_stands_there(tmp_path: Path) -> None:
    of = one(tmp_path)
    result = failed(of, "capture", "ConversionFailed", where="/repo/net.py:12")
    found = items(of, result)["export"]
    assert str(found.place) == "/repo/net.py:12"
    assert found.why == "/repo/net.py:12"


def test_an_error_in_a_recipe_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.toml").write_text('name = "own"\n\n[model]\nfactry = "a:b"\n')
    of = one(tmp_path)
    result = failed(of, "resolve", "UsageError", where="own.toml", why="model.factry: unknown key")
    assert str(items(of, result)["export"].place) == "own.toml:4"


def test_growth_and_time_are_held_against_the_lock(tmp_path: Path) -> None:
    of = one(tmp_path, "export_time_ratio = 1.5\n[budgets.growth]\nsize_mb = 0.1\nnodes = 0.0")
    same = items(of, outcome(of, seconds=7.0), ENTRY)
    assert {i.status for i in same.values()} == {"held"}
    more = items(of, outcome(of, size_mb=2.3, nodes=21), ENTRY)
    assert more["growth of size_mb"].words == "2.300 MB, accepted 2.000 MB, allowed 10.0% more"
    assert [n for n, i in more.items() if i.status == "failed"] == [
        "growth of size_mb",
        "growth of nodes",
        "export time",
    ]
    assert items(of, outcome(of), ENTRY, "elsewhere")["export time"].status == "skipped"
    none = items(of, outcome(of))
    assert {none[n].status for n in ("growth of size_mb", "growth of nodes", "export time")} == {"skipped"}


def test_locked_wants_the_accepted_bytes(tmp_path: Path) -> None:
    of = one(tmp_path)
    held, new = locked_bytes(of, outcome(of), ENTRY), locked_bytes(of, outcome(of), None)
    other = locked_bytes(of, outcome(of) | {"artifacts": {"model.onnx": "b" * 64}}, ENTRY)
    fewer = locked_bytes(of, outcome(of) | {"artifacts": {}}, ENTRY)
    assert [i.status if i else None for i in (held, new, other, fewer)] == ["held", "failed", "failed", "failed"]
    assert locked_bytes(of, failed(of, "lower"), ENTRY) is None
