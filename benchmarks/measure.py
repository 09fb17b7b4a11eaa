"""What the benchmarks share: processes measured from outside, and ratios of interleaved rounds with their spread."""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


def _finish(process: psutil.Popen, command: Sequence[str]) -> None:
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said}")


def _start(command: Sequence[str], environ: dict[str, str] | None) -> psutil.Popen:
    return psutil.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def seconds(command: Sequence[str], environ: dict[str, str] | None = None) -> float:
    """Wall time of a command; nothing else runs beside it.

    Raises:
        SystemExit: the command failed; prints what it said.
    """
    start = time.perf_counter()
    process = _start(command, environ)
    _finish(process, command)
    return time.perf_counter() - start


def peak_mb(command: Sequence[str], environ: dict[str, str] | None = None) -> float:
    """Peak memory of a command: resident, summed over the process and its children, looked at every 10 ms.

    A run of its own, since looking takes time from a command that uses all cores.

    Raises:
        SystemExit: the command failed; prints what it said.
    """
    process, peak = _start(command, environ), 0
    while process.poll() is None:
        try:
            peak = max(peak, sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]))
        except psutil.Error:
            pass  # a process that ended between two looks
        time.sleep(0.01)
    _finish(process, command)
    return peak / 1e6


@dataclass(frozen=True)
class Ratio:
    """Median of the per-round ratios, with a 95 % bootstrap interval of that median and the range of the rounds."""

    median: float
    low: float
    high: float
    least: float
    most: float
    rounds: int

    def __str__(self) -> str:
        return (
            f"{self.median:.2f}x [95 % {self.low:.2f}-{self.high:.2f}], "
            f"{self.rounds} rounds {self.least:.2f}-{self.most:.2f}"
        )


def ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """ours / theirs, round by round; the samples of one round were taken next to each other."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(rounds, k=len(rounds))) for _ in range(2000))
    return Ratio(statistics.median(rounds), medians[50], medians[1949], min(rounds), max(rounds), len(rounds))
