"""What is kept of a tensor while calibration samples pass: a histogram, whatever their number; and ranges out of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgeattn.core.errors import unknown
from edgeattn.core.numerics import Array

#: How a range is chosen, the default first: the smallest mean squared error; all that was seen; but for a share of
#: ``BEYOND`` at each end; the smallest Kullback-Leibler divergence.
METHODS = ("mse", "minmax", "percentile", "entropy")
#: Share of the numbers (those next to 0 apart, which any range holds) that ``percentile`` clips at each end.
BEYOND = 1e-4
#: Of a sample of a tensor about so many numbers stand for all, at most twice as many. Those above half of its peak
#: stand for themselves, if they are no more than RARE.
LOOKED_AT = 32768
RARE = 4096
#: Bins of a histogram, from -span to span.
BINS = 16384
#: A tensor that stays below this is 0: the steps between its levels would leave the normal numbers of float32.
TINIEST = 1e-30
#: Shares of the peak that ``mse`` tries, a quarter of an octave apart; then as many as ``FINER`` around the best one.
CLIPS = np.exp2(-np.arange(25) / 4)
FINER = 8


class Observer:
    """A histogram of the numbers of one tensor, in bounded memory; the order in which they come makes no difference.

    Args:
        method: one of ``METHODS``.

    Attributes:
        lowest, highest: of all finite numbers seen, and of 0. count: of finite numbers that the histogram stands for.
        nonfinite: NaN and infinities seen.

    Raises:
        UsageError: an unknown method.
    """

    def __init__(self, method: str = METHODS[0]) -> None:
        if method not in METHODS:
            raise unknown("way to choose ranges", method, METHODS)
        self.method = method
        self.lowest = self.highest = 0.0
        self.count = self.nonfinite = 0
        #: A power of two above every number seen, so that widening gives the bins that a wide start would have given.
        self._span = 0.0
        self._bins: Array = np.zeros(BINS, np.int64)

    def add(self, value: Array) -> None:
        """Count the numbers of a tensor of any shape."""
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            flat = np.asarray(value, np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = np.isfinite(flat)
            self.nonfinite += int(flat.size - finite.sum())
            flat = flat[finite]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        self._widen(max(-low, high))
        # No common divisor with any dimension, so that no channel and no column is passed over.
        step = max(1, flat.size // LOOKED_AT)
        while math.gcd(step, flat.size) > 1:
            step += 1
        thinned = flat[::step]
        if step > 1:
            # What is rare and loud decides on the range: it must not fall through.
            half = np.float32(max(-low, high) / 2)
            above = (flat > half) | (flat < -half)
            if np.count_nonzero(above) <= RARE:
                self._count(_those(flat, above), 1)
                thinned = thinned[~above[::step]]
        self._count(thinned, step)

    def _count(self, values: Array, weight: int) -> None:
        self.count += weight * values.size
        if self._span:
            self._bins += weight * np.bincount(self._places(values), minlength=BINS)
        else:
            self._bins[BINS // 2] += weight * values.size

    def _places(self, values: Array) -> Array:
        """The bins of numbers within the span; exact: it is a power of two, and nothing underflows in float64."""
        places: Array = np.floor(np.multiply(values, BINS / 2 / self._span, dtype=np.float64)).astype(np.int64)
        return places + BINS // 2

    def _widen(self, peak: float) -> None:
        """Make room for numbers up to ``peak``: double the span, two bins becoming one, as often as it takes."""
        if peak < max(self._span, TINIEST):
            return
        # frexp: peak = m * 2**e with 0.5 <= m < 1.
        wanted = math.ldexp(1.0, math.frexp(peak)[1])
        # What was counted before there was a span is 0, and in the middle already.
        while self._span and self._span < wanted:
            pairs = self._bins.reshape(-1, 2).sum(axis=1)
            self._bins[:] = 0
            self._bins[BINS // 4 : BINS // 4 * 3] = pairs
            self._span *= 2.0
        self._span = wanted

    def _used(self) -> tuple[Array, Array]:
        """Counts of the bins that are not empty, and the number that stands for each: its centre, or 0."""
        used = np.flatnonzero(self._bins)
        centres = (used + 0.5 - BINS / 2) * (2.0 * self._span / BINS)
        centres[used == BINS // 2] = 0.0  # half of what a ReLU leaves is exactly that
        return self._bins[used], centres

    def limits(self, bits: int = 8) -> tuple[float, float]:
        """Lowest and highest number that shall be told apart in ``2**bits`` levels; 0 is between them or one of them.

        (0, 0) if nothing but zeros was seen.
        """
        if not self._span:
            return 0.0, 0.0
        if self.method == "percentile":
            return self._percentile()
        if self.method == "entropy":
            return self._within(self._entropy(bits))
        if self.method == "mse":
            counts, centres = self._used()
            return self._within(self._least(lambda end: _error(counts, centres, self._within(end), bits)))
        return self.lowest, self.highest

    def scale(self, bits: int = 8) -> float:
        """The step between the levels of signed integers that are symmetric around 0; 1 where all is 0."""
        levels: int = 2 ** (bits - 1) - 1
        if not self._span:
            return 1.0
        if self.method != "mse":
            return max(abs(end) for end in self.limits(bits)) / levels
        counts, centres = self._used()
        # One level fewer than two's complement has, so that 0 is in the middle.
        return self._least(lambda end: _error(counts, centres, (-end, end), bits, fewer=1)) / levels

    def noise(self, scale: float, bits: int = 8) -> float:
        """Share of the tensor's energy that rounding to symmetric integers of this scale takes away."""
        counts, centres = self._used()
        end = scale * (2 ** (bits - 1) - 1)
        energy = float((counts * np.square(centres)).sum())
        return _error(counts, centres, (-end, end), bits, fewer=1) / energy if energy else 0.0

    def beyond(self, low: float, high: float) -> float:
        """Share of the numbers outside of ``low`` to ``high``, which a range of these ends would saturate.

        To the bin: what is in the same one as an end is within.
        """
        if not self._span:
            return 0.0
        first, last = self._places(np.clip([low, high], -self._span, np.nextafter(self._span, 0.0)))
        outside = self._bins[:first].sum() + self._bins[last + 1 :].sum()
        return float(outside) / max(1, self.count)

    def _within(self, end: float) -> tuple[float, float]:
        """The range that was seen, as far as it is not beyond ``end`` on either side of 0."""
        return max(self.lowest, -end), min(self.highest, end)

    def _least(self, error: Callable[[float], float]) -> float:
        """The magnitude to clip at that gives the smallest error."""
        peak = max(-self.lowest, self.highest)
        best = min(CLIPS, key=lambda clip: error(peak * float(clip)))
        finer = best * np.exp2(np.linspace(-0.25, 0.25, FINER + 1))
        return peak * float(min([best, *finer[finer < 1.0]], key=lambda clip: error(peak * float(clip))))

    def _percentile(self) -> tuple[float, float]:
        counts = self._bins.copy()
        counts[BINS // 2 - 1 : BINS // 2 + 1] = 0
        total = np.cumsum(counts)
        if not total[-1]:
            return self.lowest, self.highest
        width = 2.0 * self._span / BINS
        # The outer edges of the outermost bins that are kept.
        first = int(np.searchsorted(total, BEYOND * total[-1], side="right")) - BINS // 2
        last = int(np.searchsorted(total, (1.0 - BEYOND) * total[-1])) + 1 - BINS // 2
        return max(self.lowest, min(first * width, 0.0)), min(self.highest, max(last * width, 0.0))

    def _entropy(self, bits: int) -> float:
        """The magnitude to clip at: Migacz, "8-bit inference with TensorRT", GTC 2017.

        At least 16 bins a level first; where the smallest candidate wins, an outlier has spread the bins too thin, and
        half as wide ones are tried. Fewer numbers than bins are no distribution: all are kept.
        """
        levels: int = 2 ** (bits - 1)
        magnitudes = (self._bins[BINS // 2 :] + self._bins[: BINS // 2][::-1]).astype(np.float64)
        if magnitudes[1:].sum() < levels * 16:
            return max(-self.lowest, self.highest)
        # Any range holds zeros: they must not outweigh all else.
        magnitudes[0] = magnitudes[1]
        used = int(np.flatnonzero(magnitudes)[-1]) + 1
        fold = max(1, len(magnitudes) // (levels * 16))
        while True:
            stop = _closest(magnitudes.reshape(-1, fold).sum(axis=1), -(-used // fold), levels)
            if stop > levels or fold == 1:
                return stop * fold * 2.0 * self._span / BINS
            fold //= 2


def _those(flat: Array, chosen: Array) -> Array:
    """``flat[chosen]`` where few are: eight answers are looked at in one go."""
    whole = flat.size // 8 * 8
    some = np.flatnonzero(chosen[:whole].view(np.uint64))
    places = np.concatenate([(some[:, None] * 8 + np.arange(8)).reshape(-1), np.arange(whole, flat.size)])
    found: Array = flat[places[chosen[places]]]
    return found


def _closest(counts: Array, last: int, levels: int) -> int:
    """How many of the first ``last`` bins of magnitudes to keep, so that ``levels`` levels are closest to all."""
    best = (np.inf, last)
    for stop in range(levels, last + 1, max(1, (last - levels) // 64)):
        kept = counts[:stop]
        wanted = kept.copy()
        wanted[-1] += counts[stop:].sum()
        place = np.arange(stop) * levels // stop
        sums = np.bincount(place, kept, levels)
        filled = np.bincount(place, (wanted > 0).astype(np.float64), levels)
        spread = np.where(wanted > 0, (sums / np.maximum(filled, 1))[place], 0.0)
        best = min(best, (_divergence(wanted, spread), stop))
    return best[1]


def _divergence(wanted: Array, given: Array) -> float:
    """Kullback-Leibler divergence of two histograms, empty bins smoothed."""
    tiny = 1e-12
    p, q = wanted / wanted.sum() + tiny, given / max(given.sum(), tiny) + tiny
    return float((p * np.log(p / q)).sum())


def _error(counts: Array, centres: Array, ends: tuple[float, float], bits: int, fewer: int = 0) -> float:
    """Summed squared error of rounding to ``2**bits - fewer`` levels between the ends, one of which may be 0."""
    low, high = ends
    step = (high - low) / (2**bits - 1 - fewer)
    zero = np.rint(low / step) * step
    back = np.clip(np.rint(centres / step) * step, zero, zero + step * (2**bits - 1 - fewer))
    return float((counts * np.square(back - centres)).sum())
