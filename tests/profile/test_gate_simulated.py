"""The gate on simulated jobs, whose truth is known: how often it is right, under noise of several kinds."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest

from benchmarks.noise import MODELS, ROUNDS, Noise, bootstrap, coverage, job, measured, ordered, times
from edgeattn.profile.gate import LEAST, judge

#: Of each of the kinds of noise: over 200 in all.
JOBS = 29


def verdicts(slower: float) -> Counter[str]:
    found: Counter[str] = Counter()
    for noise in MODELS.values():
        found += Counter(job(noise, slower, seed).verdict for seed in range(JOBS))
    assert found.total() >= 200
    return found


def test_equal_programs_are_called_slower_in_one_percent_at_most() -> None:
    found = verdicts(1.0)
    assert found["regress"] <= 0.01 * found.total(), found
    # Nor does it hold its tongue: a gate that never says anything would never be wrong.
    assert found["pass"] >= 0.95 * found.total(), found


def test_ten_percent_are_called_a_regression_in_95_of_100() -> None:
    found = verdicts(1.10)
    assert found["regress"] >= 0.95 * found.total(), found
    assert not found["pass"], found


@pytest.mark.parametrize(("slower", "wrong"), [(1.03, "regress"), (0.8, "regress"), (1.4, "pass")])
def test_what_is_below_the_margin_or_above_it_is_not_taken_for_the_other(slower: float, wrong: str) -> None:
    found = Counter(job(noise, slower, seed).verdict for noise in MODELS.values() for seed in range(4))
    assert not found[wrong], found


def test_a_quiet_machine_is_soon_done_and_a_restless_one_goes_on() -> None:
    assert len(measured(MODELS["quiet"], 1.0, 0)[0]) <= 1.5 * LEAST
    assert len(measured(Noise(layout=0.2), 1.0, 0)[0]) == ROUNDS


def test_a_machine_that_cannot_tell_says_so_unless_the_slow_down_is_beyond_doubt() -> None:
    wild = Noise(layout=0.12)
    found = [job(wild, 1.0, seed) for seed in range(10)]
    assert {each.verdict for each in found} == {"inconclusive"}
    assert all("self-check" in each.why and each.fix for each in found)
    assert {job(wild, 1.10, seed).verdict for seed in range(10)} == {"inconclusive"}
    assert {job(wild, 3.0, seed).verdict for seed in range(10)} == {"regress"}


def test_a_base_that_differs_from_itself_leaves_nothing_to_be_said() -> None:
    base, again, head = (times(MODELS["quiet"], 1.10, 0)[:, :16, :, None]).tolist()
    slow = [[[1.2 * ms for ms in block] for block in process] for process in again]
    found = judge(base, head, slow)
    assert found.verdict == "inconclusive"
    assert "differs from itself" in found.why
    assert judge(base, head, again).verdict == "regress"


def test_the_interval_holds_the_truth_more_often_than_a_bootstrap_of_few_rounds() -> None:
    """Under the noise that is hardest for it: processes that are slow for their whole life."""
    noise = MODELS["layouts"]
    ours, usual = (coverage(ends, noise, 120, rounds=16) for ends in (ordered, partial(bootstrap, draws=300)))
    assert ours >= 0.95
    assert ours >= usual


def test_simulated_times_have_the_factor_that_was_asked_for() -> None:
    base, again, head = np.log(times(Noise(), 1.10, 3))
    assert np.median(head - base) == pytest.approx(np.log(1.10), abs=0.01)
    assert np.median(again - base) == pytest.approx(0.0, abs=0.01)
