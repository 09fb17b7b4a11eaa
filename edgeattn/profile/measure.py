"""Measuring: fresh processes, round by round, whose blocks of runs take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeattn.core.errors import EdgeAttnError
from edgeattn.profile.statistics import Blocks, paired_ratio, summarize
from edgeattn.profile.transports.base import Say, Transport, silent
from edgeattn.profile.transports.live import Live, Start

#: A process's blocks: how long all of them last, how long one does and of how many runs it is, and how many there are.
#: Short ones, so that neighbours meet the same machine; but of a few runs, for the first one after another process's
#: finds the caches cold.
ALL_S, BLOCK_S, RUNS, FEWEST, MOST = 0.5, 0.02, 3, 4, 24
#: A run of so many seconds fills a block by itself.
SLOW_S = 0.1
#: Rounds, without ``Effort.rounds``: of several jobs so many at least, for their ratio needs independent processes; of
#: one alone until its interval is narrow. A machine may be restless for a while: with several it goes on until their
#: ratios' intervals are narrow too.
TOGETHER, TOGETHER_MOST, ALONE, ALONE_MOST = 16, 40, 4, 12
#: Half the width of a ratio's interval that is narrow enough, as a share of it.
RATIO_WITHIN = 0.03
#: Of a backend whose processes do not take turns: they measure several units, and compile before.
WHOLE, WHOLE_TOGETHER = 1, 5
#: Jobs whose processes live at the same time, at most.
GROUP = 8
#: A machine is warm where it is so much above where it began, and no cooler than that; and how often it is looked at.
WARMER_C, WARM_C, LOOK_S = 5.0, 60.0, 2.0
#: Backends whose runner measures whole processes only.
UNPACED = ("coreml",)
#: Runs of a process whose instructions are counted.
COUNTED = 3
#: What must stay the same over the processes of a job, and how a note begins where it did not.
SAME, CHANGED = ("cpu", "cores", "machine", "system", "python", "runtime", "gpu", "driver"), "the machine changed"


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        bundle: its folder. backend: which artifact. entry: which graph.
        threads, batch: None for the runner's own choice.
        operations: a program for ``run.py --ops``, where the runtime has no profiler of its own.
    """

    bundle: Path
    backend: str
    entry: str
    threads: int | None = None
    batch: int | None = None
    operations: Path | None = None

    @property
    def words(self) -> list[str]:
        """Of ``run.py``."""
        words = ["--profile", "--backend", self.backend, "--entry", self.entry]
        words += ["--threads", str(self.threads)] if self.threads is not None else []
        return words + (["--batch", str(self.batch)] if self.batch is not None else [])


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: fresh processes of each job; None for as many as it takes.
        runs, warmup: timed runs, and runs before, of each process; None for half a second, and until stable.
        within: half the width of the median's interval that is narrow enough, as a share of it.
        limit_s: no round begins later than that; the first one always does.
        cooldown_s: how long a machine may cool down before a round, at most.
        operations: whether each operation is timed too, in a process of its own after the others.
        instructions: whether instructions are counted too, where the machine has a counter.
        enough: of several jobs that take turns, whether their blocks suffice, asked before each further round without
            ``rounds``; None for ``TOGETHER`` and ratios with narrow intervals.
    """

    rounds: int | None = None
    runs: int | None = None
    warmup: int | None = None
    within: float = 0.02
    limit_s: float = 300.0
    cooldown_s: float = 60.0
    operations: bool = True
    instructions: bool = False
    enough: Callable[[Sequence[Blocks]], bool] | None = None


@dataclass
class Measured:
    """What came of a job.

    Attributes:
        blocks: times in ms, by process and block.
        ready: what each process said when it was warm. results: what it said in the end.
        states: (second, state) of the machine.
        operations: rows of ``run_profile.each_operation``, and what measured them; empty without.
        counts: instructions of single runs, by process; None of a run that the counter missed a part of.
        notes: what a reader must know.
        failed: why the job could not be measured, or not to its end.
    """

    job: Job
    blocks: list[list[list[float]]] = field(default_factory=list)
    ready: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    states: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    operations: list[list[Any]] = field(default_factory=list)
    operations_by: str = ""
    counts: list[list[int | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: EdgeAttnError | None = None


class Session:
    """Measures jobs on a device. What was measured is in ``done`` at any time, also after an error or Ctrl-C.

    Attributes:
        stopped: why it ended early; "" where it did not.
    """

    def __init__(self, jobs: Sequence[Job], transport: Transport, effort: Effort, say: Say = silent) -> None:
        self.done = [Measured(job) for job in jobs]
        self.stopped = ""
        self._transport, self._effort, self._say = transport, effort, say
        self._begun = time.monotonic()
        self._cool: float | None = None

    @property
    def groups(self) -> list[list[Measured]]:
        """Those that take turns with each other."""
        paced = [one for one in self.done if one.job.backend not in UNPACED]
        whole = [one for one in self.done if one.job.backend in UNPACED]
        return [some[at : at + GROUP] for some in (paced, whole) for at in range(0, len(some), GROUP)]

    def run(self) -> None:
        """Measure all.

        Raises:
            DeviceUnreachable: the link is gone, with what was measured in ``done``. KeyboardInterrupt: the same.
                EdgeAttnError: nothing could be measured; a single job that cannot be is noted in its ``failed``.
        """
        bundles = list(dict.fromkeys(one.job.bundle for one in self.done))
        try:
            with self._transport.hold(bundles, self._say) as start:
                for group in self.groups:
                    self._measure(group, start)
        except KeyboardInterrupt:
            self.stopped = "stopped by the user"
            raise
        except EdgeAttnError as error:
            self.stopped = str(error)
            raise

    def _measure(self, group: list[Measured], start: Start) -> None:
        """The rounds of some jobs, then their operations."""
        number, begun = 0, time.monotonic()
        while alive := [one for one in group if one.failed is None]:
            most = self._rounds(alive)
            seconds = time.monotonic() - begun
            if number >= most or (self._effort.rounds is None and self._enough(alive, number)):
                break
            if number and seconds > self._effort.limit_s:
                note = f"stopped at the limit of {self._effort.limit_s:.0f} s, after {number} of {most} rounds"
                for one in alive:
                    one.notes.append(note)
                break
            # Each comes first as often as the others, and is behind each of the others as often.
            order = alive[number % len(alive) :] + alive[: number % len(alive)]
            whole = alive[0].job.backend in UNPACED
            words = f"round {number + 1} of {'up to ' if self._effort.rounds is None and not whole else ''}{most}"
            self._whole(order, start, words) if whole else self._round(order, start, words)
            number += 1
        for one in group if self._effort.operations else ():
            if one.failed is None and one.job.backend not in (*UNPACED, "tensorrt"):
                self._operations(one, start)

    def _rounds(self, group: list[Measured]) -> int:
        if self._effort.rounds is not None:
            return self._effort.rounds
        if group[0].job.backend in UNPACED:
            return WHOLE if len(group) == 1 else WHOLE_TOGETHER
        return ALONE_MOST if len(group) == 1 else TOGETHER_MOST

    def _enough(self, group: list[Measured], number: int) -> bool:
        """Whether one alone has an interval that is narrow enough, or several have ratios with such intervals.

        It looks at widths alone, and never at where an interval lies.
        """
        paced = group[0].job.backend not in UNPACED
        if paced and len(group) > 1 and self._effort.enough is not None:
            return self._effort.enough([one.blocks for one in group])
        if not paced or number < (ALONE if len(group) == 1 else TOGETHER):
            return False
        if len(group) == 1:
            return summarize(group[0].blocks).half_width <= self._effort.within
        ratios = [paired_ratio(group[0].blocks, other.blocks) for other in group[1:]]
        return all(ratio.high / ratio.low <= (1 + RATIO_WITHIN) ** 2 for ratio in ratios)

    def _blocks(self, ready: list[dict[str, Any]]) -> tuple[int, int, float]:
        """How many blocks the processes have, and how many runs and seconds a block at least."""
        if self._effort.runs is not None:
            return min(FEWEST, self._effort.runs), 0, 0.0
        slowest = max((each.get("warm_ms", 0.0) for each in ready), default=0.0) / 1e3
        runs = RUNS if slowest < SLOW_S else 1
        count = round(ALL_S / max(BLOCK_S, runs * slowest))
        return max(FEWEST, min(MOST, count)), runs, BLOCK_S

    def _round(self, order: list[Measured], start: Start, words: str) -> None:
        """A fresh process of each, blocks in turns; what a process measured is kept block by block."""
        lives: list[tuple[Measured, Live]] = []
        effort, warmup = self._effort, ["--warmup", str(self._effort.warmup)] if self._effort.warmup is not None else []
        try:
            for one in order:
                self._say(f"{words}: {one.job.bundle.name} warms up")
                with self._noting(one):
                    live = start(one.job.bundle, [*one.job.words, "--paced", *warmup])
                    lives.append((one, live))
                    one.ready.append(live.ready())
                    one.blocks.append([])
                    self._same_machine(one)
                    self._state(one, "before" if len(one.ready) == 1 else "during", one.ready[-1]["before"])
                    if one is order[0]:
                        self._cool_down(one, live, words)
            count, runs, seconds = self._blocks([one.ready[-1] for one, _ in lives if one.failed is None])
            for block in range(count):
                least = runs if effort.runs is None else effort.runs // count + (block < effort.runs % count)
                self._say(f"{words}, block {block + 1} of {count}{self._so_far(order)}")
                # There and back: drift within two blocks meets all alike.
                alive = [pair for pair in lives if pair[0].failed is None]
                for one, live in alive if block % 2 == 0 else reversed(alive):
                    with self._noting(one):
                        one.blocks[-1].append(live.ask("times", seconds=seconds, least=least))
            for one, live in (pair for pair in lives if pair[0].failed is None):
                with self._noting(one):
                    if effort.instructions and one.ready[-1].get("uncounted") == "":
                        one.counts.append(live.ask("counted", count=1 if runs == 1 else COUNTED))
                    self._state(one, "during", live.ask("state", state=True))
                    result = live.finish()
                    one.results.append(result)
                    self._state(one, "after", result["after"])
        finally:
            for _, live in lives:
                live.kill()
            for one in order:  # a process that was cut before its first block says nothing
                if one.blocks and not any(one.blocks[-1]):
                    one.blocks.pop()
                    one.ready.pop()

    @contextmanager
    def _noting(self, one: Measured) -> Iterator[None]:
        """A job that fails leaves the others alone, unless it is the only one or the device is gone."""
        try:
            yield
        except EdgeAttnError as error:
            if error.exit_code == 5 or len(self.done) == 1:
                raise
            one.failed = error

    def _same_machine(self, one: Measured) -> None:
        """Note it where this process is elsewhere than the job's first: a virtual machine may move, as it runs."""
        first, now = one.ready[0], one.ready[-1]
        moved = [f"{key} from {first.get(key)} to {now.get(key)}" for key in SAME if first.get(key) != now.get(key)]
        note = f"{CHANGED}: {', '.join(moved)}"
        if moved and note not in one.notes:
            one.notes.append(note)

    def _so_far(self, order: list[Measured]) -> str:
        """The medians of what was measured, for the line of progress."""
        known = [
            statistics.median(statistics.median(block) for process in one.blocks for block in process if block)
            for one in order
            if any(block for process in one.blocks for block in process)
        ]
        return f", p50 {', '.join(f'{ms:.3g}' for ms in known[:4])} ms" if known else ""

    def _state(self, one: Measured, when: str, state: dict[str, Any]) -> None:
        one.states.append((time.monotonic() - self._begun, when, state))

    def _cool_down(self, one: Measured, live: Live, words: str) -> None:
        """Wait until the machine is about as cool as before the first round, and not slowed down."""
        first = one.states[0][2]
        self._cool = first["temperature_c"] if self._cool is None else self._cool
        begun, state = time.monotonic(), one.states[-1][2]
        while (left := self._effort.cooldown_s - (time.monotonic() - begun)) > 0:
            now, cool = state["temperature_c"], self._cool
            warm = now is not None and cool is not None and now > max(cool + WARMER_C, WARM_C)
            if not warm and not slowed(state):
                return
            self._say(f"{words}: cooling down, {now if now is not None else '?'} °C")
            time.sleep(min(LOOK_S, left))
            state = live.ask("state", state=True)

    def _whole(self, order: list[Measured], start: Start, words: str) -> None:
        """A process of each after the other, where their blocks cannot take turns."""
        for one in order:
            self._say(f"{words}: {one.job.bundle.name}")
            counts = {"--runs": self._effort.runs, "--warmup": self._effort.warmup}
            more = [text for name, count in counts.items() if count is not None for text in (name, str(count))]
            live = start(one.job.bundle, [*one.job.words, *more])
            try:
                with self._noting(one):
                    result = live.finish()
                    one.results.append(result)
                    for when in ("before", "after"):
                        self._state(one, when, result[when])
            finally:
                live.kill()

    def _operations(self, one: Measured, start: Start) -> None:
        """Each operation's time, in a process of its own: a profiler slows what it measures."""
        self._say(f"{one.job.bundle.name}: each operation")
        file = one.job.operations
        words = [*one.job.words, "--runs", "1", "--warmup", "0", "--ops"]
        live = start(one.job.bundle, words, file)
        try:
            result = live.finish()
            one.operations = result.get("operations", [])
            one.operations_by = result.get("operations_by", "")
        except EdgeAttnError as error:
            if error.exit_code == 5:
                raise
            one.notes.append(f"operations could not be timed: {error.what}")
        finally:
            live.kill()


def slowed(state: dict[str, Any]) -> list[str]:
    """What a state says of being slowed down right then."""
    return [text for text in state["throttled"] or () if not text.endswith("has occurred")]
