"""Which numbers of golden samples hold, alone and together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgeattn import targets
from edgeattn.pipeline.stages.verify import AS_RUN, _failed, _Measured

BOUNDS = (0.2, 0.1)


def samples(*errors: float, size: float = 1.0) -> list[_Measured]:
    """Golden samples of one output, each as far off as said."""
    reference = np.full((1, 4), size, "f4")
    return [_Measured(i, AS_RUN, "y", reference, reference * (1 + error)) for i, error in enumerate(errors)]


def test_one_sample_may_be_further_off_than_all_together() -> None:
    assert _failed(samples(0.19, 0.01, 0.02, 0.01), BOUNDS) == []


def test_all_together_may_not() -> None:
    [(sample, words)] = _failed(samples(0.12, 0.13, 0.11), BOUNDS)
    assert sample == 1
    assert "all 3 golden samples together" in words
    assert "0.12" in words


def test_a_sample_beyond_its_own_bound_is_the_one_that_is_named() -> None:
    assert [sample for sample, _ in _failed(samples(0.01, 0.3, 0.01), BOUNDS)] == [1]


def test_what_is_not_finite_never_holds() -> None:
    broken = samples(0.0, 0.0)
    broken[1].value[0, 0] = np.nan
    assert [sample for sample, _ in _failed(broken, BOUNDS)] == [1]


def test_outputs_are_judged_apart() -> None:
    large = [_Measured(m.sample, AS_RUN, "boxes", m.reference, m.value) for m in samples(0.0, 0.0, size=1e6)]
    [(_, words)] = _failed([*samples(0.15, 0.15), *large], BOUNDS)
    assert words.startswith("y of all 2")


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=6))
def test_equal_samples_hold_as_their_root_mean_square(errors: list[float]) -> None:
    together = float(np.sqrt(np.mean(np.square(errors))))
    holds = max(errors) <= 0.2 and together <= 0.1
    close = abs(max(errors) - 0.2) < 1e-6 or abs(together - 0.1) < 1e-6
    assert close or (not _failed(samples(*errors), BOUNDS)) == holds


def test_what_holds_together_is_no_looser() -> None:
    target = targets.get("onnx")
    assert target.tolerance_together("w8a8") < target.tolerance("w8a8")
    assert target.tolerance_together("fp32") == target.tolerance("fp32")
