"""What the gate refuses to compare, what it says without measuring, and what it makes of a session."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.planted import slower
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, UsageError
from edgeattn.profile import run, statistics
from edgeattn.profile.gate import LEAST, enough, gate, judge, judge_records
from edgeattn.profile.record import Record
from edgeattn.profile.statistics import paired_ratio
from edgeattn.profile.transports.base import Say, silent
from edgeattn.profile.transports.live import Start
from tests.profile.test_measure import Scripted, ScriptedDevice, state
from tests.report.making import blocks, latency, record

PARTS = ("place", "settings")


def measured(ms: float = 5.0, seed: int = 0, **changed: Any) -> Record:
    """A record of a session of twelve rounds."""
    made = record(ms, seed, session="s1", threads=1).model_copy(update={"latency": latency(ms, seed, processes=12)})
    for part in PARTS:
        given = {k: changed.pop(k) for k in list(changed) if k in type(getattr(made, part)).model_fields}
        made = made.model_copy(update={part: getattr(made, part).model_copy(update=given)})
    return made.model_copy(update=changed).sealed()


def test_records_of_one_session_are_judged() -> None:
    base, again = measured(), measured(seed=1)
    same, slow = (judge_records(base, measured(ms, 2), again) for ms in (5.02, 5.6))
    assert (same.verdict, slow.verdict) == ("pass", "regress")
    assert slow.ratio is not None
    assert slow.ratio.low > 1.05
    assert slow.self_check is not None
    assert slow.self_check.low <= 1 <= slow.self_check.high
    assert (slow.base, slow.again) == (base, again)
    assert slow.proxies["MACs"].ratio == 1.0
    assert slow.notes == ()
    assert "which operations" in slow.fix
    assert same.fix == ""
    told = json.loads(json.dumps(slow.as_dict(), allow_nan=False))
    assert told["ratio"]["value"] == slow.ratio.value
    assert told["head"]["p50_ms"] == pytest.approx(5.6, rel=0.02)
    alone = judge_records(base, measured(5.6, 2))
    assert alone.verdict == "regress"
    assert "no self-check" in alone.notes[0]


REFUSED = [
    ({"fingerprint": "another"}, "different machines"),
    ({"fingerprint": "another", "cpu": "Cortex-A55"}, r"Cortex-A\d+, 4 cores.* / .*Cortex-A\d+, 4 cores"),
    ({"session": "s2"}, "separate sessions"),
    ({"session": ""}, "separate sessions"),
    ({"threads": 2}, "differ in threads: (1 / 2|2 / 1)"),
    ({"batch": 4}, "differ in batch"),
    ({"unit": "gpu"}, "differ in unit"),
    ({"partial": "the link was cut"}, "partial: the link was cut"),
    ({"flags": ("throttled: soft temperature limit",)}, "throttled: soft temperature limit"),
    ({"flags": ("the machine changed: cpu from A to B",)}, "machine changed: cpu from A to B"),
]


@pytest.mark.parametrize(("changed", "why"), REFUSED, ids=[why for _, why in REFUSED])
@pytest.mark.parametrize("which", ["base", "again", "head"])
def test_what_cannot_be_compared_is_refused(which: str, changed: dict[str, Any], why: str) -> None:
    names = {"base": 0, "again": 1, "head": 2}
    records = {name: measured(seed=seed, **(changed if name == which else {})) for name, seed in names.items()}
    found = judge_records(**records)
    assert found.verdict == "refused"
    assert re.search(why, found.why), found.why
    assert found.ratio is None
    assert found.fix
    assert found.records == [records["base"], records["again"], records["head"]]


def test_records_without_a_fingerprint_or_a_latency() -> None:
    nowhere = [measured(seed=seed, fingerprint="") for seed in range(2)]
    assert judge_records(*nowhere).verdict == "refused"
    with pytest.raises(UsageError, match="no latency"):
        judge_records(measured(), record(None))


def test_other_flags_are_told_and_do_not_refuse() -> None:
    found = judge_records(measured(), measured(seed=2, flags=("noisy: busy",)), measured(seed=1))
    assert found.verdict == "pass"
    assert found.notes == ("head: noisy: busy",)


def test_too_few_rounds_tell_nothing() -> None:
    one = blocks(5.0, processes=1)
    assert judge(one, one, one).verdict == "inconclusive"
    two = judge(*(blocks(5.0 * by, seed, processes=2) for seed, by in enumerate((1.0, 1.08))))
    assert two.verdict == "inconclusive"
    for margin in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="margin"):
            judge(one, one, margin=margin)


def test_it_is_enough_when_both_intervals_are_narrow() -> None:
    calm, again, wild = (blocks(5.0, s, processes=LEAST) for s in range(3))
    wild = [[[ms * (1 + 0.1 * (i % 3)) for ms in block] for block in p] for i, p in enumerate(wild)]  # type: ignore[assignment]
    assert enough([calm, again, calm])
    assert not enough([calm, again, wild])
    assert not enough([calm, wild, calm])
    assert not enough([some[:-1] for some in (calm, again, calm)])
    assert not enough([calm, again, calm], margin=0.0001)


@given(st.floats(0.5, 2.0), st.floats(0.1, 10.0))
def test_a_ratio_against_two_is_of_their_geometric_mean(by: float, ms: float) -> None:
    a, again, b = ([[[ms * factor]]] * 9 for factor in (1.0, by, 3.0))
    assert paired_ratio(a, b, again=again).value == pytest.approx(3.0 / by**0.5)
    assert paired_ratio(a, b, again=a) == paired_ratio(a, b)


def test_a_head_that_crashes_in_the_middle_ends_it_with_its_error(
    digits: Bundle, ten: Path, device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = device(by=1.5)

    def ask(runner: Runner, key: str, **request: Any) -> Any:
        if runner._by > 1 and made.started > 6:
            raise CheckFailed("the runner crashed")
        return [1.0, 1.1] if key == "times" else runner._state() if key == "state" else [1] * request["count"]

    monkeypatch.setattr(Runner, "ask", ask)
    with pytest.raises(CheckFailed, match="crashed"):
        gate(digits.path, ten)
    assert made.started == 9


class Device(ScriptedDevice):
    """Runners that take as long as they are told to, on a machine that may change."""

    def __init__(self, slow: Path, by: float, cpus: Sequence[str], states: list[dict[str, Any]]) -> None:
        super().__init__(states)
        self._slow, self._by, self._cpus, self.started = slow, by, list(cpus), 0

    @contextmanager
    def hold(self, bundles: Sequence[Path], say: Say = silent) -> Iterator[Start]:
        def start(bundle: Path, arguments: Sequence[str], file: Path | None = None) -> Scripted:
            self.started += 1
            assert "--threads" in arguments
            cpu = self._cpus.pop(0) if len(self._cpus) > 1 else self._cpus[0]
            return Runner(self._states, self._by if bundle == self._slow else 1.0, cpu)

        yield start  # type: ignore[misc]


class Runner(Scripted):
    def __init__(self, states: list[dict[str, Any]], by: float, cpu: str) -> None:
        super().__init__(states)
        self._by, self._cpu = by, cpu

    def ready(self) -> dict[str, Any]:
        about = {"cpu": self._cpu, "cores": 4, "machine": "aarch64", "system": "Linux 6", "uncounted": ""}
        return {**super().ready(), **about}

    def ask(self, key: str, **request: Any) -> Any:
        if key == "counted":
            return [int(1000 * self._by)] * request["count"]
        found = super().ask(key, **request)
        return [ms * self._by for ms in found] if key == "times" else found


@pytest.fixture
def ten(digits: Bundle, tmp_path: Path) -> Path:
    return slower(digits.path, tmp_path, 0.10)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, ten: Path) -> Callable[..., Device]:
    def use(by: float = 1.0, cpus: Sequence[str] = ("A76",), states: list[dict[str, Any]] | None = None) -> Device:
        made = Device(ten, by, cpus, states or [state(45.0, [])])
        monkeypatch.setattr(run, "open_transport", lambda name: made)
        # What costs seconds and no verdict is from: this machine's bandwidth, and the interval of a single median.
        monkeypatch.setattr(run, "roofs_of", lambda *_: {})
        monkeypatch.setattr(statistics, "DRAWS", 20)
        return made

    return use


def test_a_session_has_three_processes_a_round(digits: Bundle, ten: Path, device: Callable[..., Device]) -> None:
    made = device(by=1.10)
    found = gate(digits.path, ten)
    assert found.verdict == "regress"
    assert made.started == 3 * LEAST
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(1.10)
    assert found.self_check is not None
    assert found.self_check.value == pytest.approx(1.0)
    assert {r.settings.session for r in found.records} == {found.records[0].settings.session}
    assert found.proxies["instructions"].ratio == pytest.approx(1.10)
    assert found.proxies["operations"].base == 121
    device(by=1.04)
    assert gate(digits.path, ten, rounds=3).verdict == "pass"


def test_a_machine_that_changes_in_the_middle_is_refused(
    digits: Bundle, ten: Path, device: Callable[..., Device]
) -> None:
    device(cpus=["A76"] * 14 + ["A55"])
    found = gate(digits.path, ten)
    assert found.verdict == "refused"
    assert "the machine changed: cpu from A76 to A55" in found.why
    device(cpus=["A76"] * 3 * LEAST)
    assert gate(digits.path, ten).verdict == "pass"


def test_a_throttled_session_is_refused(digits: Bundle, ten: Path, device: Callable[..., Device]) -> None:
    cool, hot = state(45.0, []), state(84.0, ["soft temperature limit"])
    device(states=[cool] * 6 + [hot] * 2 + [cool])
    found = gate(digits.path, ten, rounds=8)
    assert found.verdict == "refused"
    assert "throttled: soft temperature limit" in found.why


def test_bundles_of_the_same_bytes_pass_at_once(
    digits: Bundle, ten: Path, device: Callable[..., Device], tmp_path: Path
) -> None:
    made = device()
    copy = Path(shutil.copytree(digits.path, tmp_path / "copy" / digits.path.name))
    found = gate(digits.path, copy)
    assert (found.verdict, made.started) == ("pass", 0)
    assert found.why.startswith("same bytes")
    assert found.proxies["size"].ratio == 1.0
    assert found.records == []
    assert gate(digits.path, copy, always=True).ratio is not None
    assert made.started == 3 * LEAST
    assert gate(digits.path, ten).ratio is not None  # another runner: other bytes


def test_a_damaged_bundle_is_refused(digits: Bundle, ten: Path, device: Callable[..., Device]) -> None:
    made = device()
    with (ten / "model.onnx").open("ab") as handle:
        handle.write(b"x")
    for pair in ((digits.path, ten), (ten, digits.path)):
        found = gate(*pair)
        assert found.verdict == "refused"
        assert "model.onnx: changed" in found.why
    (ten / "manifest.json").write_text("{}")
    assert gate(digits.path, ten).verdict == "refused"
    assert made.started == 0
    with pytest.raises(UsageError, match="not a bundle"):
        gate(digits.path, ten.parent / "nothing")
    with pytest.raises(UsageError, match="unknown entry"):
        gate(digits.path, digits.path, entry="prefill")


def test_a_verdict_without_anything_is_plain_data_too() -> None:
    found = judge(*(blocks(5.0, seed, processes=1) for seed in range(2)))
    assert json.loads(json.dumps(replace(found, why="x").as_dict()))["ratio"] is None
