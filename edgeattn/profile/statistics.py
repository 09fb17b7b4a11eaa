"""What a set of timed runs says: percentiles, an interval of the median, and of the ratio of two programs.

Times of runs are not independent: those of a process share its memory layout, those of a block what else the machine
did just then. So processes are drawn, then blocks inside of them, and never single runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

#: Times in ms, by process and block.
Blocks = Sequence[Sequence[Sequence[float]]]
Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
#: Resamplings of a bootstrap, and into how many steps of equal count the times are sorted for it.
DRAWS, BINS = 2000, 400
#: Processes below which order statistics alone say too little.
FEW = 8


@dataclass(frozen=True)
class Summary:
    """Times in ms over all runs, and the bootstrap interval of their median."""

    runs: int
    mean: float
    std: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    @property
    def half_width(self) -> float:
        """How far the ends of the interval are from the median at most, as a share of it."""
        return max(self.high - self.p50, self.p50 - self.low) / self.p50 if self.p50 else math.inf


def summarize(blocks: Blocks, confidence: float = CONFIDENCE, seed: int = 0) -> Summary:
    """Percentiles of all runs, and a bootstrap interval of the median.

    Raises:
        ValueError: there is no run.
    """
    times = np.array([time for process in blocks for block in process for time in block], dtype=np.float64)
    if not times.size:
        raise ValueError("there are no runs")
    p50, p90, p95, p99 = (float(value) for value in np.percentile(times, (50, 90, 95, 99)))
    low, high = _median_interval(blocks, times, confidence, seed)
    # The grid of the bootstrap is coarser than the times: the median itself is always inside.
    return Summary(
        times.size,
        float(times.mean()),
        float(times.std()),
        float(times.min()),
        float(times.max()),
        p50,
        p90,
        p95,
        p99,
        min(low, p50),
        max(high, p50),
        confidence,
    )


def _median_interval(blocks: Blocks, times: Array, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the median: as many processes are drawn as there are, then as many blocks of each."""
    grid = np.unique(np.quantile(times, np.linspace(0, 1, BINS + 1)))
    processes = [[block for block in process if len(block)] for process in blocks]
    processes = [process for process in processes if process]
    # How many runs of each block are at or below each point of the grid.
    below = [np.array([np.searchsorted(np.sort(b), grid, side="right") for b in p], float) for p in processes]
    generator = np.random.default_rng(seed)
    medians = np.empty(DRAWS)
    for draw in range(DRAWS):
        total = np.zeros(len(grid))
        for chosen in generator.integers(len(below), size=len(below)):
            counts = below[chosen]
            total += counts[generator.integers(len(counts), size=len(counts))].sum(axis=0)
        medians[draw] = grid[np.searchsorted(total, total[-1] / 2)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """How many times as long B takes as A.

    Attributes:
        value: the ratio. low, high: its interval. confidence: of that, at least.
        rounds: independent pairs that it was computed from; 0 where processes were not paired.
    """

    value: float
    low: float
    high: float
    confidence: float
    rounds: int

    def verdict(self, margin: float) -> Literal["pass", "regress", "inconclusive"]:
        """Whether B is slower than A by more than ``margin`` (0.05: five percent): with certainty, with certainty not,
        or neither. A regression below the margin passes."""
        if self.low > 1 + margin:
            return "regress"
        return "pass" if self.high <= 1 + margin else "inconclusive"


def paired_ratio(a: Blocks, b: Blocks, confidence: float = CONFIDENCE, again: Blocks | None = None) -> Ratio:
    """B's times over A's, where the blocks of process i of both took turns.

    Args:
        again: A's in further processes, which took turns with them too: B is held against the geometric mean of both.

    A pair of neighbouring blocks has met the same machine: the ratio of their medians is what is looked at. Its median
    over the blocks of a process is the process's, and processes are what the interval is over: two of their sorted
    values, one rank further out than the median's order statistics ask for, as processes of one session are not quite
    independent. That asks nothing of how they are distributed, and some may be far off. Of fewer than ``FEW`` it is
    Student's over the logarithms where that is wider.

    Raises:
        ValueError: fewer than two processes have blocks of both.
    """
    return over_rounds(paired_logs(a, b, again), confidence)


def paired_logs(a: Blocks, b: Blocks, again: Blocks | None = None) -> list[float]:
    """Of every round the logarithm of its own ratio, see ``paired_ratio``; none of a round without blocks of all."""
    logs = []
    for theirs, *ours in zip(b, a, *([] if again is None else [again]), strict=False):
        pairs = [
            _log(y) - statistics.fmean(map(_log, xs))
            for y, *xs in zip(theirs, *ours, strict=False)
            if all(map(len, (y, *xs)))
        ]
        if pairs:
            logs.append(statistics.median(pairs))
    return logs


def _log(block: Sequence[float]) -> float:
    """Of a block's median; NumPy's takes longer for so few."""
    return math.log(statistics.median(block))


def over_rounds(logs: Sequence[float] | Array, confidence: float = CONFIDENCE) -> Ratio:
    """The median of the rounds' ratios, given as logarithms, with its interval. Raises as ``paired_ratio``."""
    logs = np.asarray(logs, dtype=np.float64)
    if len(logs) < 2:
        raise ValueError("a ratio needs two pairs of processes at least")
    middle = float(np.median(logs))
    ends = _order_statistics(np.sort(logs), confidence)
    if len(logs) < FEW:
        half = _student(confidence, len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        ends = (min(middle - half, ends[0]), max(middle + half, ends[1]))
    return Ratio(math.exp(middle), math.exp(ends[0]), math.exp(ends[1]), confidence, len(logs))


def _order_statistics(values: Array, confidence: float) -> tuple[float, float]:
    """Two of the sorted values, whose interval holds the median with more than that confidence, whatever the
    distribution: a rank further out than the narrowest that does. The smallest and the largest where they are few.
    """
    count, tail, rank = len(values), 0.5 ** len(values), 0
    while rank < count // 2 and 1 - 2 * tail >= confidence:
        rank += 1  # from values[rank - 1] to its like at the other end holds it
        tail += math.comb(count, rank) * 0.5**count
    out = max(rank - 2, 0)
    return float(values[out]), float(values[count - 1 - out])


def _student(confidence: float, freedom: int) -> float:
    """Quantile of Student's distribution, two-sided.

    Found by bisection over its distribution function, which for a whole number of degrees of freedom is a finite sum
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return high


def _inside(t: float, freedom: int) -> float:
    """Probability that Student's variable is between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(0, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return sine * total


def ratio_of(a: Blocks, b: Blocks, confidence: float = CONFIDENCE, seed: int = 0) -> Ratio:
    """B's median over A's where they were measured apart: each is drawn by itself.

    What the machine did differently in the two sessions is in the ratio, and not in its interval.
    """
    ours, theirs = summarize(a, confidence, seed), summarize(b, confidence, seed + 1)
    # The two are independent: their relative deviations add up as squares do.
    down = math.hypot(math.log(theirs.p50 / theirs.low), math.log(ours.high / ours.p50))
    up = math.hypot(math.log(theirs.high / theirs.p50), math.log(ours.p50 / ours.low))
    value = theirs.p50 / ours.p50
    return Ratio(value, value * math.exp(-down), value * math.exp(up), confidence, 0)
