"""What is kept of a tensor while calibration samples pass: a histogram, whatever their number; and ranges out of it."""

from __future__ import annotations

import numpy as np

from edgeattn.core.errors import unknown
from edgeattn.core.numerics import Array

#: How a range is chosen, the default first: the smallest mean squared error; all that was seen; but for a share of
#: ``BEYOND`` at each end; the smallest Kullback-Leibler divergence.
METHODS = ("mse", "minmax", "percentile", "entropy")
#: Share of the numbers that ``percentile`` clips at each end.
BEYOND = 1e-4
#: Of a tensor at most so many numbers of a sample are counted, evenly spread; the outermost ones always.
LOOKED_AT = 65536
#: Bins of a histogram, from -span to span.
BINS = 16384
#: Shares of the whole range that ``mse`` tries.
CLIPS = np.linspace(1.0, 0.2, 41)


class Observer:
    """A histogram of the numbers of one tensor, in bounded memory.

    Args:
        method: one of ``METHODS``.

    Attributes:
        lowest, highest: of all finite numbers seen. count: of numbers counted. nonfinite: NaN and infinities seen.

    Raises:
        UsageError: an unknown method.
    """

    def __init__(self, method: str = METHODS[0]) -> None:
        if method not in METHODS:
            raise unknown("way to choose ranges", method, METHODS)
        self.method = method
        self.lowest = self.highest = 0.0
        self.count = self.nonfinite = 0
        self._span = 0.0
        self._bins: Array = np.zeros(BINS, np.int64)

    def add(self, value: Array) -> None:
        """Count the numbers of a tensor of any shape."""
        flat = np.asarray(value, np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite = np.isfinite(flat)
            self.nonfinite += int(flat.size - finite.sum())
            flat = flat[finite]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        self._widen(max(-low, high))
        thinned = flat[:: max(1, flat.size // LOOKED_AT)]
        self.count += thinned.size
        if self._span:
            places = (thinned * np.float32(BINS / 2 / self._span) + np.float32(BINS / 2)).astype(np.int64)
            self._bins += np.bincount(np.clip(places, 0, BINS - 1, out=places), minlength=BINS)
        else:
            self._bins[BINS // 2] += thinned.size

    def _widen(self, peak: float) -> None:
        """Make room for numbers up to ``peak``: double the span, two bins becoming one, as often as it takes."""
        if not self._span:
            zeros, self._span = int(self._bins.sum()), peak
            self._bins[:] = 0
            self._bins[BINS // 2] = zeros
            return
        while peak > self._span:
            pairs = self._bins.reshape(-1, 2).sum(axis=1)
            self._bins[:] = 0
            self._bins[BINS // 4 : BINS // 4 * 3] = pairs
            self._span *= 2.0

    def _centres(self) -> Array:
        return (np.arange(BINS) + 0.5 - BINS / 2) * (2.0 * self._span / BINS)

    def limits(self, bits: int = 8) -> tuple[float, float]:
        """Lowest and highest number that shall be told apart in ``2**bits`` levels; 0 is between them or one of them.

        (0, 0) if nothing but zeros was seen.
        """
        low, high = self.lowest, self.highest
        if low == high == 0.0:
            return 0.0, 0.0
        if self.method == "minmax":
            return low, high
        used = np.flatnonzero(self._bins)
        counts, centres = self._bins[used], self._centres()[used]
        if self.method == "percentile":
            total = np.cumsum(counts)
            first = centres[np.searchsorted(total, BEYOND * total[-1], side="right")]
            last = centres[min(np.searchsorted(total, (1.0 - BEYOND) * total[-1]), len(centres) - 1)]
            return max(low, min(float(first), 0.0)), min(high, max(float(last), 0.0))
        if self.method == "entropy":
            threshold = self._entropy(bits)
            return max(low, -threshold), min(high, threshold)
        tried = [(low * float(clip), high * float(clip)) for clip in CLIPS]
        return min(tried, key=lambda ends: _error(counts, centres, ends, bits))

    def scale(self, bits: int = 8) -> float:
        """The step between the levels of signed integers that are symmetric around 0; 1 where all is 0."""
        levels: int = 2 ** (bits - 1) - 1
        peak = max(-self.lowest, self.highest)
        if not peak:
            return 1.0
        if self.method != "mse":
            return max(abs(end) for end in self.limits(bits)) / levels
        used = np.flatnonzero(self._bins)
        counts, centres = self._bins[used], self._centres()[used]
        tried = [peak * float(clip) for clip in CLIPS]
        # One level fewer than two's complement has, so that 0 is in the middle.
        return min(tried, key=lambda end: _error(counts, centres, (-end, end), bits, fewer=1)) / levels

    def noise(self, scale: float, bits: int = 8) -> float:
        """Share of the tensor's energy that rounding to symmetric integers of this scale takes away."""
        used = np.flatnonzero(self._bins)
        counts, centres = self._bins[used], self._centres()[used]
        end = scale * (2 ** (bits - 1) - 1)
        energy = float((counts * np.square(centres)).sum())
        return _error(counts, centres, (-end, end), bits, fewer=1) / energy if energy else 0.0

    def beyond(self, low: float, high: float) -> float:
        """Share of the numbers outside of ``low`` to ``high``, which a range of these ends would saturate."""
        centres = self._centres()
        outside = self._bins[(centres < low) | (centres > high)].sum()
        return float(outside) / max(1, self.count)

    def _entropy(self, bits: int) -> float:
        """The magnitude to clip at: Migacz, "8-bit inference with TensorRT", GTC 2017."""
        levels = 2 ** (bits - 1)
        magnitudes = self._bins[BINS // 2 :] + self._bins[: BINS // 2][::-1]
        # At least 64 candidates, and every level at least one bin wide.
        fold = max(1, len(magnitudes) // (levels * 16))
        magnitudes = magnitudes[: len(magnitudes) // fold * fold].reshape(-1, fold).sum(axis=1).astype(np.float64)
        width = self._span / len(magnitudes)
        last = int(np.flatnonzero(magnitudes)[-1]) + 1
        best = (np.inf, last)
        for stop in range(levels, last + 1, max(1, (last - levels) // 64) if last > levels else 1):
            kept = magnitudes[:stop].copy()
            wanted = kept.copy()
            wanted[-1] += magnitudes[stop:].sum()
            place = np.arange(stop) * levels // stop
            sums = np.bincount(place, kept, levels)
            filled = np.bincount(place, (kept > 0).astype(np.float64), levels)
            spread = np.where(kept > 0, (sums / np.maximum(filled, 1))[place], 0.0)
            best = min(best, (_divergence(wanted, spread), stop))
        return best[1] * width


def _divergence(wanted: Array, given: Array) -> float:
    """Kullback-Leibler divergence of two histograms, empty bins smoothed."""
    tiny = 1e-12
    p, q = wanted / wanted.sum() + tiny, given / max(given.sum(), tiny) + tiny
    return float((p * np.log(p / q)).sum())


def _error(counts: Array, centres: Array, ends: tuple[float, float], bits: int, fewer: int = 0) -> float:
    """Summed squared error of rounding to ``2**bits - fewer`` levels between the ends, one of which is 0."""
    low, high = ends
    step = (high - low) / (2**bits - 1 - fewer)
    zero = np.rint(low / step) * step
    back = np.clip(np.rint(centres / step) * step, zero, zero + step * (2**bits - 1 - fewer))
    return float((counts * np.square(back - centres)).sum())
