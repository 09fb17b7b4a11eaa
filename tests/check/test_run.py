"""A run of checks: what is exported, what is kept, what is accepted. The exports are stand-ins, but for one bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeattn.bundle import Bundle
from edgeattn.check import lock as locks
from edgeattn.check.file import Wanted
from edgeattn.check.run import Asked, plan, run, work_of
from edgeattn.pipeline.executor import Done, Task, Watcher
from edgeattn.report.checks.data import Run
from tests.check.making import failed, outcome, wanted

TEXT = '[models.a]\nmodel = "fmvit-digits"\n[models.b]\nmodel = "fmvit-digits"\nargs = {{ width = 1 }}\n[budgets]\n{}\n'


class Quiet:
    """A watcher that hears nothing."""

    def started(self, task: Task, attempt: int) -> None: ...
    def said(self, task: Task, text: str) -> None: ...
    def finished(self, task: Task, done: Done) -> None: ...


class Exports:
    """An executor whose exports are made by a function; it counts them."""

    def __init__(self, make: Callable[[Mapping[str, Any]], dict[str, Any] | BaseException]) -> None:
        self.make, self.ran = make, list[str]()

    def run(self, tasks: Sequence[Task], watch: Watcher) -> dict[str, Done]:
        found = {}
        for task in tasks:
            self.ran.append(task.label)
            made = self.make(task.argument)
            if isinstance(made, BaseException):
                raise made
            error = {"kind": "Crashed", "exit_code": 4, "what": "stage lower crashed", "value": None, "where": None}
            error |= {"why": "its process was ended by SIGKILL", "fix": None, "details": []}
            died = made.get("died", False)
            found[task.key] = Done(task.key, None if died else made, error if died else None, 1.0, 1.0, 1)
            watch.finished(task, found[task.key])
        return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Bundle) -> Path:
    """A folder in which a cell's key is what a file says."""
    keys = tmp_path / "keys"
    keys.write_text(digits.manifest.key)
    monkeypatch.setattr("edgeattn.check.run.planned_key", lambda cell: keys.read_text())
    return tmp_path


def check(place: Path, exports: Exports, budgets: str = "", **asked: Any) -> tuple[Run, locks.Lock | None]:
    """Run the file of two models."""
    how = Asked(place / ".edgeattn", place / "edgeattn.lock", **asked)
    return run(plan(wanted(place, TEXT.format(budgets)), how), how, exports, Quiet(), lambda text: None)


def held(place: Path, digits: Bundle, **facts: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Exports that hold, whose bundle is that of the digits."""

    def make(argument: Mapping[str, Any]) -> dict[str, Any]:
        (of,) = [w for w in wanted(place, TEXT.format("")) if w.cell.to_dict()["args"] == argument["cell"]["args"]]
        copy = Path(argument["output"]) / digits.path.name
        shutil.copytree(digits.path, copy, dirs_exist_ok=True)
        made = outcome(of, **facts) | {"cell": dict(argument["cell"]), "bundle": str(copy)}
        return made | {"digest": digits.manifest.digest, "key": digits.manifest.key}

    return make


def test_nothing_that_is_unchanged_is_made_again(place: Path, digits: Bundle) -> None:
    exports = Exports(held(place, digits))
    first, _ = check(place, exports)
    again, _ = check(place, exports)
    assert (first.held, again.held) == (True, True)
    assert exports.ran == ["a onnx fp32", "b onnx fp32"]
    assert [cell.cached for cell in again.cells] == [True, True]
    # A changed input, a bundle that lost a file, and --again are made anew.
    (place / "keys").write_text("2")
    check(place, exports)
    assert len(exports.ran) == 4
    (place / "keys").write_text(digits.manifest.key)
    check(place, exports)
    Path(again.cells[1].bundle, "model.onnx").unlink()
    check(place, exports)
    assert exports.ran[-1] == "b onnx fp32"
    count = len(exports.ran)
    check(place, exports, again=True)
    assert len(exports.ran) == count + 2


def test_a_failure_is_kept_and_what_passes_by_itself_is_not(place: Path) -> None:
    (a, _) = wanted(place, TEXT.format(""))
    kinds = {"CheckFailed": 2, "ConversionFailed": 2, "ToolchainMissing": 4, "UsageError": 4}
    for kind, count in kinds.items():
        shutil.rmtree(place / ".edgeattn", ignore_errors=True)
        key = (place / "keys").read_text()
        exports = Exports(lambda argument: failed(a, "lower", kind) | {"cell": dict(argument["cell"]), "key": key})  # noqa: B023
        for _ in range(2):
            assert not check(place, exports)[0].held
        assert len(exports.ran) == count, kind


def test_a_process_that_dies_is_a_failure_with_its_reason(place: Path) -> None:
    found, _ = check(place, Exports(lambda argument: {"died": True}))
    (item, *others) = found.cells[0].items
    assert (item.name, item.status, item.why) == ("export", "failed", "its process was ended by SIGKILL")
    assert {other.status for other in others} == {"skipped"}


def test_ctrl_c_keeps_what_is_done(place: Path, digits: Bundle) -> None:
    make = held(place, digits)
    stopped = Exports(lambda argument: KeyboardInterrupt() if argument["cell"]["args"] else make(argument))
    with pytest.raises(KeyboardInterrupt):
        check(place, stopped)
    after = Exports(make)
    assert check(place, after)[0].held
    assert after.ran == ["b onnx fp32"]


def test_accepting_shows_the_difference_and_leaves_out_what_does_not_hold(place: Path, digits: Bundle) -> None:
    found, lock = check(place, Exports(held(place, digits)), update=True)
    assert found.changes == ("a onnx fp32: new", "b onnx fp32: new")
    assert lock is not None
    locks.write(place / "edgeattn.lock", lock)
    _, same = check(place, Exports(held(place, digits, seconds=99.0)), update=True, again=True)
    assert same == lock, "other seconds of the same artifact are no news"

    make = held(place, digits, size_mb=9.0, nodes=25)

    def one_breaks(argument: Mapping[str, Any]) -> dict[str, Any]:
        broken = argument["cell"]["args"]
        return failed(wanted(place, TEXT.format(""))[1], "verify") | {"key": "1"} if broken else make(argument)

    growth = "[budgets.growth]\nnodes = 0.0"
    alone, _ = check(place, Exports(make), growth, update=True, again=True)
    assert alone.held, "what was held against the lock is accepted, and no failure"
    assert {i.words.partition(";")[2] for c in alone.cells for i in c.items if i.name == "growth of nodes"} == {
        " accepted now"
    }
    refused, _ = check(place, Exports(one_breaks), growth, again=True)
    assert [(c.suite, i.name) for c, i in refused.failures()] == [("a", "growth of nodes"), ("b", "numerics")]
    found, new = check(place, Exports(one_breaks), growth, update=True)
    assert "a onnx fp32: nodes 20 -> 25" in found.changes
    assert new is not None
    assert new.cells["a onnx fp32"].facts["nodes"] == 25
    assert new.cells["b onnx fp32"] == lock.cells["b onnx fp32"], "what does not hold stays as it was accepted"


def test_what_is_not_accepted_is_not_said_to_be(place: Path, digits: Bundle) -> None:
    found, lock = check(place, Exports(held(place, digits)), "size_mb = 1.0", update=True)
    assert not found.held
    assert (lock, found.changes) == (locks.Lock(), ())


def test_seconds_are_accepted_anew_where_they_failed_or_the_machine_is_another(place: Path, digits: Bundle) -> None:
    def accept(seconds: float) -> dict[str, Any]:
        exports = Exports(held(place, digits, seconds=seconds))
        _, lock = check(place, exports, "export_time_ratio = 2.0", update=True, again=True)
        assert lock is not None
        locks.write(place / "edgeattn.lock", lock)
        return lock.model_dump()["cells"]["a onnx fp32"]

    assert [accept(seconds)["seconds"] for seconds in (10.0, 15.0, 25.0)] == [10.0, 10.0, 25.0]
    file = place / "edgeattn.lock"
    file.write_text(file.read_text().replace('"machine": "', '"machine": "another '))
    assert accept(26.0)["seconds"] == 26.0


def test_two_files_in_one_folder_have_work_of_their_own() -> None:
    assert work_of(Path("/r/edgeattn.toml")) == Path("/r/.edgeattn")
    assert work_of(Path("/r/exports.toml")) == Path("/r/.edgeattn/exports")


def test_locked_fails_for_other_bytes(place: Path, digits: Bundle) -> None:
    _, lock = check(place, Exports(held(place, digits)), update=True)
    assert lock is not None
    locks.write(place / "edgeattn.lock", lock)
    assert check(place, Exports(held(place, digits)), locked=True)[0].held
    text = (place / "edgeattn.lock").read_text()
    (place / "edgeattn.lock").write_text(text.replace("a" * 64, "b" * 64, 1))
    found, _ = check(place, Exports(held(place, digits)), locked=True)
    assert [item.name for _, item in found.failures()] == ["locked"]


LATENCY = "[budgets.latency]\nmargin = 0.05"


def test_a_baseline_is_the_one_that_the_lock_names(
    place: Path, digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[Path, Path]] = []

    def gate(base: Path, head: Path, device: str, **words: Any) -> Any:
        measured.append((base, head))
        return Said()

    class Said:
        def as_dict(self) -> dict[str, Any]:
            ratio = {"value": 1.2, "low": 1.1, "high": 1.3}
            return {"verdict": "regress", "why": "slower", "fix": "", "ratio": ratio, "self_check": None}

    monkeypatch.setattr("edgeattn.profile.gate.gate", gate)
    real = {name: info.sha256 for name, info in digits.manifest.files.items() if name == "model.onnx"}
    make = held(place, digits)
    exports = Exports(lambda argument: make(argument) | {"artifacts": real})
    before, _ = check(place, exports, LATENCY)
    assert before.held
    assert [item.status for cell in before.cells for item in cell.items if item.name == "latency"] == ["warned"] * 2
    _, lock = check(place, exports, LATENCY, update=True)
    assert lock is not None
    locks.write(place / "edgeattn.lock", lock)
    for _ in range(2):
        after, _ = check(place, exports, LATENCY)
        assert [item.name for _, item in after.failures()] == ["latency"] * 2
    assert len(measured) == 2, "the same two on the same machine are measured once"
    assert measured[0][0] == place / ".edgeattn" / "baseline" / "a" / digits.path.name
    # Accepting anew is how a slow-down is accepted: it is not measured then.
    assert check(place, exports, LATENCY, update=True)[0].held
    data = json.loads((place / "edgeattn.lock").read_text())
    data["cells"]["a onnx fp32"]["artifacts"] = {"model.onnx": "c" * 64}
    (place / "edgeattn.lock").write_text(json.dumps(data))
    stale, _ = check(place, exports, LATENCY)
    words = [item.words for _, item in stale.warnings()]
    assert len(words) == 1
    assert "lock file" in words[0]
    # Another commit's bundles need no lock.
    check(place, exports, LATENCY, baseline=place / ".edgeattn" / "bundles", again=True)
    assert measured[-1][0] == place / ".edgeattn" / "bundles" / "b" / digits.path.name


def test_wanted_is_what_the_stand_ins_take_it_for(place: Path) -> None:
    cells: list[Wanted] = wanted(place, TEXT.format(""))
    assert [cell.cell.to_dict()["args"] for cell in cells] == [{}, {"width": 1}]
