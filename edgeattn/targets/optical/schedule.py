"""How work is laid out on the planes of a 4f correlator: tiles, masks, frames.

One frame convolves the whole input plane with one kernel plane. Input tiles and kernel tiles are laid out in zones
of one pitch, so that the product of input tile i and kernel tile j appears in output zone i + j. With A input tiles
side by side in zones 0, C, 2C, ... and K kernel tiles in zones 0, AC, 2AC, ... every pair has a zone of its own (batch
tiling is K = 1, kernel tiling A = 1, mixed tiling both). C zones of an input tile hold its channels, and those of a
kernel tile the kernels in reverse order: products of a channel with its own kernel all meet in the last of the C zones
and are summed as fields, before any detection (channel tiling, Li et al. 2020, arXiv 2011.07391); products of a channel
with another's kernel fall into the zones between, which nobody reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from edgeattn.core.errors import ConversionFailed

Pair = tuple[int, int]

#: What may share a frame: input tiles, kernels, channels that are summed as fields. All of them is the default.
TILINGS = ("batch", "kernel", "channel")


@dataclass(frozen=True)
class Workload:
    """Convolutions that one operation of a program comes down to.

    Every one of ``rows`` inputs has ``groups * channels`` maps; a group has kernels of its own, ``kernels`` for each of
    its outputs and channels. Of the full convolution of a map with a kernel, ``map + kernel - 1`` long, wanted are
    ``out`` values from ``start`` on, ``stride`` apart; over the channels they are summed.

    Attributes:
        map, kernel, start, out, stride: (down, right).
        macs: multiply-accumulates that the operation needs for all rows; guards, and products that nobody reads, do not
            count.
    """

    name: str
    rows: int
    groups: int
    channels: int
    kernels: int
    map: Pair
    kernel: Pair
    start: Pair
    out: Pair
    stride: Pair = (1, 1)
    macs: int = 0

    @property
    def pitch(self) -> Pair:
        """The least distance of two tiles at which no wanted value has anything of a neighbour in it.

        The next tile's products begin at the pitch, those of the tile before end ``map + kernel - 1`` after where it
        began: M + N - 1 for a full convolution, M + ceil((N - 1) / 2) for a "same" one, M for a "valid" one. Planes of
        whole pitches may be taken as periodic, which changes no wanted value either.
        """
        ends = [a + (o - 1) * s + 1 for a, o, s in zip(self.start, self.out, self.stride, strict=True)]
        each = zip(self.map, self.kernel, self.start, ends, strict=True)
        down, right = (max(m, end, m + n - 1 - a) for m, n, a, end in each)
        return down, right

    def check_fits(self, plane: Pair) -> None:
        """Raises ConversionFailed where a kernel, or a map with what its kernel adds, is larger than the plane."""
        over = [n > size for n, size in zip(self.kernel, plane, strict=True)]
        if any(over):
            raise ConversionFailed(
                "a kernel is larger than the optical plane",
                value=f"{self.kernel[0]} x {self.kernel[1]}",
                where=f"module {self.name or '(model)'}",
                why=f"the plane has {plane[0]} x {plane[1]} pixels",
                fix="use a device with a larger plane, or a smaller kernel",
            )
        if any(tile > size for tile, size in zip(self.pitch, plane, strict=True)):
            raise ConversionFailed(
                "a map is larger than the optical plane",
                value=f"{self.map[0]} x {self.map[1]}, with its kernel {self.pitch[0]} x {self.pitch[1]}",
                where=f"module {self.name or '(model)'}",
                why=f"the plane has {plane[0]} x {plane[1]} pixels",
                fix="use a device with a larger plane, or smaller inputs",
            )


@dataclass(frozen=True)
class Plan:
    """How a workload is shown on a plane.

    Attributes:
        plane: pixels, (down, right). pitch: of the zones.
        tiles: input tiles of a frame, (down, right); each holds one row's maps of one group.
        kernels: kernel tiles of a frame, each of one output of one group. channels: zones of a tile.
        groups: how many groups share a frame; inputs of one meet kernels of another for nothing then.
    """

    work: Workload
    plane: Pair
    pitch: Pair
    tiles: Pair
    kernels: Pair
    channels: Pair
    groups: int = 1

    @property
    def rows_at_once(self) -> int:
        """Rows in a frame."""
        return math.prod(self.tiles) // self.groups

    @property
    def kernels_at_once(self) -> int:
        """Outputs of each group in a frame."""
        return math.prod(self.kernels) // self.groups

    @property
    def channels_at_once(self) -> int:
        """Channels that are summed as fields; sums of several frames are electronic."""
        return math.prod(self.channels)

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        """How often (groups, rows, kernels, channels) are gone through."""
        work = self.work
        return (
            -(-work.groups // self.groups),
            -(-work.rows // self.rows_at_once),
            -(-work.kernels // self.kernels_at_once),
            -(-work.channels // self.channels_at_once),
        )

    @property
    def frames(self) -> int:
        """Frames for all rows."""
        return math.prod(self.blocks)

    @property
    def masks(self) -> int:
        """Different masks."""
        groups, _, kernels, channels = self.blocks
        return groups * kernels * channels

    @property
    def inputs(self) -> int:
        """Different input planes."""
        groups, rows, _, channels = self.blocks
        return groups * rows * channels

    @property
    def extent(self) -> Pair:
        """Pixels that are used, which is the least period of a circular convolution that gives the same numbers."""
        each = zip(self.tiles, self.kernels, self.channels, self.pitch, strict=True)
        down, right = (a * k * c * s for a, k, c, s in each)
        return down, right

    @property
    def useful_pixels(self) -> int:
        """Wanted pixels of all frames."""
        work = self.work
        return work.rows * work.groups * work.kernels * math.prod(work.out) * self.blocks[3]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"frames": self.frames, "masks": self.masks}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """The inverse of ``as_dict``."""
        fields = {key: value for key, value in data.items() if key not in ("frames", "masks", "work")}
        return Plan(Workload(**plain(data["work"])), **plain(fields))


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields read from JSON, which has lists where there were tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _counts(total: int, most: int) -> list[int]:
    """The smallest numbers at once that need so many goes each: ceil(total / n) for n goes."""
    return sorted({size for goes in range(1, total + 1) if (size := -(-total // goes)) <= most} | {1})


def _splits(count: int, zones: Pair) -> Iterator[Pair]:
    """Ways to place so many tiles in a grid: no row of the grid can be left away."""
    seen = set()
    for down in range(1, min(count, zones[0]) + 1):
        right = -(-count // down)
        if right <= zones[1] and right not in seen:
            seen.add(right)
            yield down, right


def _grids(total: int, zones: Pair, alone: bool) -> np.ndarray[Any, Any]:
    """(count, down, right) of every way to have some of ``total`` in a frame."""
    counts = [1] if alone else _counts(total, math.prod(zones))
    return np.array([(n, *split) for n in counts for split in _splits(n, zones)], np.int64)


def _arranged(need: int, most: Pair) -> Pair:
    """The smallest grid of at least ``need`` tiles within ``most``, as square as can be."""
    found = []
    for down in range(1, min(need, most[0]) + 1):
        right = -(-need // down)
        if right <= most[1]:
            found.append((down * right, abs(down - right), (down, right)))
    return min(found)[2]


def _search(work: Workload, zones: Pair, groups: int, tilings: Sequence[str]) -> tuple[tuple[int, ...], Any]:
    """The best grids with so many groups in a frame, and what they cost: (frames, masks, zones that are used)."""
    best: tuple[int, ...] | None = None
    chosen: Any = None
    kernels = _grids(work.kernels, zones, "kernel" not in tilings)
    if groups > 1:
        # A kernel tile belongs to one group.
        counts = sorted({int(n) for n in kernels[:, 0]})
        kernels = np.array([(n, *split) for n in counts for split in _splits(n * groups, zones)], np.int64)
    if not len(kernels):
        return (), None
    count, down, right = kernels.T
    most = work.rows if "batch" in tilings else 1
    for c, cy, cx in _grids(work.channels, zones, "channel" not in tilings):
        ay, ax = zones[0] // (down * cy), zones[1] // (right * cx)
        rows = np.minimum(ay * ax // groups, most)
        fits = rows > 0
        if not fits.any():
            continue
        safe = np.maximum(rows, 1)
        masks = -(-work.groups // groups) * -(-work.kernels // count) * -(-work.channels // int(c))
        frames = masks * -(-work.rows // safe)
        need = safe * groups
        ay = np.minimum(ay, -(-need // np.maximum(ax, 1)))
        area = need * down * right * cy * cx
        shape = np.abs(np.log((down * cy * np.maximum(ay, 1)) / (right * cx * -(-need // np.maximum(ay, 1)))))
        order = np.lexsort((shape, area, masks, np.where(fits, frames, np.iinfo(np.int64).max)))
        i = int(order[0])
        cost = (int(frames[i]), int(masks[i]), int(area[i]))
        if best is None or cost < best:
            best, chosen = cost, (int(rows[i]), (int(down[i]), int(right[i])), (int(cy), int(cx)))
    return best or (), chosen


@lru_cache(maxsize=4096)
def make_plan(work: Workload, plane: Pair, tilings: tuple[str, ...] = TILINGS, pitch: Pair | None = None) -> Plan:
    """The plan with the fewest frames; of those the one with the fewest masks, then with the least of the plane.

    Args:
        plane: pixels, (down, right).
        tilings: what may share a frame, of ``TILINGS``.
        pitch: of the zones, where it is not the least exact one.

    Raises:
        ConversionFailed: a kernel or a map is larger than the plane.
    """
    work.check_fits(plane)
    used = pitch or work.pitch
    zones = plane[0] // used[0], plane[1] // used[1]
    most = min(work.groups, math.prod(zones))
    best: tuple[int, ...] = ()
    chosen: Any = None
    count = 1
    for groups in _counts(work.groups, most):
        cost, grids = _search(work, zones, groups, tilings)
        if cost and (not best or cost < best):
            best, chosen, count = cost, grids, groups
    rows, kernels, channels = chosen
    room = zones[0] // (kernels[0] * channels[0]), zones[1] // (kernels[1] * channels[1])
    return Plan(work, plane, used, _arranged(rows * count, room), kernels, channels, count)


def in_parts(work: Workload, inputs: int, kernels: int) -> Workload:
    """A workload whose inputs and kernels are shown in so many parts, see ``device.SIGNS``: more rows, more kernels."""
    return replace(work, rows=work.rows * inputs, kernels=work.kernels * kernels)
