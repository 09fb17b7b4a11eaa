"""Many tasks at once: what a task is, what comes of it, and an executor that gives each a process of its own.

Tasks and results are plain data, and a task is known by its key alone: another engine that runs them on other machines
is another ``Executor``.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from edgeattn.core.errors import ConversionFailed, Crashed, UsageError
from edgeattn.core.files import remove
from edgeattn.pipeline import child, machine

#: Memory in GB that a task is expected to take, until one has been seen to take more.
EACH_GB = 2.0
#: How often a task is started whose process dies.
ATTEMPTS = 2
#: Seconds between looks at processes that say nothing, and at the memory while a task waits for it.
_LOOK = 0.5


@dataclass(frozen=True)
class Task:
    """Something to be done.

    Attributes:
        key: SHA-256 of what it is; tasks of one key are one task.
        call: ``package.module:function``, called as ``function(argument, say)``; ``say(text)`` shows a line.
        argument: plain data that JSON can hold.
        label: for people.
    """

    key: str
    call: str
    argument: Mapping[str, Any]
    label: str = ""


@dataclass(frozen=True)
class Done:
    """What came of a task.

    Attributes:
        result: what the function returned, or None.
        error: None, or parts of an ``EdgeAttnError`` with its ``kind`` (the class) and ``exit_code``.
        seconds: wall time of the last attempt. peak_mb: resident memory of its process and of the largest that it
            started, 0 if that is not known. attempts: how often it was started.
    """

    key: str
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    seconds: float
    peak_mb: float
    attempts: int


class Watcher(Protocol):
    """What a caller sees of running tasks, from the process and thread that called ``run``."""

    def started(self, task: Task, attempt: int) -> None:
        """A task begins; ``attempt`` counts from 1."""

    def said(self, task: Task, text: str) -> None:
        """A line from inside the task."""

    def finished(self, task: Task, done: Done) -> None:
        """A task came to its end, whatever that is."""


class Executor(Protocol):
    """Runs tasks."""

    def run(self, tasks: Sequence[Task], watch: Watcher) -> dict[str, Done]:
        """Run all; results by key in the order of the tasks. A task's error is part of its ``Done``, not raised."""


class Processes:
    """An ``Executor``: a fresh process for each task, as many at once as there are cores and memory for.

    A process that dies is replaced once, with twice the memory expected. Ctrl-C ends all of them, and they end with
    this process, however that ends.

    Args:
        workers: at once, instead of what cores and memory suggest.
        memory_gb: that a task is expected to take, instead of ``EACH_GB``.

    Raises:
        UsageError: one of them is not positive.
    """

    def __init__(self, workers: int | None = None, memory_gb: float | None = None) -> None:
        for name, value in (("workers", workers), ("memory_gb", memory_gb)):
            if value is not None and not value > 0:
                raise UsageError("the number must be positive", value=value, where=name)
        self._workers = workers
        self._memory_gb = memory_gb

    def run(self, tasks: Sequence[Task], watch: Watcher) -> dict[str, Done]:
        """See ``Executor``.

        Raises:
            KeyboardInterrupt: Ctrl-C; no process is left then, and the watcher has heard of what was finished.
        """
        return _Run(tasks, watch, self._workers, self._memory_gb or EACH_GB).all()


@dataclass
class _Running:
    """A task's process. told: its last answer, once that has come."""

    task: Task
    attempt: int
    process: subprocess.Popen[str]
    answers: int
    log: IO[bytes]
    folder: Path
    begun: float
    buffer: bytearray = field(default_factory=bytearray)
    told: dict[str, Any] | None = None


class _Run:
    """One call of ``Processes.run``."""

    def __init__(self, tasks: Sequence[Task], watch: Watcher, workers: int | None, each_gb: float) -> None:
        self._order = {task.key: task for task in tasks}
        self._waiting = deque((task, 1) for task in self._order.values())
        self._watch = watch
        self._cores = machine.cores()
        self._asked = workers
        self._free_gb = machine.free_gb()
        self._each_gb = each_gb
        self._running: list[_Running] = []
        self._done: dict[str, Done] = {}
        self._selector = selectors.DefaultSelector()

    def all(self) -> dict[str, Done]:
        """Run until nothing is left."""
        try:
            while self._waiting or self._running:
                while self._waiting and self._has_room(self._waiting[0][1]):
                    self._start(*self._waiting.popleft())
                self._hear()
                for one in [r for r in self._running if r.told or r.process.poll() is not None]:
                    self._end(one)
        finally:
            for one in list(self._running):
                self._stop(one)
            self._selector.close()
        return {key: self._done[key] for key in self._order}

    @property
    def _places(self) -> int:
        return self._asked or machine.places(self._cores, self._free_gb, self._each_gb)

    def _has_room(self, attempt: int) -> bool:
        if not self._running:
            return True
        if len(self._running) >= self._places:
            return False
        free = machine.free_gb()
        return free is None or free >= self._each_gb * attempt

    def _environ(self, folder: Path) -> dict[str, str]:
        """Of a child: its folder for temporary files, and its share of the cores where it does not have them alone."""
        share = {"OMP_NUM_THREADS": str(max(1, self._cores // self._places))} if self._places > 1 else {}
        return {"TMPDIR": str(folder)} | ({} if os.environ.get("OMP_NUM_THREADS") else share)

    def _start(self, task: Task, attempt: int) -> None:
        # Before the process: whoever watches may take its time.
        self._watch.started(task, attempt)
        folder = Path(tempfile.mkdtemp(prefix="edgeattn-task-"))
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in _stop)
        process, answers = child.start(child.__name__, log, self._environ(folder))
        os.set_blocking(answers, False)
        one = _Running(task, attempt, process, answers, log, folder, time.perf_counter())
        self._running.append(one)
        self._selector.register(answers, selectors.EVENT_READ, one)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps({"call": task.call, "argument": dict(task.argument)}) + "\n")
            process.stdin.flush()

    def _hear(self) -> None:
        """Wait a moment for answers, and take those that came."""
        for key, _ in self._selector.select(_LOOK):
            one: _Running = key.data
            piece = os.read(one.answers, 1 << 16)
            if not piece:
                # The process ends: its code follows at once.
                self._selector.unregister(one.answers)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(timeout=_LOOK)
            self._take(one, piece)

    def _take(self, one: _Running, piece: bytes) -> None:
        one.buffer += piece
        *lines, rest = bytes(one.buffer).split(b"\n")
        one.buffer[:] = rest
        for line in lines:
            answer = json.loads(line)
            if answer["event"] == "said":
                self._watch.said(one.task, answer["text"])
            else:
                one.told = answer

    def _end(self, one: _Running) -> None:
        """Note what came of a process that has given its last answer, or died."""
        with contextlib.suppress(BlockingIOError):
            while one.told is None and (piece := os.read(one.answers, 1 << 16)):
                self._take(one, piece)  # what it still said before it died
        seconds = time.perf_counter() - one.begun
        code = one.process.poll()
        log = self._stop(one)
        result = error = None
        peak = 0.0
        if one.told is not None:
            peak = one.told["peak_mb"]
            self._each_gb = max(self._each_gb, peak / 1e3)
            result = one.told.get("result")
            if one.told["event"] == "failed":
                error = one.told["error"] or _failure(one.task, False, one.told["why"], one.told["details"])
        elif one.attempt < ATTEMPTS:
            self._waiting.appendleft((one.task, one.attempt + 1))
            return
        else:
            error = _failure(one.task, True, child.ending(code or 0), log)
        done = Done(one.task.key, result, error, seconds, peak, one.attempt)
        self._done[one.task.key] = done
        self._watch.finished(one.task, done)

    def _stop(self, one: _Running) -> list[str]:
        """End a process, whatever it does; returns the last lines that it printed."""
        self._running.remove(one)
        one.process.kill()
        one.process.wait()
        with contextlib.suppress(KeyError):
            self._selector.unregister(one.answers)
        with contextlib.suppress(OSError):
            if one.process.stdin:
                one.process.stdin.close()
        os.close(one.answers)
        with one.log as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            lines = log.read().decode("utf-8", "replace").splitlines()[-5:]
        remove(one.folder)
        return lines


def _failure(task: Task, crashed: bool, why: str, details: list[str]) -> dict[str, Any]:
    """An error that the task did not raise on purpose, as plain data."""
    kind = Crashed if crashed else ConversionFailed
    error = kind(f"{task.label or task.call} {'crashed' if crashed else 'failed'}", why=why, details=details)
    return child.as_data(error)
