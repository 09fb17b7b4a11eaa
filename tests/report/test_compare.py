"""``edgeattn compare``: which records are a pair, what is said of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeattn.core.errors import UsageError
from edgeattn.profile.record import Breakdown, Latency, Operation, Record
from edgeattn.report.records import compare as module
from edgeattn.report.records.compare import Comparison, compare, lines
from edgeattn.report.records.compare_html import page
from tests.report.making import latency, realistic, record
from tests.report.test_report import run, saved


@dataclass(frozen=True)
class Ratio:
    value: float
    low: float
    high: float
    confidence: float


@pytest.fixture(autouse=True)
def _simple_ratio(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bootstrap, but in the test of it."""
    if request.node.name.startswith("test_the_real"):
        return

    def simple(a: Latency, b: Latency) -> Ratio:
        value = b.p50 / a.p50
        return Ratio(value, value * 0.99, value * 1.01, 0.95)

    monkeypatch.setattr(module, "ratio", simple)


def later(given: Record, **update: Any) -> Record:
    return given.model_copy(update={"created": "2026-11-26T09:30:00Z", **update}).sealed()


def slower(given: Record, factor: float) -> Record:
    assert given.latency is not None
    ops = tuple(
        op.model_copy(update={"ms": (op.ms or 0.0) * (factor if "qkv" in op.module else 1)})
        for op in given.breakdown.operations
    )
    made = latency(given.latency.p50 * factor, 3)
    return later(given, latency=made, breakdown=given.breakdown.model_copy(update={"operations": ops}))


def test_records_of_the_same_thing_are_pairs() -> None:
    before = realistic()
    after = [slower(r, 1.5) if r.latency else later(r) for r in reversed(before)]
    found = compare(before, after)
    assert [(p.a.id, p.b.subject) for p in found.pairs] == [(r.id, r.subject) for r in before]
    assert all(p.p50_ratio == pytest.approx(1.5, rel=0.02) for p in found.pairs[:-1])
    assert found.pairs[-1].p50_ratio == 1.0
    assert found.pairs[-1].ratio is None
    assert "the ratio is of two uncalibrated estimates" in found.pairs[-1].notes
    assert (found.only_a, found.only_b, found.older) == ([], [], 0)


def test_threads_batch_and_entry_keep_records_apart() -> None:
    before = [record(threads=1), record(threads=4), record(batch=8), record(entry="decode")]
    found = compare(before, [record(6.0, threads=4), record(6.0, batch=8), record(6.0, threads=2)])
    assert [(p.a.settings.threads, p.a.settings.batch) for p in found.pairs] == [(4, 1), (4, 8)]
    assert {r.label for r in found.only_a} == {before[0].label, before[3].label}
    assert [r.settings.threads for r in found.only_b] == [2]


def test_bundles_of_a_model_are_told_apart_by_name_and_paired_without_it() -> None:
    plain, even = record(bundle="a.onnx.fp32"), record(bundle="b.onnx.fp32")
    assert len(compare([plain, even], [even, plain]).pairs) == 2
    assert len(compare([plain], [even, record(target="tflite")]).pairs) == 1


def test_the_newest_of_the_same_thing_counts() -> None:
    old, new = record(9.0, created="2026-01-01T00:00:00Z"), record(5.0)
    found = compare([new, old], [record(5.0, 3)])
    assert found.pairs[0].a.id == new.id
    assert found.older == 1


def test_single_records_are_a_pair_whatever_they_are() -> None:
    found = compare([record()], [record(2.0, precision="w8a8")])
    assert found.pairs[0].label == (
        "fmvit-s.onnx.fp32, 4 threads on raspberry-pi-5 → fmvit-s.onnx.w8a8, 4 threads on raspberry-pi-5"
    )
    with pytest.raises(UsageError, match="no record of A has its like in B") as caught:
        compare([record(), record(device="c")], [record(2.0, precision="w8a8")])
    assert "A: fmvit-s.onnx.fp32, 4 threads on c" in caught.value.details


def test_other_places_are_refused_and_named() -> None:
    there = record(cpu="Cortex-A72", system="Debian 13", fingerprint="other")
    with pytest.raises(UsageError) as caught:
        compare([record()], [there])
    assert caught.value.why == "cpu: Cortex-A76 and Cortex-A72; system: Debian 12, Linux 6.6 and Debian 13"
    assert "--across" in str(caught.value.fix)
    pair = compare([record()], [there], across=True).pairs[0]
    assert pair.across
    assert pair.notes[0] == "different places (cpu, system)"


def test_across_pairs_devices() -> None:
    before = [record(), record(target="tflite")]
    after = [record(device="raspberry-pi-4", target="tflite"), record(device="raspberry-pi-4")]
    with pytest.raises(UsageError, match="no record of A"):
        compare(before, after)
    found = compare(before, after, across=True)
    assert [(p.a.subject.target, p.b.subject.target) for p in found.pairs] == [("onnx", "onnx"), ("tflite", "tflite")]
    assert all(p.across for p in found.pairs)


def test_another_runtime_on_the_same_machine_is_said() -> None:
    pair = compare([record()], [record(runtime="onnx 1.23")]).pairs[0]
    assert pair.differs == [("runtime", "onnx 1.22", "onnx 1.23")]
    assert not pair.across


def test_flags_of_both_are_said() -> None:
    pair = compare([record(flags=("throttled: hot",))], [record(partial="killed", weights="random")]).pairs[0]
    assert pair.notes[:2] == ["A: throttled: hot", "B: partial: killed"]
    assert "B: random weights" in pair.notes[2] or "the weights are random" in pair.notes[2]


def test_measured_against_estimated_has_no_ratio() -> None:
    pair = compare([record()], [record(None)], across=True).pairs[0]
    assert pair.p50_ratio is None
    assert "they have no ratio" in pair.notes[-1]


def test_changes_are_by_module_with_the_largest_first() -> None:
    def ops(**ms: float) -> Breakdown:
        return Breakdown(operations=tuple(Operation(name=n, module=n.split("_")[0], ms=v) for n, v in ms.items()))

    a, b = record(breakdown=ops(a_1=1.0, a_2=2.0, b=5.0, gone=1.0)), record(breakdown=ops(a_3=3.5, b=3.0, new=0.2))
    pair = compare([a], [b]).pairs[0]
    assert [(x.module, x.a, x.b) for x in pair.changes] == [
        ("b", 5.0, 3.0),
        ("gone", 1.0, None),
        ("a", 3.0, 3.5),
        ("new", None, 0.2),
    ]
    assert compare([a], [record()]).pairs[0].changes == []


def test_lines_have_sizes_memory_accuracy_and_numerics() -> None:
    b = record(6.0, accuracy=0.96, size_mb=12.35, worst_relative_l2=6.2e-6)
    found = {line.name: (line.a_text, line.b_text, line.change) for line in lines(compare([record()], [b]).pairs[0])}
    assert found["size"] == ("24.7", "12.3", "0.500x")
    assert found["top-1 accuracy"] == ("96.94%", "96.00%", "-0.94 points")
    assert found["rel. L2, golden"] == ("3.1e-06", "6.2e-06", "2.000x")
    assert found["p50"][2].count("x") == 3
    assert "peak, device" not in found


def test_the_real_ratio_is_of_the_kept_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = record(4.0, 1), record(5.0, 2)
    files = saved(tmp_path / "a.json", [a]), saved(tmp_path / "b.json", [b])
    assert run("compare", *files, "--json") == 0
    found = json.loads(capsys.readouterr().out)["pairs"][0]["ratio"]
    assert found["low"] <= found["p50"] <= found["high"]
    assert found["p50"] == pytest.approx(1.25, rel=0.02)


def test_the_terminal_says_what_a_ratio_is_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = realistic()
    files = saved(tmp_path / "a.json", before), saved(tmp_path / "b.json", [slower(r, 1.5) for r in before[:-1]])
    assert run("compare", *files, "-o", str(tmp_path / "compare.html")) == 0
    shown = capsys.readouterr().out
    assert "1.5" in shown
    assert "edgeattn profile A B" in shown
    assert "stages.0.0.token_mixer.qkv" in shown
    assert "A: throttled: soft temperature limit" in shown
    assert "only in A: fmvit-s.tensorrt.fp16 on jetson-orin-nano" in shown
    assert "plotly.js v" in (tmp_path / "compare.html").read_text()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.json", [record()])
    b = saved(tmp_path / "b.json", [record(cpu="Cortex-A72", fingerprint="x")])
    assert run("compare", a, b) == 2
    assert "cpu: Cortex-A76 and Cortex-A72" in capsys.readouterr().err
    assert run("compare", a, b, "--across") == 0
    assert "different places (cpu)" in capsys.readouterr().out
    assert run("compare", a, a, "-o", str(tmp_path / "c.md")) == 2
    assert "c.html" in capsys.readouterr().err
    assert run("compare", a, str(tmp_path / "none.json")) == 2


def test_markup_of_names_is_not_read_in_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = record(model="[red]x[/red]", flags=("[bold]hot[/bold]",))
    file = saved(tmp_path / "a.json", [odd])
    assert run("compare", file, file) == 0
    shown = capsys.readouterr().out
    assert "[red]x[/red].onnx.fp32" in shown
    assert "[bold]hot[/bold]" in shown


def test_the_page_says_across_and_drift() -> None:
    found = compare([record()], [record(device="b", fingerprint="x")], across=True)
    made = page(found)
    assert made.notes[0].startswith("Across places")
    assert "drift" in made.notes[1] or "separate sessions" in made.notes[1]
    assert "rest" not in [s.id for s in made.sections]
    assert isinstance(found, Comparison)
