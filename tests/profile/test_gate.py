"""The gate, measured: it tells a slow-down from none. On whatever machine this runs, with its noise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.latency_gate import busy, once
from benchmarks.planted import slower
from edgeattn.bundle import Bundle


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(0, marks=pytest.mark.slow, id="quiet"),
        pytest.param(2, marks=pytest.mark.hand, id="two busy neighbours"),
    ],
)
def test_the_same_bundle_twice_and_one_that_is_slower(noise: int, digits: Bundle, tmp_path: Path) -> None:
    ten = slower(digits.path, tmp_path, 0.10)
    with busy(noise):
        same = Counter(once(digits.path, digits.path, 1).verdict for _ in range(1 if noise else 2))
        found = once(digits.path, ten, 1)
    assert same["regress"] == same["refused"] == 0, same
    # It may be that a machine with this noise cannot tell; it must not say that nothing is there.
    assert found.verdict in ("regress", "inconclusive"), found
    assert found.ratio is not None
    assert found.ratio.low > 1, found
