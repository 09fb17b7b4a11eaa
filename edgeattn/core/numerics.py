"""How two sets of numbers are compared. NumPy only, so that a device without PyTorch can compare too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Largest relative L2 between an artifact's outputs and the float32 training-form reference, by precision.
TOLERANCES: dict[str, float] = {"fp32": 1e-5, "fp16": 5e-3, "w8": 5e-2, "w8a8": 2e-1, "w4": 3e-1, "fp8": 2e-1}
#: The same over all samples together, where single ones may be further off: one small output among others is no reason
#: to let all of them go that far.
TOGETHER: dict[str, float] = {"w8a8": 1e-1, "fp8": 1e-1}


@dataclass(frozen=True)
class Numerics:
    """Distance of one tensor from its reference.

    Attributes:
        relative_l2: ||y - r|| / ||r|| over the entries that are finite in both.
        max_abs: largest absolute difference over those entries.
        sqnr_db: 20 log10(||r|| / ||y - r||); inf when equal.
        cosine: cosine of the angle between both, flattened.
        top1_agreement: share of rows with the same argmax along the last axis; None for vectors and single values.
        nonfinite: entries of y that are NaN or infinite.
        nonfinite_reference: the same for r.
    """

    relative_l2: float
    max_abs: float
    sqnr_db: float
    cosine: float
    top1_agreement: float | None
    nonfinite: int
    nonfinite_reference: int

    def holds(self, tolerance: float) -> bool:
        """True when every entry of both is finite and the relative L2 is at most ``tolerance``."""
        return self.nonfinite == 0 and self.nonfinite_reference == 0 and self.relative_l2 <= tolerance

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is infinite (SQNR of equal tensors, error on a zero reference) is None."""
        data = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()}


def compare(reference: Array, other: Array) -> Numerics:
    """Measure ``other`` against ``reference`` (same shape, any real dtype), computing in float64.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, other {other.shape}")
    r = np.asarray(reference, dtype=np.float64)
    y = np.asarray(other, dtype=np.float64)
    finite_r, finite_y = np.isfinite(r), np.isfinite(y)
    both = finite_r & finite_y
    top1 = None
    if r.ndim >= 2 and r.shape[-1] > 1 and r.size:
        top1 = float(np.mean(np.argmax(r, axis=-1) == np.argmax(y, axis=-1)))
    rf, yf = r[both], y[both]
    norm_r, norm_y = float(np.linalg.norm(rf)), float(np.linalg.norm(yf))
    error = float(np.linalg.norm(yf - rf))
    relative = error / norm_r if norm_r > 0 else (0.0 if error == 0 else math.inf)
    if norm_r > 0 and norm_y > 0:
        cosine = float(np.dot(rf, yf) / (norm_r * norm_y))
    else:
        cosine = 1.0 if error == 0 else 0.0
    return Numerics(
        relative_l2=relative,
        max_abs=float(np.max(np.abs(yf - rf))) if rf.size else 0.0,
        sqnr_db=-20 * math.log10(relative) if 0 < relative < math.inf else (math.inf if relative == 0 else -math.inf),
        cosine=cosine,
        top1_agreement=top1,
        nonfinite=int(y.size - np.count_nonzero(finite_y)),
        nonfinite_reference=int(r.size - np.count_nonzero(finite_r)),
    )


def compare_all(reference: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Numerics]:
    """``compare`` for every named output of ``reference``; a missing one is a KeyError."""
    return {name: compare(value, other[name]) for name, value in reference.items()}


def lost_slices(reference: Array, other: Array) -> dict[int, list[int]]:
    """Slices of a tensor in which nothing is left of what the reference tells apart, by axis.

    The error in them is larger than the reference's own variation: a mean would do as well. One measure over the whole
    tensor does not see that, where other slices are larger: the scores beside boxes in pixels, say.

    Args:
        reference, other: (B, ...) of one shape, finite. The first axis is no axis to look along, nor is one whose
            slices hold fewer than 16 numbers.
    """
    found: dict[int, list[int]] = {}
    for axis in range(1, reference.ndim):
        count = reference.shape[axis]
        if count < 2 or reference.size < 16 * count:
            continue
        r, y = (np.moveaxis(v.astype(np.float64), axis, 0).reshape(count, -1) for v in (reference, other))
        varies = np.square(r - r.mean(axis=1, keepdims=True)).sum(axis=1)
        lost = (np.square(y - r).sum(axis=1) > varies) & (varies > 0)
        if lost.any():
            found[axis] = [int(i) for i in np.flatnonzero(lost)]
    return found
