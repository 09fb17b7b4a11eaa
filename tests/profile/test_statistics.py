"""Percentiles, the interval of a median, and ratios, against hand numbers and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgeattn.profile import statistics
from edgeattn.profile.statistics import Ratio, paired_ratio, ratio_of, summarize


def simulated(
    seed: int, *, rounds: int = 16, blocks: int = 6, runs: int = 20, slower: float = 1.0, layout: float = 0.02
):  # type: ignore[no-untyped-def]
    """Times of two programs in turns: a layout of memory for each process, and noise of a block that both meet."""
    random = np.random.default_rng(seed)
    ours, theirs = [], []
    for _ in range(rounds):
        noise = random.lognormal(0, 0.15, blocks)
        for side, factor in ((ours, 1.0), (theirs, slower)):
            own = factor * np.exp(random.standard_t(3) * layout)
            side.append([list(5.0 * own * noise[b] * random.lognormal(0, 0.05, runs)) for b in range(blocks)])
    return ours, theirs


def test_percentiles_of_hand_numbers() -> None:
    found = summarize([[[1.0, 2.0], [3.0, 4.0]], [[5.0]]])
    assert (found.runs, found.p50, found.mean, found.min, found.max) == (5, 3.0, 3.0, 1.0, 5.0)
    assert found.p90 == pytest.approx(4.6)
    assert found.std == pytest.approx(2**0.5)
    assert found.low <= 3.0 <= found.high
    with pytest.raises(ValueError, match="no runs"):
        summarize([[[]]])


@given(
    st.lists(
        st.lists(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=9), min_size=1, max_size=4), min_size=1, max_size=5
    )
)
@settings(max_examples=30, deadline=None)
def test_an_interval_holds_the_median_and_lies_within_the_times(blocks: list[list[list[float]]]) -> None:
    found = summarize(blocks)
    assert found.min <= found.low <= found.p50 <= found.high <= found.max
    assert found.p50 <= found.p90 <= found.p95 <= found.p99 <= found.max


def test_a_processs_own_shift_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    alike = [[list(random.normal(5, 0.1, 50)) for _ in range(5)] for _ in range(6)]
    shifted = [
        [[ms + shift for ms in block] for block in process] for process, shift in zip(alike, range(6), strict=True)
    ]
    assert summarize(shifted).half_width > 5 * summarize(alike).half_width


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 57])
def test_students_quantile(freedom: int) -> None:
    assert statistics._student(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_order_statistics_hold_the_median_without_a_distribution() -> None:
    values = np.arange(16.0)
    # Of 16 values the 4th and the 13th hold it with 97.9 %, the 5th and the 12th with 92.3 %; it is a rank further out.
    assert statistics._order_statistics(values, 0.95) == (2.0, 13.0)
    assert statistics._order_statistics(values, 0.90) == (3.0, 12.0)
    assert statistics._order_statistics(values[:4], 0.95) == (0.0, 3.0)  # too few: all that there is


@pytest.mark.parametrize("rounds", [2, 4, 7, 8, 16, 31])
def test_processes_that_are_far_off_leave_the_interval_valid(rounds: int) -> None:
    random = np.random.default_rng(rounds)
    held = 0
    for _ in range(200):
        logs = random.normal(0, 0.01, rounds) + np.where(random.random(rounds) < 0.15, random.normal(0, 0.1, rounds), 0)
        found = statistics.over_rounds(logs, 0.95)
        held += found.low <= 1 <= found.high
    assert held >= 0.95 * 200


def test_programs_that_are_the_same_are_told_apart_no_more_often_than_said() -> None:
    covered = sum(r.low <= 1 <= r.high for seed in range(300) for r in [paired_ratio(*simulated(seed, runs=5))])
    assert covered >= 0.95 * 300


def test_ten_percent_are_found_and_three_are_not_made_more_of_than_they_are() -> None:
    tens = [paired_ratio(*simulated(seed, slower=1.10, runs=5, layout=0.012)) for seed in range(100)]
    assert sum(r.low > 1 for r in tens) >= 95
    assert sum(r.low <= 1.10 <= r.high for r in tens) >= 93
    threes = [paired_ratio(*simulated(seed, slower=1.03, runs=5)) for seed in range(100)]
    assert sum(r.low <= 1.03 <= r.high for r in threes) >= 93
    assert all(r.verdict(0.05) != "regress" for r in threes)


def test_verdicts() -> None:
    assert Ratio(1.1, 1.06, 1.14, 0.95, 10).verdict(0.05) == "regress"
    assert Ratio(1.1, 1.04, 1.14, 0.95, 10).verdict(0.05) == "inconclusive"
    assert Ratio(1.0, 0.99, 1.05, 0.95, 10).verdict(0.05) == "pass"
    assert Ratio(float("nan"), float("nan"), float("nan"), 0.95, 10).verdict(0.05) == "inconclusive"


def test_one_round_has_no_interval() -> None:
    ours, theirs = simulated(0, rounds=1)
    with pytest.raises(ValueError, match="two pairs"):
        paired_ratio(ours, theirs)


def test_noise_that_both_meet_is_no_part_of_the_ratio() -> None:
    ours, theirs = simulated(3, slower=1.1, layout=0.0)
    paired, apart = paired_ratio(ours, theirs), ratio_of(ours, theirs)
    assert paired.low <= 1.1 <= paired.high
    assert apart.low <= 1.1 <= apart.high
    assert apart.high / apart.low > 2 * paired.high / paired.low - 1
