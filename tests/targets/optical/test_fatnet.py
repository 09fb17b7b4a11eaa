"""FatNet's published times on optics (AI 2023, 4(2), 361-374), from layer lists by our cost model.

The lists are those of the group's repository (github.com/riadibadulla/FatSpitter): channels in and out, kernel, side of
the map. Classifiers do not count there.
"""

from __future__ import annotations

import pytest

from edgeattn.device import Effects, Optics
from edgeattn.targets.optical.cost import cost, plans_of
from edgeattn.targets.optical.schedule import Workload

Layer = tuple[int, int, int, int]
STEM: list[Layer] = [(3, 64, 7, 32), *[(64, 64, 3, 16)] * 4]
RESNET = [
    *STEM,
    *[(64, 128, 3, 16), *[(128, 128, 3, 8)] * 3],
    *[(128, 256, 3, 8), *[(256, 256, 3, 4)] * 3],
    *[(256, 512, 3, 4), *[(512, 512, 3, 2)] * 3],
]
FATNET = [
    *STEM,
    *[(64, 82, 4, 16), *[(82, 82, 5, 10)] * 3],
    *[(82, 78, 7, 10), *[(78, 78, 10, 10)] * 3],
    *[(78, 151, 10, 10), (151, 155, 10, 10), (155, 151, 10, 10), (151, 155, 10, 10)],
]
#: 2 MHz; two frames for the parts of a kernel, and twice that, for a reason that is not published: 2 us an operation.
OPTICS = Optics(rows=2160, cols=2160, frame_rate_hz=2e6, repeats=2, effects=Effects(sign="kernel_split"))


def workloads(layers: list[Layer]) -> list[Workload]:
    """One image; same padding, non-negative inputs behind ReLUs."""
    found = []
    for i, (channels, kernels, kernel, side) in enumerate(layers):
        first = (kernel - 1) // 2
        pairs = ((value, value) for value in (side, kernel, first, side))
        found.append(Workload(f"conv{i}", 1, 1, channels, kernels, *pairs))
    return found


@pytest.mark.parametrize(("layers", "count"), [(RESNET, 1_220_800), (FATNET, 148_637)])
def test_the_numbers_of_convolutions(layers: list[Layer], count: int) -> None:
    assert sum(work.channels * work.kernels for work in workloads(layers)) == count


@pytest.mark.parametrize(
    ("layers", "batch", "seconds"),
    [(RESNET, 64, 3.815e-2), (FATNET, 64, 4.645e-3), (RESNET, 3136, 7.786e-4), (FATNET, 3136, 9.479e-5)],
)
def test_the_four_optical_times(layers: list[Layer], batch: int, seconds: float) -> None:
    works = workloads(layers)
    signed = [False] * len(works)
    plans = plans_of(works, signed, OPTICS, batch, tilings=("batch",), full_pitch=True)
    assert cost(plans, OPTICS, batch).per_input_s == pytest.approx(seconds, rel=1e-4)


def test_their_largest_batch_is_what_the_first_layer_has_room_for() -> None:
    first, *_ = workloads(FATNET)
    (plan,) = plans_of([first], [False], OPTICS, 10_000, tilings=("batch",), full_pitch=True)
    assert plan.rows_at_once == 3136


def test_our_own_plans_need_a_fraction_of_the_frames() -> None:
    """Mixed tiling, exact pitches and sums of channels as fields, at their smaller batch."""
    works = workloads(FATNET)
    signed = [False] * len(works)
    theirs = plans_of(works, signed, OPTICS, 64, tilings=("batch",), full_pitch=True)
    ours = plans_of(works, signed, OPTICS, 64)
    assert sum(plan.frames for plan in ours) * 20 < sum(plan.frames for plan in theirs)
