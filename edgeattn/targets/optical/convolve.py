"""Plans carried out: tiles are laid on the planes, frames go through the correlator, wanted values are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from edgeattn.device import SIGNS, Effects, Optics
from edgeattn.targets.optical.physics import Correlator, ideal_field, ideal_spectrum
from edgeattn.targets.optical.schedule import TILINGS, Pair, Plan, Workload, in_parts, make_plan

#: Pixels of all frames that go through the correlator together.
_PIXELS = 1 << 24
#: Side of planes, and pixels of frames at a time, that stay in a processor's cache.
_SMALL, _CACHED = 128, 1 << 18


def fast_size(size: int, most: int) -> int:
    """The least length from ``size`` on that has no prime factor above 5; ``most`` where that is less."""
    for length in range(size, most):
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
    return most


def input_planes(x: Tensor, plan: Plan, group: int, channel: int) -> Tensor:
    """Input planes (F, H, W) of all rows, for one block of groups and one of channels.

    Args:
        x: maps (rows, groups, channels, M1, M2).
    """
    (ay, ax), (cy, cx), (sy, sx) = plan.tiles, plan.channels, plan.pitch
    rows, groups, channels = plan.rows_at_once, plan.groups, plan.channels_at_once
    x = x[:, group * groups : (group + 1) * groups, channel * channels : (channel + 1) * channels]
    blocks = -(-len(x) // rows)
    x = _filled(x, (blocks * rows, groups, channels))
    tiles = x.reshape(blocks, rows * groups, channels, *x.shape[3:])
    tiles = _filled(tiles, (blocks, ay * ax, cy * cx))
    tiles = torch.nn.functional.pad(tiles, (0, sx - x.shape[4], 0, sy - x.shape[3]))
    tiles = tiles.reshape(blocks, ay, ax, cy, cx, sy, sx)
    return tiles.permute(0, 1, 3, 5, 2, 4, 6).reshape(blocks, ay * cy * sy, ax * cx * sx)


def _filled(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``x`` with zeros at the ends of its first dimensions."""
    missing = [size - have for size, have in zip(sizes, x.shape, strict=False)]
    if not any(missing):
        return x
    pads = [0] * (2 * (x.ndim - len(sizes)))
    for count in reversed(missing):
        pads += [0, count]
    return torch.nn.functional.pad(x, pads)


def kernel_plane(kernels: Tensor, plan: Plan, block: tuple[int, int, int], period: Pair) -> Tensor:
    """The plane (L1, L2) of kernels whose transform is the mask of a (group, kernel, channel) block.

    Args:
        kernels: (groups, kernels, channels, N1, N2), as they convolve. period: (L1, L2); tiles wrap around.
    """
    group, kernel, channel = block
    (ay, ax), (_, kx), (cy, cx), (sy, sx) = plan.tiles, plan.kernels, plan.channels, plan.pitch
    part = kernels[
        group * plan.groups : (group + 1) * plan.groups,
        kernel * plan.kernels_at_once : (kernel + 1) * plan.kernels_at_once,
        channel * plan.channels_at_once : (channel + 1) * plan.channels_at_once,
    ]
    g, k, c = (torch.arange(n) for n in part.shape[:3])
    tile = (k * plan.groups)[None, :] + g[:, None]  # (groups, kernels)
    down = ((tile // kx * ay * cy)[..., None] + cy - 1 - c // cx) * sy
    right = ((tile % kx * ax * cx)[..., None] + cx - 1 - c % cx) * sx
    rows = (down[..., None] + torch.arange(part.shape[3])) % period[0]
    cols = (right[..., None] + torch.arange(part.shape[4])) % period[1]
    place = rows[..., :, None] * period[1] + cols[..., None, :]
    plane = torch.zeros(period[0] * period[1], dtype=part.dtype)
    return plane.index_add(0, place.flatten(), part.flatten()).reshape(period)


def wanted(planes: Tensor, plan: Plan) -> Tensor:
    """The wanted values of output planes (F, L1, L2): (F, kernels of a frame, groups, rows of a frame, out1, out2)."""
    (ay, ax), (ky, kx), (cy, cx), (sy, sx) = plan.tiles, plan.kernels, plan.channels, plan.pitch
    planes = planes.contiguous()
    frames, height, width = planes.shape
    work = plan.work
    first = planes.storage_offset() + ((cy - 1) * sy + work.start[0]) * width + (cx - 1) * sx + work.start[1]
    down, right = cy * sy * width, cx * sx
    seen = planes.as_strided(
        (frames, ky, ay, kx, ax, *work.out),
        (height * width, ay * down, down, ax * right, right, work.stride[0] * width, work.stride[1]),
        first,
    )
    pairs = seen.permute(0, 1, 3, 2, 4, 5, 6).reshape(frames, ky * kx, ay * ax, *work.out)
    groups, kernels, rows = plan.groups, plan.kernels_at_once, plan.rows_at_once
    pairs = pairs[:, : kernels * groups, : rows * groups]
    pairs = pairs.reshape(frames, kernels, groups, rows, groups, *work.out)
    if groups == 1:
        return pairs[:, :, :, :, 0]
    return pairs.diagonal(dim1=2, dim2=4).movedim(-1, 2)


class MaskStore:
    """Masks that are kept instead of being transformed anew at every run, as long as there is room.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = 1 << 30) -> None:
        self._room = most
        self._kept: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The mask of that key."""
        if key in self._kept:
            return self._kept[key]
        mask = make()
        size = mask.numel() * mask.element_size()
        if not mask.requires_grad and size <= self._room:
            self._kept[key] = mask
            self._room -= size
        return mask


class Convolver:
    """One operation on the planes of a device: its kernels, which stay, are convolved with whatever comes.

    What no effect depends on is not simulated at full length: an ideal correlator gives the same numbers on smaller
    planes, which are faster; and where nothing changes the field before the camera, it is a plain convolution.

    Args:
        kernels: (groups, kernels, channels, N1, N2), as they convolve.
        work: what is to be done, for any number of rows.
        effects: of the hardware; an ideal correlator, whose field is read with its sign, without.
        generator: of what is random. masks: where they are kept.
        as_planned: show everything on the device's planes all the same.
    """

    def __init__(
        self,
        kernels: Tensor,
        work: Workload,
        optics: Optics,
        effects: Effects | None = None,
        generator: torch.Generator | None = None,
        masks: MaskStore | None = None,
        as_planned: bool = False,
    ) -> None:
        self._kernels = kernels
        self._work = work
        self._plane = (optics.rows, optics.cols)
        self._effects = effects
        #: Effects on the field itself, which has to be computed as a complex one then.
        self._altered = effects if effects is not None and effects.of_field else None
        self._generator = generator or torch.Generator().manual_seed(effects.seed if effects else 0)
        self._masks = masks or MaskStore()
        self._as_planned = as_planned

    def plan(self, rows: int, signed: bool = True) -> Plan:
        """How a device shows so many rows. ``signed``: some of their numbers are negative."""
        work = replace(self._work, rows=rows)
        return make_plan(in_parts(work, *parts(self._effects, signed)), self._plane)

    def simulated(self, rows: int, signed: bool = True) -> Plan:
        """How they are shown here: on smaller planes, where they are ideal."""
        if self._effects is not None or self._as_planned:
            return self.plan(rows, signed)
        work = replace(self._work, rows=rows)
        down, right = (min(side, max(_SMALL, 2 * n)) for side, n in zip(self._plane, work.pitch, strict=True))
        # Where inputs fill a plane without any kernel beside them, their transform serves all kernels.
        full = rows * work.channels >= down * right // math.prod(work.pitch)
        return make_plan(work, (down, right), ("batch", "channel") if full else TILINGS)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (rows, groups, channels, M1, M2) to (rows, groups, kernels, out1, out2)."""
        plan, shown, kernels, lift = self._shown(x)
        plain = self._effects is not None and self._altered is None and not self._as_planned
        y = (self._plain if plain else self._on_planes)(shown, kernels, plan)
        work = self._work
        if y.shape[2] > work.kernels:
            y = y[:, :, : work.kernels] - y[:, :, work.kernels :]
        if len(y) > len(x):
            y = y[: len(x)] - y[len(x) :]
        return y if lift is None else y - lift * self._box()

    def _shown(self, x: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor | None]:
        """Plan, maps and kernels in the parts that are shown, and what the maps were lifted by."""
        signed = bool((x < 0).any())
        inputs, parts_of_kernels = parts(self._effects, signed)
        kernels, lift = self._kernels, None
        plan = self.simulated(len(x), signed)
        if self._effects is not None and self._effects.sign == "offset" and signed:
            lift = -x.detach().amin()
            x = x + lift
        if inputs == 2:
            x = torch.cat([x.clamp_min(0), (-x).clamp_min(0)])
        if parts_of_kernels == 2:
            kernels = torch.cat([kernels.clamp_min(0), (-kernels).clamp_min(0)], 1)
        return plan, x, kernels, lift

    def carried_out(self, x: Tensor, most: int) -> tuple[Tensor, Tensor, int]:
        """What frames of the plan give, beside plain convolutions of the same numbers, and how many frames that were.

        Args:
            x: maps (rows, groups, channels, M1, M2). most: frames; of more than that some are taken, spread over the
                plan, but all channels of each.
        """
        plan, shown, kernels, _ = self._shown(x)
        goes = list(plan.blocks[:3])
        while math.prod(goes) * plan.blocks[3] > most and max(goes) > 1:
            goes[goes.index(max(goes))] = (max(goes) + 1) // 2
        groups, rows, outputs = (
            _spread(count, some, size, total)
            for count, some, size, total in zip(
                plan.blocks[:3],
                goes,
                (plan.groups, plan.rows_at_once, plan.kernels_at_once),
                (plan.work.groups, plan.work.rows, plan.work.kernels),
                strict=True,
            )
        )
        work = replace(plan.work, groups=len(groups), rows=len(rows), kernels=len(outputs))
        shown, kernels = shown[rows][:, groups], kernels[groups][:, outputs]
        part = replace(plan, work=work)
        return direct(shown, kernels, work), self._on_planes(shown, kernels, part), part.frames

    def _box(self) -> Tensor:
        """What kernels make of a map of ones, known beforehand to electronics: (1, groups, kernels, out1, out2)."""
        work = self._work
        ones = torch.ones(1, work.groups, work.channels, *work.map)
        return direct(ones, self._kernels, work)

    def _on_planes(self, x: Tensor, kernels: Tensor, plan: Plan) -> Tensor:
        """Every frame through the correlator."""
        if self._effects is None and not self._as_planned:
            step = max(1, _CACHED // math.prod(plan.extent)) * plan.rows_at_once
            if len(x) > step:
                pieces = [self._on_planes(piece, kernels, plan) for piece in torch.split(x, step)]
                return torch.cat(pieces)[: plan.work.rows]
        groups, _, kernel_blocks, channels = plan.blocks
        extent = plan.extent
        size = (fast_size(extent[0], plan.plane[0]), fast_size(extent[1], plan.plane[1]))
        period = plan.plane if self._effects is not None and self._effects.of_plane else size
        at_once = max(1, _PIXELS // math.prod(period))
        found = []
        for group in range(groups):
            sums: list[Tensor | None] = [None] * kernel_blocks
            for channel in range(channels):
                planes = input_planes(x, plan, group, channel)
                spectra = [self._spectrum(part, period) for part in torch.split(planes, at_once)]
                for kernel in range(kernel_blocks):
                    mask = self._mask(kernels, plan, (group, kernel, channel), period)
                    seen = [self._show(spectrum, mask, plan, period) for spectrum in spectra]
                    part = seen[0] if len(seen) == 1 else torch.cat(seen)
                    known = sums[kernel]
                    sums[kernel] = part if known is None else known + part
            # (frames, kernels of a frame, groups, rows, out) -> (rows, groups, kernels, out)
            each = [part.permute(0, 3, 2, 1, 4, 5).flatten(0, 1) for part in sums if part is not None]
            found.append(torch.cat(each, 2)[:, :, : plan.work.kernels])
        return torch.cat(found, 1)[: plan.work.rows, : plan.work.groups]

    def _mask(self, kernels: Tensor, plan: Plan, block: tuple[int, int, int], period: Pair) -> Tensor:
        def make() -> Tensor:
            plane = kernel_plane(kernels, plan, block, period)
            if self._altered is None:
                return ideal_spectrum(plane, period)
            return Correlator(self._altered, period, self._generator).masks(plane[None])[0]

        return self._masks.get((id(self), plan, block), make)

    def _spectrum(self, planes: Tensor, period: Pair) -> Tensor:
        if self._altered is None:
            return ideal_spectrum(planes, period)
        return Correlator(self._altered, period, self._generator).spectrum(planes)

    def _show(self, spectrum: Tensor, mask: Tensor, plan: Plan, period: Pair) -> Tensor:
        """Wanted values of some frames, see ``wanted``, as electronics have them after the camera."""
        if self._effects is None:
            return wanted(ideal_field(spectrum, mask, period), plan)
        correlator = Correlator(self._effects, period, self._generator)
        ideal = self._altered is None
        field = ideal_field(spectrum, mask, period) if ideal else correlator.field(spectrum, mask)
        return correlator.read(field, lambda planes: wanted(planes, plan))

    def _plain(self, x: Tensor, kernels: Tensor, plan: Plan) -> Tensor:
        """Fields as plain convolutions; the camera exposes, and the laser drifts, frame by frame all the same."""
        assert self._effects is not None
        correlator = Correlator(self._effects, plan.plane, self._generator)
        rows, at_once = plan.blocks[1], plan.rows_at_once
        filled = _filled(x, (rows * at_once,))
        found = []
        for group in torch.split(torch.arange(plan.work.groups), plan.groups):
            sums: Tensor | None = None
            for channel in torch.split(torch.arange(plan.work.channels), plan.channels_at_once):
                part = replace(plan.work, groups=len(group), channels=len(channel))
                fields = direct(filled[:, group][:, :, channel], kernels[group][:, :, channel], part)
                fields = fields.reshape(rows, at_once, *fields.shape[1:])
                shown = torch.split(fields, plan.kernels_at_once, 3)
                frames = [correlator.read(field, lambda whole: whole) for field in shown]
                seen = torch.cat(frames, 3).flatten(0, 1)
                sums = seen if sums is None else sums + seen
            assert sums is not None
            found.append(sums)
        return torch.cat(found, 1)[: plan.work.rows]


def _spread(count: int, some: int, size: int, total: int) -> Tensor:
    """Numbers below ``total`` in ``some`` of ``count`` blocks of a size, from the first to the last."""
    blocks = torch.linspace(0, count - 1, some).round().long()
    numbers = (blocks[:, None] * size + torch.arange(size)).flatten()
    return numbers[numbers < total]


def parts(effects: Effects | None, signed: bool) -> tuple[int, int]:
    """Parts of inputs and kernels that are shown on their own; ``signed`` inputs need both where kernels are split."""
    if effects is None:
        return 1, 1
    inputs, kernels = SIGNS[effects.sign]
    return (2 if effects.sign == "kernel_split" and signed else inputs), kernels


def direct(x: Tensor, kernels: Tensor, work: Workload) -> Tensor:
    """The same without any optics: maps (rows, groups, channels, M1, M2) to (rows, groups, kernels, out1, out2)."""
    pads: list[int] = []  # the last dimension first; less than none is left away
    for m, n, a, o, s in zip(work.map, work.kernel, work.start, work.out, work.stride, strict=True):
        before = n - 1 - a
        pads = [before, (o - 1) * s + n - before - m, *pads]
    weight = kernels.flip(-2, -1).flatten(0, 1)
    padded = torch.nn.functional.pad(x.flatten(1, 2), pads)
    y = torch.nn.functional.conv2d(padded, weight, stride=work.stride, groups=work.groups)
    return y.reshape(len(x), work.groups, work.kernels, *work.out)
