"""Weights as integers: what every target stores, and what simulation computes with."""

from __future__ import annotations

import numpy as np

from edgeattn.core.numerics import Array

#: Runtimes add up int8 products, and the bias in their steps, in int32: it may have half as many as there are.
MOST_BIAS_STEPS = 2.0**30
#: Shares of a block's largest magnitude at which 4-bit weights may be clipped.
_CLIPS = np.linspace(1.0, 0.7, 13)


def round_rows(rows: Array, bits: int, group: int = 0, lowest: int = -8) -> tuple[Array, Array]:
    """Integers and scales of a weight whose output channels are rows: ``rows ≈ integers * scales`` by blocks.

    8 bits are symmetric, -127 to 127, and clip nothing. 4 bits are ``lowest`` to 7, each block with the scale of
    smallest squared error; with -8, its sign lets the largest weight be the -8.

    Args:
        rows: float (R, K). bits: 4 or 8. group: numbers of a row that share a scale, the last ones fewer; 0 for all.
        lowest: -8 or -7, of 4 bits.

    Returns:
        int8 (R, K) and float32 (R, ceil(K / group)), no scale being 0.
    """
    count, width = rows.shape
    group = min(group or width, width)
    padded = np.zeros((count, -(-width // group) * group), np.float32)
    padded[:, :width] = rows
    blocks = padded.reshape(count, -1, group)
    if bits == 8:
        peaks = np.abs(blocks).max(axis=-1)
        scales = np.where(peaks > 0, peaks / 127.0, 1.0).astype(np.float32)
        integers = np.clip(np.rint(blocks / scales[..., None]), -127, 127)
    else:
        integers, scales = _four(blocks, lowest)
    return integers.astype(np.int8).reshape(count, -1)[:, :width], scales


def _four(blocks: Array, lowest: int) -> tuple[Array, Array]:
    """Of blocks (R, N, group) the integers from ``lowest`` to 7, and the scale of each block."""
    at = np.abs(blocks).argmax(axis=-1)[..., None]
    peaks = np.take_along_axis(blocks, at, axis=-1)
    peaks = peaks if lowest == -8 else np.abs(peaks)
    best: Array = np.ones(peaks.shape, np.float32)
    least: Array = np.full(peaks.shape, np.inf, np.float32)
    for clip in _CLIPS:
        for levels in (-8.0, 7.0) if lowest == -8 else (7.0,):
            scales = (peaks * np.float32(clip / levels)).astype(np.float32)
            scales[scales == 0] = 1.0
            back = np.clip(np.rint(blocks / scales), lowest, 7) * scales
            error = np.square(back - blocks).sum(axis=-1, keepdims=True)
            better = error < least
            best, least = np.where(better, scales, best), np.where(better, error, least)
    return np.clip(np.rint(blocks / best), lowest, 7), best[..., 0]


def rounded(rows: Array, bits: int, group: int = 0, lowest: int = -8) -> Array:
    """The floats (R, K) that the integers of ``round_rows`` stand for.

    With a lowest of -7 a quantizer that divides each block by its largest magnitude finds the same integers again.
    """
    integers, scales = round_rows(rows, bits, group, lowest)
    width = min(group or rows.shape[1], rows.shape[1])
    along: Array = np.repeat(scales, width, axis=1)[:, : rows.shape[1]]
    return integers.astype(np.float32) * along
