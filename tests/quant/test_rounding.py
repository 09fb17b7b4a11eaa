"""Weights as integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeattn.quant.rounding import round_rows, rounded

ROWS = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([0, 16, 32]))
def test_eight_bits_are_half_a_step_off_at_most(rows: np.ndarray, group: int) -> None:
    integers, scales = round_rows(rows, 8, group)
    width = min(group or rows.shape[1], rows.shape[1])
    assert integers.shape == rows.shape
    assert scales.shape == (len(rows), -(-rows.shape[1] // width))
    assert (scales > 0).all()
    steps = np.repeat(scales, width, axis=1)[:, : rows.shape[1]]
    assert (np.abs(rounded(rows, 8, group) - rows) <= steps * 0.5001).all()


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([0, 16, 32]))
def test_four_bits_are_no_worse_than_plain_rounding(rows: np.ndarray, group: int) -> None:
    integers, _ = round_rows(rows, 4, group)
    assert integers.min() >= -8
    assert integers.max() <= 7
    width = min(group or rows.shape[1], rows.shape[1])
    back = rounded(rows, 4, group)
    for start in range(0, rows.shape[1], width):
        block = rows[:, start : start + width].astype(np.float64)
        plain = np.abs(block).max(axis=1, keepdims=True) / 7 + 1e-30
        worst = np.square(np.clip(np.rint(block / plain), -8, 7) * plain - block).sum(axis=1)
        ours = np.square(back[:, start : start + width].astype(np.float64) - block).sum(axis=1)
        assert (ours <= worst * 1.001 + 1e-9 * np.square(block).sum(axis=1)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    integers, scales = round_rows(np.zeros((2, 40), np.float32), bits, 32)
    assert not integers.any()
    assert (scales == 1).all()
