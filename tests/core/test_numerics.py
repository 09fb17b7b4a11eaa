import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeattn.core.numerics import compare, compare_all, lost_slices

arrays = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


def test_by_hand():
    # ||(3, 4)|| = 5, the difference is (0, 0.5)
    n = compare(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert n.relative_l2 == pytest.approx(0.1)
    assert n.max_abs == 0.5
    assert n.sqnr_db == pytest.approx(20.0)
    assert n.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert n.top1_agreement is None
    assert (n.nonfinite, n.nonfinite_reference) == (0, 0)


def test_top1_is_by_row():
    reference = np.array([[1.0, 2.0], [5.0, 4.0], [0.0, 1.0], [1.0, 0.0]])
    other = np.array([[1.0, 2.0], [4.0, 5.0], [0.0, 1.0], [2.0, 0.0]])
    assert compare(reference, other).top1_agreement == 0.75
    assert compare(reference[:, :1], other[:, :1]).top1_agreement is None


def test_non_finite_entries_are_counted_apart_and_leave_the_rest_measurable():
    reference = np.array([3.0, 4.0, np.nan, 1.0, np.inf])
    other = np.array([3.0, 4.5, 0.0, np.nan, np.inf])
    n = compare(reference, other)
    assert n.relative_l2 == pytest.approx(0.1)
    assert (n.nonfinite, n.nonfinite_reference) == (2, 2)
    assert not n.holds(1.0)


@pytest.mark.parametrize(("reference", "other"), [(np.nan, 0.0), (0.0, np.inf), (np.inf, np.inf)])
def test_anything_not_finite_never_holds(reference, other):
    assert not compare(np.array([1.0, reference]), np.array([1.0, other])).holds(math.inf)


def test_a_zero_reference():
    same, off = (compare(np.zeros(3), np.array([0.0, 0.0, x])) for x in (0.0, 1e-9))
    assert (same.relative_l2, same.cosine, same.sqnr_db) == (0.0, 1.0, math.inf)
    assert (off.relative_l2, off.cosine, off.sqnr_db) == (math.inf, 0.0, -math.inf)
    assert not off.holds(1.0)


@pytest.mark.parametrize("other", [[1.0, 1.0], [1.0, 1.5], [np.nan, np.nan]])
@pytest.mark.parametrize("reference", [[0.0, 0.0], [1.0, 1.0]])
def test_plain_data_is_json(reference, other):
    json.dumps(compare(np.array(reference), np.array(other)).as_dict(), allow_nan=False)


def test_shapes_must_agree_without_broadcasting():
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        compare(np.zeros((2, 1)), np.zeros((2, 2)))


def test_empty_tensors_are_equal():
    assert compare(np.zeros((0, 3)), np.zeros((0, 3))).holds(0.0)


def test_integers_and_booleans_and_half():
    assert compare(np.array([True, False]), np.array([True, True])).max_abs == 1.0
    assert compare(np.array([0, 255], np.uint8), np.array([255, 0], np.uint8)).max_abs == 255.0
    big = np.array([6e4, 6e4], np.float16)  # its square is not a float16
    assert compare(big, big / 2).relative_l2 == pytest.approx(0.5)


def test_every_output_is_compared_and_a_missing_one_is_an_error():
    both = {"a": np.ones(2), "b": np.ones(2)}
    assert list(compare_all(both, {**both, "c": np.ones(1)})) == ["a", "b"]
    with pytest.raises(KeyError):
        compare_all(both, {"a": np.ones(2)})


@given(arrays)
def test_a_tensor_is_itself(x):
    n = compare(x, x.copy())
    assert n.holds(0.0)
    assert n.cosine == pytest.approx(1.0)
    assert n.max_abs == 0.0


@given(arrays, st.floats(1e-3, 1e3), st.floats(1e-6, 0.5))
def test_scaling_both_changes_nothing_and_scaling_one_is_the_relative_error(x, scale, off):
    if not np.any(x):
        return
    r = x.astype(np.float64)
    n = compare(r * scale, r * scale * (1 + off))
    assert n.relative_l2 == pytest.approx(off, rel=1e-6)
    assert n.sqnr_db == pytest.approx(-20 * math.log10(off), abs=1e-4)
    assert n.cosine == pytest.approx(1.0)
    assert n.holds(off * 1.01)
    assert not n.holds(off * 0.99)


def test_lost_slices_are_found_where_the_whole_holds() -> None:
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 640, (1, 4, 100)), rng.uniform(0, 1, (1, 3, 100))
    reference = np.concatenate([boxes, scores], axis=1).astype(np.float32)
    step = 640 / 255
    rounded = (np.rint(reference / step) * step).astype(np.float32)
    assert compare(reference, rounded).relative_l2 < 0.01
    assert lost_slices(reference, rounded) == {1: [4, 5, 6]}
    assert lost_slices(reference, reference) == {}


def test_constant_and_short_slices_are_never_lost() -> None:
    reference = np.ones((1, 3, 50), np.float32)
    assert lost_slices(reference, reference + 1) == {}
    assert lost_slices(np.eye(4, dtype=np.float32)[None], np.zeros((1, 4, 4), np.float32)) == {}
