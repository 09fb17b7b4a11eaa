"""Nothing on a front is beaten, and everything else is, by something on it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgeattn.report.pareto import dominates, front

#: Few values, so that points are equal, and equal in one figure.
FIGURE = st.integers(0, 5) | st.floats(allow_nan=False)
POINTS = st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[FIGURE] * n), max_size=30))


@given(POINTS)
def test_of_the_front_none_is_dominated_and_every_other_is(points: list[tuple[float, ...]]) -> None:
    found = front(points)
    assert found == sorted(set(found))
    assert bool(found) == bool(points)
    for i, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        assert beaten == (i not in found)
        if beaten:
            assert any(dominates(points[j], point) for j in found)


@given(st.tuples(FIGURE, FIGURE), st.tuples(FIGURE, FIGURE))
def test_no_two_dominate_each_other(a: tuple[float, float], b: tuple[float, float]) -> None:
    assert not (dominates(a, b) and dominates(b, a))
    assert not dominates(a, a)


def test_equal_points_are_all_on_it() -> None:
    assert front([(1, 2), (2, 1), (1, 2), (2, 2), (3, 0)]) == [0, 1, 2, 4]
