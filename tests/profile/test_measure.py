"""Sessions: what is kept when something goes wrong in the middle, and what the machine's state does to them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, DeviceUnreachable
from edgeattn.profile import measure, run, store
from edgeattn.profile.build import flags_of, latency_of, states_of
from edgeattn.profile.measure import Effort, Job, Measured, Session
from edgeattn.profile.record import read
from edgeattn.profile.transports.base import Found, Say, Transport, silent
from edgeattn.profile.transports.live import Live, Start
from edgeattn.profile.transports.local import Local
from edgeattn.profile.transports.ssh import Ssh
from tests.profile.sshd import Sshd

QUICK = Effort(rounds=2, runs=6, warmup=1, operations=False)


def test_bundles_take_turns_in_fresh_processes(digits: Bundle) -> None:
    job = Job(digits.path, "onnx", "main", 1)
    said: list[str] = []
    session = Session([job, job], Local(), Effort(rounds=3, runs=4, warmup=2), said.append)
    session.run()
    for one in session.done:
        assert [[len(block) for block in process] for process in one.blocks] == [[1] * 4] * 3
        assert all(ms > 0 for process in one.blocks for block in process for ms in block)
        assert [ready["warmup"] for ready in one.ready] == [2, 2, 2]
        assert {row[1] for row in one.operations} >= {"Conv", "Softmax"}
        assert "profiler" in one.operations_by
        assert [when for _, when, _ in one.states][:1] == ["before"]
        assert one.notes == []
    assert any("round 2 of 3, block 3 of 4, p50 " in line for line in said)
    assert len({id(one) for one in session.done}) == 2


def test_one_alone_is_measured_until_its_interval_is_narrow(digits: Bundle) -> None:
    session = Session([Job(digits.path, "onnx", "main", 1)], Local(), Effort(within=1.0, operations=False))
    session.run()
    assert len(session.done[0].blocks) == measure.ALONE
    late = Session([Job(digits.path, "onnx", "main", 1)], Local(), Effort(within=1e-9, limit_s=0.0, operations=False))
    late.run()
    assert len(late.done[0].blocks) == 1
    assert "stopped at the limit of 0 s" in late.done[0].notes[0]


def test_blocks_are_short_and_of_a_few_runs() -> None:
    session = Session([], Local(), Effort())
    assert session._blocks([{"warm_ms": 0.1}, {"warm_ms": 0.2}]) == (24, 3, 0.02)
    assert session._blocks([{"warm_ms": 0.1}, {"warm_ms": 20.0}]) == (8, 3, 0.02)  # 60 ms each
    assert session._blocks([{"warm_ms": 900.0}]) == (4, 1, 0.02)
    assert Session([], Local(), Effort(runs=2))._blocks([{}]) == (2, 0, 0.0)


def test_several_are_measured_until_their_ratios_are_narrow() -> None:
    def measured(spread: float) -> Measured:
        return Measured(Job(Path("b"), "onnx", "main"), [[[1.0 + spread * (i % 5)]] for i in range(16)])

    session = Session([], Local(), Effort())
    assert session._enough([measured(0.0), measured(0.005)], 16)
    assert not session._enough([measured(0.0), measured(0.05)], 16)
    assert not session._enough([measured(0.0), measured(0.0), measured(0.05)], 16)
    assert not session._enough([measured(0.0), measured(0.0)], 15)


def test_a_bundle_that_fails_leaves_the_others_alone(digits: Bundle, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(digits.path, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"nothing")
    jobs = [Job(broken, "onnx", "main", 1), Job(digits.path, "onnx", "main", 1)]
    session = Session(jobs, Local(), QUICK)
    session.run()
    assert isinstance(session.done[0].failed, CheckFailed)
    assert not session.done[0].blocks
    assert len(session.done[1].blocks) == 2
    with pytest.raises(CheckFailed, match="was changed"):
        Session(jobs[:1], Local(), QUICK).run()


def test_a_runner_that_crashes_in_the_middle_leaves_the_others_alone(digits: Bundle, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(digits.path, tmp_path / "broken"))
    source = (broken / "run_profile.py").read_text()
    count = "        execute(feeds)\n"
    assert source.count(count) == 1
    crash = f"        if len(_CALLS) > 9: os.kill(os.getpid(), 11)\n        _CALLS.append(1)\n{count}"
    (broken / "run_profile.py").write_text(
        source.replace(count, crash).replace("_SAY: list", "_CALLS = []\n_SAY: list")
    )
    run = (broken / "run.py").read_text()  # whose look at the files would find the change
    (broken / "run.py").write_text(run.replace("    check_files(manifest)\n", ""))
    jobs = [Job(broken, "onnx", "main", 1), Job(digits.path, "onnx", "main", 1)]
    session = Session(jobs, Local(), Effort(rounds=3, runs=16, warmup=1, operations=False))
    session.run()
    crashed, whole = session.done
    assert crashed.failed is not None
    assert "SIGSEGV" in str(crashed.failed.why)
    assert [len(process) for process in whole.blocks] == [4, 4, 4]
    assert 0 < sum(map(len, crashed.blocks)) < 8
    with pytest.raises(CheckFailed, match="crashed"):
        Session(jobs[:1], Local(), Effort(rounds=3, runs=16, warmup=1, operations=False)).run()


def test_bundles_take_turns_over_ssh_and_nothing_stays(server: Sshd, digits: Bundle, digits_tflite: Bundle) -> None:
    jobs = [Job(digits.path, "onnx", "main", 1), Job(digits_tflite.path, "tflite", "main", 1)]
    session = Session(jobs, Ssh(server.url, python=sys.executable), QUICK)
    session.run()
    assert [len(one.blocks) for one in session.done] == [2, 2]
    assert [sum(map(len, one.blocks[0])) for one in session.done] == [6, 6]
    assert server.left() == []


def test_a_cut_link_keeps_what_was_measured(server: Sshd, digits: Bundle) -> None:
    def say(text: str) -> None:
        if text.startswith("round 3 of 9, block 3"):
            server.stop()

    job = Job(digits.path, "onnx", "main", 1)
    effort = Effort(rounds=9, runs=80, warmup=1, operations=False)
    session = Session([job], Ssh(server.url, python=sys.executable), effort, say)
    with pytest.raises(DeviceUnreachable):
        session.run()
    assert [len(process) for process in session.done[0].blocks] == [4, 4, 2]
    assert "cut" in session.stopped
    for _ in range(100):
        if not server.left():
            break
        time.sleep(0.1)
    assert server.left() == []


def interrupted(words: list[str], environ: dict[str, str], act: Any, wait: float) -> tuple[int, str, str]:
    """Run the command line, and do something to it after its first runs."""
    command = [sys.executable, "-m", "edgeattn", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
    )
    time.sleep(wait)
    assert process.poll() is None, process.communicate()
    act(process)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


def test_the_command_keeps_a_partial_record_when_the_link_is_cut(server: Sshd, digits: Bundle, tmp_path: Path) -> None:
    home = {"EDGEATTN_HOME": str(tmp_path / "own"), "HOME": str(server.home)}
    added = [sys.executable, "-m", "edgeattn", "device", "add", "bench", server.url, "--python", sys.executable]
    subprocess.run(added, check=True, env={**os.environ, **home}, capture_output=True)
    file = tmp_path / "r.json"
    words = ["profile", str(digits.path), "-d", "bench", "--rounds", "500", "--no-ops", "-o", str(file)]
    code, out, errors = interrupted(words, home, lambda _: server.stop(), 12)
    assert code == 5, errors
    assert "Traceback" not in errors
    assert "kept: fmvit-digits.onnx.fp32" in errors
    (record,) = read(file)
    assert "cut" in record.partial
    assert record.latency is not None
    assert record.latency.runs > 0
    assert "partial" in out
    assert store.find(file=tmp_path / "own" / "history.sqlite") == [record]


def test_the_command_keeps_what_it_measured_when_it_is_stopped(
    digits: Bundle, digits_tflite: Bundle, tmp_path: Path
) -> None:
    home = {"EDGEATTN_HOME": str(tmp_path / "own")}
    file = tmp_path / "r.json"
    words = ["profile", str(digits.path), str(digits_tflite.path), "--rounds", "500", "-o", str(file)]
    code, out, errors = interrupted(words, home, lambda process: process.send_signal(signal.SIGINT), 12)
    assert code == 130, errors
    assert "Traceback" not in errors
    records = read(file)
    assert {record.subject.target for record in records} == {"onnx", "tflite"}
    assert all(record.partial == "stopped by the user" for record in records)
    assert all(record.latency and record.latency.runs > 0 for record in records)
    assert "fmvit-digits.tflite.fp32" in out
    assert {r.id for r in store.find(file=tmp_path / "own" / "history.sqlite")} == {r.id for r in records}


def test_an_interrupt_that_a_library_swallows_stops_it_all_the_same(digits: Bundle) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("round 2 of 500, block 2"):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    effort = Effort(rounds=500, runs=8, warmup=1, operations=False)
    outcome = run.measure([Job(digits.path, "onnx", "main", 1)], "local", effort, say)
    assert isinstance(outcome.stopped, KeyboardInterrupt)
    (record,) = outcome.records
    assert record.partial == "stopped by the user"
    assert record.latency is not None
    assert [len(process) for process in record.latency.blocks] == [4, 2]
    assert said[-1].startswith("round 2 of 500, block 2")


class Scripted(Live):
    """A runner on a device that can't be here: a Raspberry Pi that gets hot. How a real one behaves stays unproven."""

    where = "scripted"

    def __init__(self, states: list[dict[str, Any]]) -> None:
        self._states = states

    def _state(self) -> dict[str, Any]:
        return self._states.pop(0) if len(self._states) > 1 else self._states[0]

    def ready(self) -> dict[str, Any]:
        about = {
            "warm_ms": 1.0,
            "first_ms": 3.0,
            "load_ms": 4.0,
            "warmup": 5,
            "warm": True,
            "clock_ms": 1e-4,
            "before": self._state(),
        }
        return {**about, "threads": 4, "backend": "onnx", "runtime": "onnxruntime 1"}

    def ask(self, key: str, **request: Any) -> Any:
        return self._state() if key == "state" else [1.0, 1.1]

    def finish(self) -> dict[str, Any]:
        return {"peak_rss_mb": 10.0, "after": self._state()}

    def line(self) -> str:
        raise NotImplementedError

    def send(self, text: str) -> None:
        raise NotImplementedError

    def ended(self) -> tuple[int, str, str]:
        raise NotImplementedError

    def kill(self) -> None:
        pass


class ScriptedDevice(Transport):
    url = "scripted"

    def __init__(self, states: list[dict[str, Any]]) -> None:
        self._states = states

    def run(self, bundle: Path, arguments: Sequence[str], say: Say = silent) -> dict[str, Any]:
        raise NotImplementedError

    def check(self) -> list[Found]:
        raise NotImplementedError

    @contextmanager
    def hold(self, bundles: Sequence[Path], say: Say = silent) -> Iterator[Start]:
        yield lambda bundle, arguments, file=None: Scripted(self._states)


def state(celsius: float | None, throttled: list[str] | None = None, mhz: float | None = None) -> dict[str, Any]:
    about = {"clock_max_mhz": None, "throttle_count": None, "load": 0.1, "power_w": None}
    return {"temperature_c": celsius, "throttled": throttled, "clock_mhz": mhz, **about}


def scripted(
    states: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, **effort: Any
) -> tuple[Measured, list[float]]:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(measure.time, "sleep", sleep)
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    session = Session(
        [Job(Path("b"), "onnx", "main")], ScriptedDevice(states), Effort(**{"operations": False, **effort})
    )
    session.run()
    return session.done[0], slept


def test_a_hot_device_cools_down_before_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # before, during, after of the first round; then before of the second, and what is seen while it waits.
    states = [state(45.0), state(70.0), state(72.0), state(72.0), state(66.0), state(59.0), state(60.0)]
    one, slept = scripted(states, monkeypatch, rounds=2, runs=2)
    assert slept == [measure.LOOK_S] * 2
    assert len(one.blocks) == 2
    one, slept = scripted([state(45.0), state(80.0)], monkeypatch, rounds=2, runs=2, cooldown_s=5.0)
    assert sum(slept) == pytest.approx(5.0)  # not for ever
    _, slept = scripted([state(None)], monkeypatch, rounds=2, runs=2)
    assert slept == []


def test_a_throttled_run_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [state(45.0, [], 1500.0), state(84.0, ["throttled", "under-voltage has occurred"], 1000.0)]
    one, slept = scripted(states, monkeypatch, rounds=1, runs=2)
    flags = flags_of(one, latency_of(one.blocks, one.ready))
    assert any(flag == "throttled: throttled" for flag in flags)
    assert [s.when for s in states_of(one)] == ["before", "during", "after"]
    assert sum(slept) == 0
    calm, _ = scripted([state(45.0, ["throttled has occurred"], 1500.0)], monkeypatch, rounds=2, runs=2)
    assert flags_of(calm, latency_of(calm.blocks, calm.ready)) == ()
    falling = [state(45.0, None, 1500.0), state(50.0, None, 1500.0), state(50.0, None, 1100.0)]
    slow, _ = scripted(falling, monkeypatch, rounds=1, runs=2)
    assert "the clock fell from 1500 to 1100 MHz" in flags_of(slow, latency_of(slow.blocks, slow.ready))


def test_drift_and_noise_are_flagged() -> None:
    ready = [{"warmup": 9, "warm": False, "first_ms": 1.0, "load_ms": 1.0, "clock_ms": 0.0}]
    one = Measured(Job(Path("b"), "onnx", "main"), states=[(0.0, "before", state(None))])
    flags = flags_of(one, latency_of([[[1.0, 1.0, 1.0, 1.0, 2.0, 2.0]]], ready))
    assert any(flag.startswith("not stable: 1 of 1") for flag in flags)
    assert any(flag.startswith("noisy") for flag in flags)
    assert json.dumps(flags)
