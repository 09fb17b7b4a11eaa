"""What the benchmarks share: processes measured from outside, and ratios of interleaved rounds with their spread."""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Run:
    """Wall time in seconds and peak memory in MB of one command: resident, summed over the process and its children."""

    seconds: float
    peak_mb: float


def run(command: Sequence[str], environ: dict[str, str] | None = None) -> Run:
    """Run a command to its end; its memory is sampled every 10 ms.

    Raises:
        SystemExit: the command failed; prints what it said.
    """
    start = time.perf_counter()
    process = psutil.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in tree))
        except psutil.Error:
            pass  # a process that ended between two looks
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return Run(seconds, peak / 1e6)


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
