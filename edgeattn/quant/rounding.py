"""Weights as integers: what every target stores, and what simulation computes with."""

from __future__ import annotations

import numpy as np

from edgeattn.core.numerics import Array

#: Runtimes add up int8 products, and the bias in their steps, in int32: it may have half as many as there are.
MOST_BIAS_STEPS = 2.0**30
#: Weights that are rounded at once.
PIECE = 1 << 19


def round_rows(rows: Array, bits: int, group: int = 0) -> tuple[Array, Array]:
    """Integers and scales of a weight whose output channels are rows: ``rows ≈ integers * scales`` by blocks.

    8 bits are symmetric, -127 to 127. 4 bits are -8 to 7, and the largest weight of a block is either end, whichever
    leaves the smaller squared error. Nothing is clipped: with 0.7 to 1 of that scale, whichever left the smallest
    squared error of the weights, the logits of fmvit-digits and fmvit-scenes were 3 to 10 % further off.

    Args:
        rows: float (R, K). bits: 4 or 8. group: numbers of a row that share a scale, the last ones fewer; 0 for all.

    Returns:
        int8 (R, K) and float32 (R, ceil(K / group)), no scale being 0.
    """
    count, width = rows.shape
    group = min(group or width, width)
    together = max(1, PIECE // width)
    if count > together:  # what fits in a processor's cache is four times as fast, and takes no memory to speak of
        pieces = [round_rows(rows[i : i + together], bits, group) for i in range(0, count, together)]
        return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])
    padded = np.zeros((count, -(-width // group) * group), np.float32)
    padded[:, :width] = rows
    blocks = padded.reshape(count, -1, group)
    if bits == 8:
        peaks = np.abs(blocks).max(axis=-1)
        scales = np.where(peaks > 0, peaks / 127.0, 1.0).astype(np.float32)
        integers = np.clip(np.rint(blocks / scales[..., None]), -127, 127)
    else:
        integers, scales = _four(blocks)
    return integers.astype(np.int8).reshape(count, -1)[:, :width], scales


def _four(blocks: Array) -> tuple[Array, Array]:
    """Of blocks (R, N, group) the integers from -8 to 7, and the scale of each block."""
    at = np.abs(blocks).argmax(axis=-1)[..., None]
    peaks = np.take_along_axis(blocks, at, axis=-1)
    best: Array = np.ones(peaks.shape, np.float32)
    least: Array = np.full(peaks.shape, np.inf, np.float32)
    for end in (-8.0, 7.0):
        scales = (peaks / np.float32(end)).astype(np.float32)
        scales[scales == 0] = 1.0
        back = np.clip(np.rint(blocks / scales), -8, 7) * scales
        error = np.square(back - blocks).sum(axis=-1, keepdims=True)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return np.clip(np.rint(blocks / best), -8, 7), best[..., 0]


def rounded(rows: Array, bits: int, group: int = 0) -> Array:
    """The floats (R, K) that the integers of ``round_rows`` stand for."""
    integers, scales = round_rows(rows, bits, group)
    width = min(group or rows.shape[1], rows.shape[1])
    along: Array = np.repeat(scales, width, axis=1)[:, : rows.shape[1]]
    return integers.astype(np.float32) * along
