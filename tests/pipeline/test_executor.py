"""Tasks in processes of their own: together, killed, interrupted, and as many as the machine has room for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.errors import UsageError
from edgeattn.core.hashing import sha256_data
from edgeattn.pipeline import machine
from edgeattn.pipeline.executor import Done, Processes, Task

HERE = "tests.pipeline.deeds"


def task(name: str, /, **argument: Any) -> Task:
    return Task(sha256_data([name, argument]), f"{HERE}:{name}", argument, f"task {name}")


class Noted:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.starts: list[tuple[str, int]] = []
        self.words: list[str] = []
        self.ends: list[Done] = []

    def started(self, task: Task, attempt: int) -> None:
        self.starts.append((task.key, attempt))

    def said(self, task: Task, text: str) -> None:
        self.words.append(text)

    def finished(self, task: Task, done: Done) -> None:
        self.ends.append(done)


def test_each_task_has_a_process_and_results_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    tasks = [task("add", a=i, b=1) for i in range(4)]
    watch = Noted()
    found = Processes(workers=2).run([*tasks, tasks[0]], watch)
    assert list(found) == [t.key for t in tasks]
    assert [done.result["sum"] for done in found.values() if done.result] == [1, 2, 3, 4]
    pids = {done.result["pid"] for done in found.values() if done.result}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert watch.starts == [(t.key, 1) for t in tasks]
    assert watch.words == ["adding"] * 4
    assert {done.key for done in watch.ends} == set(found)
    assert all(done.peak_mb > 5 and done.seconds > 0 and done.attempts == 1 for done in found.values())
    assert {done.result["threads"] for done in found.values() if done.result} == {"4"}


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    tasks = [task("add", a=i, b=1) for i in range(2)]
    found = Processes(workers=2).run(tasks, Noted())
    assert [done.result["threads"] for done in found.values() if done.result] == ["3", "3"]


def test_as_many_at_once_as_were_asked_for(tmp_path: Path) -> None:
    """Each waits until the others are there too."""
    tasks = [task("meet", folder=str(tmp_path), name=str(i), expected=3) for i in range(3)]
    assert [done.error for done in Processes(workers=3).run(tasks, Noted()).values()] == [None] * 3


def test_errors_are_plain_data() -> None:
    tasks = [
        task("fail", foreseen=True),
        task("fail"),
        task("no_data"),
        Task("k", "no.such:thing", {}),
        task("nothing"),
    ]
    foreseen, sudden, no_data, no_module, no_function = Processes(workers=2).run(tasks, Noted()).values()
    assert foreseen.error == {
        "kind": "CheckFailed",
        "exit_code": 1,
        "what": "it does not hold",
        "value": "3",
        "where": "here",
        "why": None,
        "fix": None,
        "details": ["one", "two"],
    }
    for done, why in (
        (sudden, "RuntimeError: nobody foresaw this"),
        (no_data, "TypeError"),
        (no_module, "ModuleNotFoundError"),
        (no_function, "AttributeError"),
    ):
        assert done.result is None
        assert done.error is not None
        assert (done.error["kind"], done.error["exit_code"]) == ("ConversionFailed", 4)
        assert why in done.error["why"]
        assert done.attempts == 1


def test_a_killed_process_is_replaced_once(tmp_path: Path) -> None:
    once, twice, fault = (
        task("die", notes=str(tmp_path / "a"), times=1),
        task("die", notes=str(tmp_path / "b"), times=2),
        task("die", notes=str(tmp_path / "c"), times=2, signal=int(signal.SIGSEGV)),
    )
    watch = Noted()
    found = Processes(workers=2).run([once, twice, fault, task("add", a=1, b=1)], watch)
    assert found[once.key].result == {"starts": 2}
    assert found[once.key].attempts == 2
    for key, name in ((twice.key, "SIGKILL"), (fault.key, "SIGSEGV")):
        error = found[key].error
        assert error is not None
        assert (error["kind"], error["exit_code"], found[key].attempts) == ("Crashed", 4, 2)
        assert name in error["why"]
    assert (tmp_path / "b").read_text() == "xx"
    assert sorted(watch.starts).count((twice.key, 2)) == 1
    assert watch.words.count("about to die") == 6  # what was said before it died is heard
    assert len(watch.ends) == 4


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    watch = Noted()

    class Stopped(Noted):
        def said(self, task: Task, text: str) -> None:
            if text == "lingering":
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

        def finished(self, task: Task, done: Done) -> None:
            watch.finished(task, done)

    tasks = [task("add", a=1, b=1), task("linger", folder=str(tmp_path / "pids"))]
    children = set(psutil.Process().children())  # a server of other tests, say
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Processes(workers=1).run(tasks, Stopped())
    finally:
        signal.signal(signal.SIGINT, before)
    assert [done.result["sum"] for done in watch.ends if done.result] == [2]
    _all_gone(tmp_path / "pids")
    assert set(psutil.Process().children()) <= children


def _all_gone(folder: Path) -> None:
    pids = [int(pid) for path in folder.iterdir() for pid in path.name.split("-")]
    assert pids
    found = []
    for pid in pids:
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(found, timeout=10)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform != "linux", reason="a sleeping process asks the system to end it, which Linux does")
def test_all_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    code = (
        "import sys\nfrom tests.pipeline.test_executor import Noted, Processes, task\n"
        "Processes(workers=2).run([task('linger', folder=sys.argv[1], n=n) for n in (1, 2)], Noted())"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pids")], cwd=Path(__file__).parents[2])
    end = time.monotonic() + 30
    while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    process.wait()
    _all_gone(tmp_path / "pids")


def test_a_watcher_that_raises_leaves_no_process(tmp_path: Path) -> None:
    class Broken(Noted):
        def said(self, task: Task, text: str) -> None:
            raise ValueError(text)

    with pytest.raises(ValueError, match="lingering"):
        Processes(workers=1).run([task("linger", folder=str(tmp_path))], Broken())
    _all_gone(tmp_path)


@pytest.mark.parametrize("asked", [{"workers": 0}, {"workers": -1}, {"memory_gb": 0.0}])
def test_numbers_must_be_positive(asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="positive"):
        Processes(**asked)


def test_without_memory_tasks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    most = []

    class Counting(Noted):
        def started(self, task: Task, attempt: int) -> None:
            super().started(task, attempt)
            most.append(len(self.starts) - len(self.ends))

    tasks = [task("add", a=i, b=1) for i in range(3)]
    monkeypatch.setattr(machine, "free_gb", lambda: 1.0)
    assert len(Processes().run(tasks, Counting())) == 3
    assert max(most) == 1
    # Asked for by the user, but there is no room for a second one now.
    assert len(Processes(workers=3, memory_gb=1.5).run(tasks, Counting())) == 3
    assert max(most) == 1
    assert len(Processes(workers=3, memory_gb=0.1).run(tasks, Counting())) == 3
    assert max(most) > 1


@given(st.integers(1, 256), st.none() | st.floats(0, 4096), st.floats(0.01, 1024))
def test_places(cores: int, free: float | None, each: float) -> None:
    found = machine.places(cores, free, each)
    assert 1 <= found <= cores
    if free is None:
        assert found == cores
    elif found > 1:
        assert found * each <= free * (1 + 1e-9)


def test_cores_and_memory_are_those_of_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   16000000 kB\n")
    assert machine.free_gb(tmp_path) == pytest.approx(16.384)
    inner = tmp_path / "sys/fs/cgroup/jobs/mine"
    inner.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/jobs/mine\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("100000 100000\n")
    (inner / "memory.max").write_text("4000000000\n")
    (inner / "memory.current").write_text("3000000000\n")
    (inner / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    (inner.parent / "memory.max").write_text("max\n")
    (inner.parent / "memory.current").write_text("9000000000\n")
    assert machine.cores(tmp_path) == 1
    assert machine.free_gb(tmp_path) == pytest.approx(1.5)


def test_the_older_kind_of_control_group(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/a\n3:cpu,cpuacct:/a\n2:pids:/a\n")
    for name in ("memory/a", "cpu,cpuacct/a"):
        (tmp_path / "sys/fs/cgroup" / name).mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us").write_text("150000")
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us").write_text("100000")
    (tmp_path / "sys/fs/cgroup/memory/a/memory.limit_in_bytes").write_text("2000000000")
    (tmp_path / "sys/fs/cgroup/memory/a/memory.usage_in_bytes").write_text("500000000")
    assert machine.cores(tmp_path) == 1
    assert machine.free_gb(tmp_path) == pytest.approx(1.5)
    assert machine.free_gb(tmp_path / "nowhere") is None
