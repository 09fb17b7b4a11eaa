"""The observer against what a look at all numbers at once would have found."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeattn.core.errors import UsageError
from edgeattn.quant.observe import BEYOND, BINS, LOOKED_AT, METHODS, TINIEST, Observer

FLOATS = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=True)
TENSORS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS)
RNG = np.random.default_rng(0)
METHOD = st.sampled_from(METHODS)


def seen(method, *tensors):
    observer = Observer(method)
    for tensor in tensors:
        observer.add(tensor)
    return observer


def rounded(x, scale, bits=8):
    """To symmetric integers and back."""
    top = 2 ** (bits - 1) - 1
    return np.clip(np.rint(x / scale), -top, top) * scale


def loss(x, scale):
    """Share of the energy of ``x`` that rounding takes away."""
    x = x.astype(np.float64)
    return np.square(rounded(x, scale) - x).sum() / np.square(x).sum()


@given(st.lists(TENSORS, min_size=1, max_size=6), st.randoms(use_true_random=False), METHOD)
@settings(deadline=None)
def test_the_order_of_samples_makes_no_difference(tensors, random, method):
    one = seen(method, *tensors)
    random.shuffle(tensors)
    other = seen(method, *tensors)
    assert one.limits() == other.limits()
    assert one.scale() == other.scale()
    assert (one.lowest, one.highest, one.count) == (other.lowest, other.highest, other.count)


@given(st.lists(TENSORS, min_size=1, max_size=4), METHOD)
@settings(deadline=None)
def test_samples_in_turn_are_as_good_as_all_at_once(tensors, method):
    together = np.concatenate([t.reshape(-1) for t in tensors])
    assert seen(method, *tensors).limits() == seen(method, together).limits()


@given(TENSORS, METHOD, st.sampled_from((4, 8, 16)))
@settings(deadline=None)
def test_ranges_are_within_what_was_seen_and_usable(x, method, bits):
    observer = seen(method, x)
    low, high = observer.limits(bits)
    assert min(float(x.min()), 0.0) <= low <= 0.0 <= high <= max(float(x.max()), 0.0)
    scale = observer.scale(bits)
    assert np.isfinite(np.float32(scale))
    assert np.isfinite(np.float32(1) / np.float32(scale))
    # Whatever is not 0 has a range to be told apart in.
    assert (low < high) == (float(np.abs(x).max()) >= TINIEST)
    assert 0.0 <= observer.noise(scale, bits) <= 1.0 + 1e-9


@given(TENSORS, METHOD)
@settings(deadline=None)
def test_nothing_is_beyond_all_that_was_seen(x, method):
    observer = seen(method, x)
    assert observer.beyond(observer.lowest, observer.highest) == 0.0
    assert observer.beyond(-np.inf, np.inf) == 0.0


@given(TENSORS)
def test_minmax_is_exact(x):
    observer = seen("minmax", x)
    peak = float(np.abs(x).max())
    if peak < TINIEST:
        assert (observer.limits(), observer.scale()) == ((0.0, 0.0), 1.0)
    else:
        assert observer.limits() == (min(0.0, float(x.min())), max(0.0, float(x.max())))
        assert observer.scale() == peak / 127


def tensors_of_many_kinds():
    normal = RNG.standard_normal(50_000).astype(np.float32)
    outlier = normal.copy()
    outlier[7] = 20.0
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "squared relu": np.square(np.maximum(normal, 0)),
        "laplace": RNG.laplace(size=50_000).astype(np.float32),
        "uniform": RNG.random(50_000, np.float32),
        "outlier": outlier,
        "heavy tail": RNG.standard_t(2, 50_000).astype(np.float32),
        "mostly zeros": np.where(RNG.random(50_000) < 1e-2, np.abs(normal), 0).astype(np.float32),
    }


KINDS = tensors_of_many_kinds()


@pytest.mark.parametrize("x", KINDS.values(), ids=KINDS)
def test_mse_finds_the_best_scale(x):
    observer = seen("mse", x)
    peak = float(np.abs(x).max())
    best = min(loss(x, peak * clip / 127) for clip in np.linspace(0.02, 1.0, 400))
    assert loss(x, observer.scale()) <= best * 1.05
    # What it says of the loss is so.
    assert observer.noise(observer.scale()) == pytest.approx(loss(x, observer.scale()), rel=0.05)


@pytest.mark.parametrize("x", KINDS.values(), ids=KINDS)
def test_mse_finds_good_limits(x):
    observer = seen("mse", x)

    def lost(low, high):
        step = (high - low) / 255
        zero = np.rint(low / step) * step
        return np.square(np.clip(np.rint(x / step) * step, zero, zero + 255 * step) - x).sum(dtype=np.float64)

    ends = [(float(x.min()) * a, float(x.max()) * b) for a in np.linspace(0.1, 1, 25) for b in np.linspace(0.1, 1, 25)]
    best = min(lost(min(0, low), max(0, high)) for low, high in ends)
    assert lost(*observer.limits()) <= best * 1.15


@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "uniform", "mostly zeros"])
def test_entropy_is_near_the_best_where_nothing_must_be_clipped(kind):
    x = KINDS[kind]
    assert loss(x, seen("entropy", x).scale()) <= 1.3 * loss(x, seen("mse", x).scale())


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_far_outlier_is_clipped(method):
    x = KINDS["normal"].copy()
    x[3] = 1000.0
    observer = seen(method, x)
    # One number of 50,000 must not take the others' levels.
    assert observer.limits()[1] < 20
    assert observer.beyond(*observer.limits()) > 0


@pytest.mark.parametrize("x", KINDS.values(), ids=KINDS)
def test_percentile_clips_its_share_to_the_bin(x):
    low, high = seen("percentile", x).limits()
    width = 4 * float(np.abs(x).max()) / BINS
    counted = np.sort(x[np.abs(x) > width])
    share = BEYOND * len(counted)
    assert (counted < low).sum() <= share
    assert (counted > high).sum() <= share
    # And no less than that, but for one bin.
    if low < 0:
        assert (counted < low + width).sum() >= np.floor(share)
    assert (counted > high - width).sum() >= np.floor(share)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x", [[3.0], [-2.0, 5.0], [0.0, 0.0, -1.0]])
def test_of_a_few_numbers_none_is_clipped(x, method):
    x = np.float32(x)
    low, high = seen(method, x).limits()
    step = (high - low) / 255
    assert low <= min(x.min(), 0) + 2 * step
    assert high >= max(x.max(), 0) - 2 * step


@pytest.mark.parametrize("method", METHODS)
def test_zeros_first(method):
    zeros, x = np.zeros(1000, np.float32), KINDS["normal"][:1000]
    observer = seen(method, zeros)
    assert (observer.limits(), observer.scale(), observer.noise(1.0)) == ((0.0, 0.0), 1.0, 0.0)
    observer.add(x)
    assert observer.limits() == seen(method, x, zeros).limits()
    assert observer.count == 2000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_counted_apart(bad):
    x = KINDS["normal"].copy()
    x[::1000] = bad
    observer, clean = seen("mse", x), seen("mse", x[np.isfinite(x)])
    assert observer.nonfinite == 50
    assert observer.limits() == clean.limits()
    assert observer.count == clean.count
    assert seen("mse", np.float32([bad])).limits() == (0.0, 0.0)


def test_what_float32_cannot_hold_is_infinite():
    observer = seen("mse", np.array([1.0, 1e300]))
    assert (observer.nonfinite, observer.highest) == (1, 1.0)


@pytest.mark.parametrize("width", [384, 12 * 7, 13 * 16])
def test_no_channel_is_passed_over_in_large_tensors(width):
    # Every step that divides the width would see some of the channels only.
    x = np.zeros((12 * LOOKED_AT // width + 1, width), np.float32)
    loud = RNG.permutation(width)[: width // 4]
    x[:, loud] = 1.0
    observer = seen("minmax", x)
    assert observer.beyond(-0.5, 0.5) == pytest.approx(len(loud) / width, abs=0.01)
    assert observer.count == pytest.approx(x.size, rel=1e-3)


def test_rare_loud_numbers_of_large_tensors_are_counted():
    x = np.tile(KINDS["normal"], 20)
    x[[12_345, 500_001]] = 30.0, -25.0
    assert len(x) > 20 * LOOKED_AT
    observer = seen("mse", x)
    assert observer.beyond(-20, 20) == pytest.approx(2 / len(x), rel=0.01)
    best = min(loss(x, 30 * clip / 127) for clip in np.linspace(0.05, 1.0, 100))
    assert loss(x, observer.scale()) <= best * 1.05


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mostly zeros"])
def test_thinned_tensors_give_about_the_same_range(kind):
    x = np.tile(KINDS[kind], 20)
    assert loss(x, seen("mse", x).scale()) <= 1.1 * loss(x, seen("mse", *x.reshape(20, -1)).scale())


def test_the_ends_of_large_tensors_are_always_seen():
    x = np.zeros(20 * LOOKED_AT, np.float32)
    x[-1], x[12345] = 7.0, -9.0
    assert seen("minmax", x).limits() == (-9.0, 7.0)


def test_memory_is_bounded():
    observer, sample = Observer(), KINDS["normal"][:1000]
    tracemalloc.start()
    for i in range(2000):
        observer.add(sample * (1 + i))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert observer.count == 2_000_000
    assert held < 3 * BINS * 8
    assert peak < 20 * BINS * 8


def test_an_unknown_method_is_refused():
    with pytest.raises(UsageError, match="way to choose ranges") as caught:
        Observer("minmx")
    assert "minmax" in str(caught.value.fix)
