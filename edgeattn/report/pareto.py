"""The Pareto front: what nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether ``a`` is nowhere larger than ``b``, and somewhere smaller."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other dominates, where less is better in every figure; equal points are all in."""
    # Whatever dominates a point comes before it in this order, and so does one of the front that does.
    order = sorted(range(len(points)), key=lambda i: tuple(points[i]))
    found: list[int] = []
    for i in order:
        if not any(dominates(points[j], points[i]) for j in found):
            found.append(i)
    return sorted(found)
