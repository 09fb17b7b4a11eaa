"""Latency jobs that no machine ran: the times of a gate's three programs under noise of several kinds.

A program takes 5 ms. What the machine does at a moment meets whichever program runs then, in the order in which
processes and blocks take turns; what a process is, such as where its memory lies, is its own for all of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeattn.profile.gate import LEAST, MARGIN, Verdict, judge, settled
from edgeattn.profile.measure import TOGETHER_MOST
from edgeattn.profile.statistics import over_rounds, paired_logs

Array = npt.NDArray[np.float64]
#: Of blocks a real process has up to 24.
ROUNDS, BLOCKS, PROGRAMS = TOGETHER_MOST, 16, 3


@dataclass(frozen=True)
class Noise:
    """What a machine does to times; factors are the logarithms of multipliers.

    Attributes:
        layout: scale of a process's own factor, Student's with three degrees of freedom, so that some are far off.
        slow_share, slow_by: how many processes are slow for their whole life, and by how much.
        block: scale of a block's own factor. tail: how many blocks are up to several times as long.
        drift: how much slower the machine is in the end. burst: chance that a neighbour begins at a block, to stay for
            about ``burst_blocks`` of them. turbo: by how much a clock changes that has two speeds, for a while each.
        first: how much the first program of a round is slower.
    """

    layout: float = 0.008
    slow_share: float = 0.0
    slow_by: float = 0.0
    block: float = 0.02
    tail: float = 0.01
    drift: float = 0.0
    burst: float = 0.0
    burst_blocks: float = 6.0
    turbo: float = 0.0
    first: float = 0.0


MODELS = {
    "quiet": Noise(),
    "drift": Noise(drift=0.4, first=0.03),
    "heavy tails": Noise(layout=0.012, block=0.06, tail=0.15),
    "layouts": Noise(layout=0.02, slow_share=0.1, slow_by=0.08),
    "neighbours": Noise(layout=0.01, burst=0.05, burst_blocks=8.0, block=0.04),
    "two clocks": Noise(turbo=0.25, layout=0.01),
    "all at once": Noise(0.015, 0.1, 0.08, 0.04, 0.05, 0.3, 0.04, 6.0, 0.2, 0.02),
}


def times(noise: Noise, slower: float, seed: int) -> Array:
    """Medians of blocks in ms, (program, round, block): base, base again, head, which takes ``slower`` times as long.

    ``slower`` of 1.1 is ten percent.
    """
    random = np.random.default_rng(seed)
    shape = (ROUNDS, BLOCKS, PROGRAMS)
    count = ROUNDS * BLOCKS * PROGRAMS
    # In the order of time: the programs of a block one after the other.
    moment = noise.drift * np.linspace(0, 1, count) + random.normal(0, noise.block, count)
    moment += np.where(random.random(count) < noise.tail, random.pareto(2.0, count).clip(0, 5), 0.0)
    if noise.burst:
        for begin in np.flatnonzero(random.random(count) < noise.burst / noise.burst_blocks):
            moment[begin : begin + 1 + int(random.exponential(noise.burst_blocks))] += random.uniform(0.1, 0.8)
    if noise.turbo:  # a clock stays as it is for about 40 blocks
        moment += noise.turbo * (np.cumsum(random.random(count) < 1 / 40) % 2)
    at = moment.reshape(shape)
    own = noise.layout * random.standard_t(3, (PROGRAMS, ROUNDS))
    own += np.where(random.random((PROGRAMS, ROUNDS)) < noise.slow_share, noise.slow_by, 0.0)
    logs = np.empty((PROGRAMS, ROUNDS, BLOCKS))
    for round_ in range(ROUNDS):
        order = [(round_ + place) % PROGRAMS for place in range(PROGRAMS)]
        own[order[0], round_] += noise.first
        for block in range(BLOCKS):
            turns = order if block % 2 == 0 else order[::-1]
            logs[turns, round_, block] = at[round_, block]
    logs += own[:, :, None]
    logs[2] += np.log(slower)
    made: Array = 5.0 * np.exp(logs)
    return made


def measured(noise: Noise, slower: float, seed: int, margin: float = MARGIN) -> list[list[list[list[float]]]]:
    """Blocks of one run each, of as many rounds as the gate would have measured."""
    programs = [[[[ms] for ms in process] for process in program] for program in times(noise, slower, seed).tolist()]
    base, again, head = programs
    ratios, checks = paired_logs(base, head, again), paired_logs(base, again)
    looks = (rounds for rounds in range(LEAST, ROUNDS) if settled(ratios[:rounds], checks[:rounds], margin))
    rounds = next(looks, ROUNDS)
    return [program[:rounds] for program in programs]


def job(noise: Noise, slower: float, seed: int, margin: float = MARGIN) -> Verdict:
    """One job of the gate."""
    base, again, head = measured(noise, slower, seed, margin)
    return judge(base, head, again, margin)


def bootstrap(logs: Array, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The usual paired percentile bootstrap, to be compared with: rounds are drawn anew, ratios are their medians.

    Args:
        logs: (round, block) of the logarithms of paired ratios; of a round its blocks are drawn anew as well.
    """
    random = np.random.default_rng(seed)
    rounds, blocks = logs.shape
    drawn = random.integers(rounds, size=(draws, rounds))
    inside = random.integers(blocks, size=(draws, rounds, blocks))
    medians = np.median(np.median(logs[drawn[:, :, None], inside], axis=2), axis=1)
    low, high = np.quantile(medians, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(np.exp(low)), float(np.exp(high))


def ordered(logs: Array, confidence: float = 0.95) -> tuple[float, float]:
    """The gate's own interval of the same, between two of the rounds' ratios in order."""
    ratio = over_rounds(np.median(logs, axis=1), confidence)
    return ratio.low, ratio.high


Ends = Callable[[Array], tuple[float, float]]


def coverage(ends: Ends, noise: Noise, times_: int, rounds: int = 16) -> float:
    """How many intervals of head over base hold the truth, of so many rounds each."""
    held = 0
    for seed in range(times_):
        base, again, head = np.log(times(noise, 1.0, seed)[:, :rounds])
        low, high = ends(head - (base + again) / 2)
        held += low <= 1 <= high
    return held / times_
