"""ggml's blocks of small numbers: from float rows to the bytes of a GGUF tensor.

The ``gguf`` package (0.19) knows all layouts and reads them; it writes Q8_0 and Q4_0, and no Q4_K. Q4_0 is written
here too, so that its integers are those of ``quant.rounding``, as on other targets.
"""

from __future__ import annotations

import gguf
import numpy as np

from edgeattn.core.numerics import Array
from edgeattn.quant.rounding import round_rows

Kind = gguf.GGMLQuantizationType
F32, F16, Q8_0, Q4_0, Q4_K = Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_K

#: Numbers that share a scale, and of Q4_K those of which eight make a block.
GROUP = 32
#: Weights that are rounded at a time: what a CPU's cache holds.
_AT_ONCE = 1 << 16
#: Into how many steps a Q4_K group's range is cut by turns, the best being kept. With these six the error of normal
#: weights is 0.5 % above what 21 give, as many as ggml tries; with 15 alone it is 6 % above.
_STEPS = np.linspace(13.0, 15.8, 6, dtype=np.float32)


def fitting(kind: Kind, width: int) -> Kind:
    """``kind``, or where rows of ``width`` numbers cannot be cut into its blocks the next one that they can be.

    Q4_K falls back to Q4_0, and what has blocks of 32 to F16.
    """
    choices = (kind, Q4_0, F16) if kind == Q4_K else (kind, F16)
    found: Kind = next(one for one in choices if width % gguf.GGML_QUANT_SIZES[one][0] == 0)
    return found


def byte_shape(shape: tuple[int, ...], kind: Kind) -> tuple[int, ...]:
    """Shape (..., bytes of a row) of a tensor of ``shape`` in blocks of ``kind``."""
    return tuple(gguf.quant_shape_to_byte_shape(shape, kind))


def encode(rows: Array, kind: Kind) -> Array:
    """Float rows (R, K) as a GGUF tensor's data: floats of ``kind``, or uint8 (R, bytes of a row)."""
    if kind in (F32, F16):
        return rows.astype(np.float32 if kind == F32 else np.float16, copy=False)
    encoder = {Q8_0: _q8_0, Q4_0: _q4_0, Q4_K: _q4_k}[kind]
    out = np.empty(byte_shape(rows.shape, kind), np.uint8)
    step = max(1, _AT_ONCE // rows.shape[1])
    for i in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[i : i + step], np.float32)
        out[i : i + step] = encoder(part).reshape(len(part), -1)
    return out


def decode(data: Array, kind: Kind) -> Array:
    """The float32 numbers that a tensor's data stand for."""
    numbers: Array = gguf.quants.dequantize(data, kind)
    return numbers if numbers.flags.writeable else numbers.copy()


def _q8_0(rows: Array) -> Array:
    """(R, K) -> (blocks, 34): a float16 scale and 32 integers."""
    blocks: Array = gguf.quants.quantize(rows, Q8_0)
    return blocks


def _q4_0(rows: Array) -> Array:
    """(R, K) -> (blocks, 18): a float16 scale and 32 integers plus 8, the 16 last ones in the upper halves of bytes."""
    integers, scales = round_rows(rows.reshape(-1, GROUP), 4)
    return np.concatenate([scales.astype(np.float16).view(np.uint8), _nibbles(integers + 8)], axis=1)


def _nibbles(integers: Array) -> Array:
    """(..., 2 n) of 0 to 15 -> uint8 (..., n)."""
    low, high = np.split(integers.astype(np.uint8), 2, axis=-1)
    joined: Array = low | high << np.uint8(4)
    return joined


def _q4_k(rows: Array) -> Array:
    """(R, K) -> (super-blocks, 144): 8 groups of 32 numbers 0 to 15, each with a scale and an offset of 6 bits."""
    groups = rows.reshape(-1, 8, GROUP)
    steps, floors = _affine(groups)
    # One float16 for the scales and one for the offsets of a super-block; both are at least 0.
    scale = (steps.max(axis=1, keepdims=True) / 63).astype(np.float16)
    offset = (floors.max(axis=1, keepdims=True) / 63).astype(np.float16)
    scales, offsets = _six(steps, scale), _six(floors, offset)
    step = (scale.astype(np.float32) * scales)[..., None]
    low = (offset.astype(np.float32) * offsets)[..., None]
    integers = np.clip(np.rint((groups + low) / np.where(step > 0, step, 1)), 0, 15).astype(np.uint8)
    head = np.concatenate([scale, offset], axis=1).view(np.uint8)
    # Two groups share 32 bytes.
    data = _nibbles(integers.reshape(len(groups), 4, 2 * GROUP)).reshape(len(groups), -1)
    return np.concatenate([head, _packed(scales, offsets), data], axis=1)


def _six(values: Array, unit: Array) -> Array:
    """Values as uint8 multiples, 0 to 63, of a float16 unit."""
    unit = unit.astype(np.float32)
    integers: Array = np.clip(np.rint(values / np.where(unit > 0, unit, 1)), 0, 63).astype(np.uint8)
    return integers


def _packed(scales: Array, offsets: Array) -> Array:
    """Six-bit scales and offsets (B, 8) -> (B, 12), as ggml packs them: the last four of both are cut in two."""
    first = scales[:, :4] | (scales[:, 4:] >> np.uint8(4)) << np.uint8(6)
    second = offsets[:, :4] | (offsets[:, 4:] >> np.uint8(4)) << np.uint8(6)
    third = (scales[:, 4:] & np.uint8(15)) | (offsets[:, 4:] & np.uint8(15)) << np.uint8(4)
    return np.concatenate([first, second, third], axis=1)


def _affine(groups: Array) -> tuple[Array, Array]:
    """Step and offset (B, 8), not negative, for which ``step * (0 to 15) - offset`` is nearest to groups (B, 8, 32).

    Least squares for the integers that a few widths of the steps give, as ggml's ``make_qkx2_quants`` does it.
    """
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    span = groups.max(axis=-1, keepdims=True) - low
    span[span <= 0] = 1
    sum_x = groups.sum(axis=-1)
    best_step, best_low = span[..., 0] / 15, low[..., 0]
    least = np.full(sum_x.shape, np.inf, np.float32)
    for steps in _STEPS:
        integers = np.clip(np.rint((groups - low) * (steps / span)), 0, 15)
        sum_l = integers.sum(axis=-1)
        sum_ll = np.einsum("...i,...i", integers, integers)
        sum_lx = np.einsum("...i,...i", integers, groups)
        spread = GROUP * sum_ll - np.square(sum_l)
        safe = np.where(spread > 0, spread, 1)
        step = (GROUP * sum_lx - sum_l * sum_x) / safe
        base = (sum_ll * sum_x - sum_l * sum_lx) / safe
        above = base > 0
        step = np.where(above, sum_lx / np.where(sum_ll > 0, sum_ll, 1), step)
        base = np.where(above, 0, base)
        error = np.square(step[..., None] * integers + base[..., None] - groups).sum(axis=-1)
        better = (error < least) & (spread > 0)
        least = np.where(better, error, least)
        best_step, best_low = np.where(better, step, best_step), np.where(better, base, best_low)
    return best_step, -best_low
