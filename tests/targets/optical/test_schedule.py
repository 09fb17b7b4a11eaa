"""Plans: exact pitches, the fewest frames, and every one of them carried out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.core.errors import ConversionFailed
from edgeattn.device import Effects, Optics
from edgeattn.targets.optical.convolve import Convolver, direct, input_planes, kernel_plane, parts, wanted
from edgeattn.targets.optical.physics import ideal_field, ideal_spectrum
from edgeattn.targets.optical.schedule import Plan, Workload, in_parts, make_plan


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Any maps, kernels, wanted values and strides, few of each."""
    numbers = st.integers(1, 6)
    sides = []
    for _ in range(2):
        m, n = draw(st.integers(1, 8)), draw(st.integers(1, 6))
        start, stride = draw(st.integers(0, m + n - 2)), draw(st.integers(1, 3))
        out = draw(st.integers(1, (m + n - 2 - start) // stride + 1))
        sides.append((m, n, start, out, stride))
    rest = zip(*sides, strict=True)
    return Workload(
        "w", draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(numbers), draw(numbers), *map(tuple, rest)
    )


def convolution(map_: int, kernel: int, kind: str, **counts: int) -> Workload:
    """Square maps with a full, same or valid convolution."""
    start = {"full": 0, "same": (kernel - 1) // 2, "valid": kernel - 1}[kind]
    out = {"full": map_ + kernel - 1, "same": map_, "valid": map_ - kernel + 1}[kind]
    given = {"rows": 1, "groups": 1, "channels": 1, "kernels": 1} | counts
    pairs = ((value, value) for value in (map_, kernel, start, out))
    return Workload("w", *(given[name] for name in ("rows", "groups", "channels", "kernels")), *pairs)


def tensors(work: Workload, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(work.rows, work.groups, work.channels, *work.map, generator=generator)
    kernels = torch.randn(work.groups, work.kernels, work.channels, *work.kernel, generator=generator)
    return x, kernels


def distance(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((other - reference).norm() / reference.norm())


@settings(max_examples=150, deadline=None)
@given(workloads(), st.tuples(st.integers(16, 60), st.integers(16, 60)))
def test_a_plan_that_is_carried_out_gives_the_convolution(work: Workload, plane: tuple[int, int]) -> None:
    x, kernels = tensors(work)
    optics = Optics(rows=plane[0], cols=plane[1], frame_rate_hz=1.0)
    assert distance(direct(x, kernels, work), Convolver(kernels, work, optics)(x)) < 1e-5
    assert distance(direct(x, kernels, work), Convolver(kernels, work, optics, as_planned=True)(x)) < 1e-5


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from(["reference", "offset", "kernel_split", "full_split"]))
def test_every_scheme_of_signs_gives_the_convolution(work: Workload, sign: str) -> None:
    x, kernels = tensors(work)
    optics = Optics(rows=50, cols=70, frame_rate_hz=1.0)
    for shown in (x, x.abs()):
        reference = direct(shown, kernels, work)
        for as_planned in (False, True):
            seen = Convolver(kernels, work, optics, Effects(sign=sign), as_planned=as_planned)(shown)
            assert distance(reference, seen) < 1e-3


@settings(max_examples=30, deadline=None)
@given(workloads())
def test_a_camera_behind_plain_convolutions_is_the_one_behind_planes(work: Workload) -> None:
    """Frames are exposed alike; what float32 has between two levels of the camera may fall to either side."""
    x, kernels = tensors(work)
    optics, effects = Optics(rows=50, cols=70, frame_rate_hz=1.0), Effects(sign="kernel_split", adc_bits=12)
    plain, planes = (Convolver(kernels, work, optics, effects, as_planned=on)(x) for on in (False, True))
    off = ((plain - planes).abs() > 1e-4 * planes.abs().amax()).float().mean()
    assert float(off) <= 0.02 + 1 / planes.numel()


@pytest.mark.parametrize(
    "tilings", [(), ("batch",), ("kernel",), ("channel",), ("batch", "kernel"), ("batch", "channel")]
)
@settings(max_examples=20, deadline=None)
@given(work=workloads())
def test_fewer_tilings_are_as_exact(tilings: tuple[str, ...], work: Workload) -> None:
    plan = make_plan(work, (60, 60), tilings)
    assert ("batch" in tilings) or plan.rows_at_once == 1
    assert ("kernel" in tilings) or plan.kernels_at_once == 1
    assert ("channel" in tilings) or plan.channels_at_once == 1
    x, kernels = tensors(work)
    assert distance(direct(x, kernels, work), carried_out(x, kernels, plan)) < 1e-5


def carried_out(x: torch.Tensor, kernels: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A plan, frame by frame, on its whole plane: (rows, groups, kernels, out1, out2)."""
    work = plan.work
    found = torch.zeros(work.rows, work.groups, work.kernels, *work.out)
    groups, rows, blocks, channels = plan.blocks
    for group, kernel, channel in itertools.product(range(groups), range(blocks), range(channels)):
        mask = ideal_spectrum(kernel_plane(kernels, plan, (group, kernel, channel), plan.plane), plan.plane)
        planes = input_planes(x, plan, group, channel)
        assert len(planes) == rows
        for frame, plane in enumerate(planes):
            field = ideal_field(ideal_spectrum(plane[None], plan.plane), mask, plan.plane)
            (values,) = wanted(field, plan)
            for k, g, r in itertools.product(range(len(values)), range(values.shape[1]), range(values.shape[2])):
                at = (frame * plan.rows_at_once + r, group * plan.groups + g, kernel * plan.kernels_at_once + k)
                if at[0] < work.rows and at[1] < work.groups and at[2] < work.kernels:
                    found[at] += values[k, g, r]
    return found


@settings(max_examples=40, deadline=None)
@given(workloads(), st.sampled_from([None, "kernel_split", "reference"]), st.integers(1, 12))
def test_some_frames_of_a_plan_are_those_of_the_whole(work: Workload, sign: str | None, most: int) -> None:
    x, kernels = tensors(work)
    optics = Optics(rows=20, cols=24, frame_rate_hz=1.0)
    convolver = Convolver(kernels, work, optics, None if sign is None else Effects(sign=sign), as_planned=True)
    reference, seen, frames = convolver.carried_out(x, most)
    assert distance(reference, seen) < 1e-3
    plan = convolver.plan(work.rows, bool((x < 0).any()))
    assert frames <= max(most, plan.blocks[3])
    if plan.frames <= most:
        assert frames == plan.frames


@pytest.mark.parametrize("kind", ["full", "same", "valid"])
@pytest.mark.parametrize("map_", [5, 8])
@pytest.mark.parametrize("kernel", [1, 3, 4, 5])
def test_the_pitch_is_the_least_exact_one(kind: str, map_: int, kernel: int) -> None:
    """M + N - 1, M + ceil((N - 1) / 2), M, by brute force: at one pixel less mixed tiles disturb each other."""
    work = convolution(map_, kernel, kind, rows=4, kernels=4, channels=2)
    exact = {"full": map_ + kernel - 1, "same": map_ + math.ceil((kernel - 1) / 2), "valid": map_}[kind]
    assert work.pitch == (exact, exact)
    assert convolution(map_, kernel, kind).pitch == (exact, exact)
    x, kernels = tensors(work)
    for pitch in range(map_, map_ + kernel + 1):
        plan = Plan(work, (8 * pitch, 8 * pitch), (pitch, pitch), (2, 2), (2, 2), (1, 2))
        error = distance(direct(x, kernels, work), carried_out(x, kernels, plan))
        assert (error < 1e-5) == (pitch >= exact), pitch


def test_a_kernel_as_large_as_its_map_needs_a_quarter_of_the_plane_of_full_pitches() -> None:
    """72 900 tiles of 8 x 8 on 2160 x 2160 pixels, 20 736 by FatNet's formula."""
    work = convolution(8, 8, "valid", rows=100_000)
    assert make_plan(work, (2160, 2160)).rows_at_once == 72_900
    assert make_plan(work, (2160, 2160), pitch=(15, 15)).rows_at_once == 20_736


def frames(work: Workload, zones: tuple[int, int]) -> int:
    """The fewest frames, by trying every grid."""
    ny, nx = zones
    grids = [(y, x) for y in range(1, ny + 1) for x in range(1, nx + 1)]
    best = math.inf
    for (ay, ax), (ky, kx), (cy, cx) in itertools.product(grids, grids, grids):
        if ay * ky * cy > ny or ax * kx * cx > nx:
            continue
        for groups in range(1, work.groups + 1):
            rows, kernels = ay * ax // groups, ky * kx // groups
            if rows and kernels:
                goes = (-(-work.groups // groups), -(-work.rows // rows), -(-work.kernels // kernels))
                best = min(best, math.prod(goes) * -(-work.channels // (cy * cx)))
    return int(best)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5)),
    *[st.integers(1, n) for n in (30, 3, 5, 7)],
)
def test_no_plan_has_fewer_frames(zones: tuple[int, int], rows: int, groups: int, channels: int, kernels: int) -> None:
    work = convolution(3, 3, "valid", rows=rows, groups=groups, channels=channels, kernels=kernels)
    plan = make_plan(work, (3 * zones[0], 3 * zones[1]))
    assert plan.frames == frames(work, zones)
    used = [a * k * c for a, k, c in zip(plan.tiles, plan.kernels, plan.channels, strict=True)]
    assert used[0] <= zones[0]
    assert used[1] <= zones[1]


def test_pairs_of_tiles_and_kernels_fill_a_frame_and_never_more() -> None:
    work = convolution(16, 9, "valid", rows=64, kernels=24)
    plan = make_plan(work, (2160, 2160))
    assert plan.frames == 1
    assert plan.rows_at_once * plan.kernels_at_once >= 64 * 24
    most = (2160 // 16) ** 2
    many = make_plan(replace(work, rows=10_000), (2160, 2160))
    assert many.frames >= 10_000 * 24 / most


def test_parts_for_signs_are_rows_and_kernels() -> None:
    work = convolution(4, 3, "valid", rows=5, kernels=7)
    assert parts(None, True) == (1, 1)
    assert parts(Effects(sign="kernel_split"), False) == (1, 2)
    assert parts(Effects(sign="kernel_split"), True) == (2, 2)
    assert parts(Effects(sign="full_split"), False) == (2, 2)
    assert parts(Effects(sign="offset"), True) == (1, 2)
    assert parts(Effects(sign="reference"), True) == (1, 1)
    both = in_parts(work, 2, 2)
    assert (both.rows, both.kernels) == (10, 14)


def test_what_is_larger_than_the_plane_is_refused_by_name() -> None:
    with pytest.raises(ConversionFailed, match="kernel is larger than the optical plane") as caught:
        make_plan(replace(convolution(9, 9, "valid"), name="stem"), (8, 64))
    assert caught.value.where == "module stem"
    assert caught.value.exit_code == 4
    with pytest.raises(ConversionFailed, match="map is larger than the optical plane"):
        make_plan(convolution(9, 3, "same"), (8, 64))
    with pytest.raises(ConversionFailed, match="map is larger"):
        make_plan(convolution(8, 3, "full"), (8, 64))


def test_a_plan_survives_json() -> None:
    import json

    plan = make_plan(convolution(5, 3, "same", rows=7, groups=2, channels=3, kernels=4), (64, 48))
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
