"""The ratio of two bundles, measured: it tells a slow-down from none. On whatever machine this runs, with its noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.latency_gate import busy, once
from benchmarks.planted import slower
from edgeattn.bundle import Bundle


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0, 2], ids=["quiet", "two busy neighbours"])
def test_the_same_bundle_twice_and_one_that_is_slower(noise: int, digits: Bundle, tmp_path: Path) -> None:
    ten = slower(digits.path, tmp_path, 0.10)
    with busy(noise):
        same = [once(digits.path, digits.path, 1) for _ in range(3)]
        found = [once(digits.path, ten, 1) for _ in range(2)]
    # Of 20 one may miss: of 3 none, or one by bad luck.
    assert sum(ratio.low <= 1 <= ratio.high for ratio in same) >= 2, same
    assert not any(ratio.verdict(0.05) == "regress" for ratio in same), same
    assert all(ratio.low > 1 for ratio in found), found
