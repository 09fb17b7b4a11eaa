"""The planes of one optical operation as one would see them, on a golden sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from torch import Tensor

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.device import SIGNS, Effects
from edgeattn.pipeline.optics import Opened
from edgeattn.report.optics_image import ANGLE, LIGHT, SIGNED, SMALL, Box, Scale, View, of_sign, overview
from edgeattn.targets.feeds import own_feeds
from edgeattn.targets.optical.convolve import fast_size, input_planes, kernel_plane, parts, wanted
from edgeattn.targets.optical.physics import REFERENCE, Correlator
from edgeattn.targets.optical.program import Operation
from edgeattn.targets.optical.runtime import OpticalRuntime
from edgeattn.targets.optical.schedule import Pair, Plan, in_parts, make_plan

#: Pixels of the largest plane that is computed whole; of a larger one its used part is.
_WHOLE = 1 << 24
#: Pixels on the page of a part of a plane. Pixels of the plane that such a part has at least.
_LARGE, _PART = 480, 128
#: Powers of ten that the mask's amplitude is shown over.
_DECADES = 3
#: Outlines of one picture at most.
_OUTLINES = 4000


@dataclass(frozen=True)
class Planes:
    """The first frame of an operation.

    Attributes:
        sample: the golden sample's file. plan: of the run. whole: whether all of the device's plane was computed.
        inputs, kernels: amplitudes (H, W), negative ones with a phase of pi. mask: complex, (H, W), its middle in the
            middle of the plane.
        seen: intensity on the camera (H, W), turned back, the brightest wanted pixel being 1; the field where the
            device's is read with its sign.
        tiles, zones: (top, left, bottom, right) of input tiles and of the wanted values. some: kernels (K, N1, N2).
        signed: whether inputs have negative numbers.
    """

    op: Operation
    sample: str
    plan: Plan
    whole: bool
    effects: Effects
    inputs: Array
    kernels: Array
    mask: Array
    seen: Array
    tiles: list[Box]
    zones: list[Box]
    some: Array
    signed: bool

    @property
    def field(self) -> bool:
        """Whether ``seen`` is the field itself."""
        return self.effects.sign == "field"


def find_planes(opened: Opened, op: Operation) -> Planes:
    """Run the first golden sample up to an operation, on ideal planes, and show its first frame on the device's.

    Raises:
        CheckFailed: the bundle has no golden sample of the entry.
    """
    sample, value = _value(opened, op)
    optics, effects = opened.program.optics, opened.program.optics.effects
    maps, kernels = op.layout.maps(torch.from_numpy(value)), torch.from_numpy(op.kernels(opened.folder))
    signed = bool((maps < 0).any())
    shown = parts(effects, signed)
    plan = make_plan(in_parts(op.work, *shown), (optics.rows, optics.cols))
    if effects.sign == "offset" and signed:
        maps = maps - maps.amin()
    if shown[0] == 2:
        maps = torch.cat([maps.clamp_min(0), (-maps).clamp_min(0)])
    if shown[1] == 2:
        kernels = torch.cat([kernels.clamp_min(0), (-kernels).clamp_min(0)], 1)
    size, whole = plan.plane, math.prod(plan.plane) <= _WHOLE
    if not whole:
        down, right = (fast_size(used, most) for used, most in zip(plan.extent, plan.plane, strict=True))
        size = down, right
    correlator = Correlator(effects, size, torch.Generator().manual_seed(effects.seed))
    with torch.no_grad():
        frame = input_planes(maps, plan, 0, 0)[:1]
        kernel = kernel_plane(kernels, plan, (0, 0, 0), size)
        mask = correlator.masks(kernel[None])[0]
        seen = _seen(correlator, correlator.field(correlator.spectrum(frame), mask), plan)
    room = torch.zeros(size)
    room[: frame.shape[1], : frame.shape[2]] = frame[0]
    middle = torch.fft.fftshift(mask).numpy()
    tiles, zones = list(_tiles(plan)), _zones(plan, size)
    arrays = room.numpy(), kernel.numpy(), middle, seen.numpy()
    some = kernels[0].flatten(0, 1)[:256].numpy()
    return Planes(op, sample, plan, whole, effects, *arrays, tiles, zones, some, signed)


def _value(opened: Opened, op: Operation) -> tuple[str, Array]:
    """The first golden sample's file, and what the operation reads on it."""
    entry = opened.artifact.entries[opened.entry]
    for name, of, given, _ in opened.bundle.golden():
        if of != opened.entry:
            continue
        feeds = own_feeds(entry.inputs, given)
        if op.input in feeds:
            return name, feeds[op.input]
        for item in OpticalRuntime(opened.artifact).trace(opened.entry, feeds, {op.input}):
            return name, item.value
    raise CheckFailed(
        "the bundle has no golden sample of this operation",
        value=op.name,
        where=str(opened.bundle.path),
        fix="export anew",
    )


def _seen(correlator: Correlator, field: Tensor, plan: Plan) -> Tensor:
    """What a camera without noise has of the fields (1, H, W) of a frame, scaled as in ``Planes``."""
    if correlator.effects.sign == "field":
        image = correlator.moved(field.real)
    else:
        beam = torch.zeros(())
        if correlator.effects.sign == "reference":
            beam = REFERENCE * wanted(field.real, plan).abs().amax()
        image = correlator.moved((field.real + beam).square() + field.imag.square())
    brightest = wanted(image, plan).abs().amax().clamp_min(torch.finfo(image.dtype).tiny)
    return image[0] / brightest


def _tiles(plan: Plan) -> Iterator[Box]:
    """Input tiles of the first frame that hold something."""
    zone = tuple(c * s for c, s in zip(plan.channels, plan.pitch, strict=True))
    held = min(plan.rows_at_once, plan.work.rows) * plan.groups
    for i in range(held):
        top, left = i // plan.tiles[1] * zone[0], i % plan.tiles[1] * zone[1]
        yield top, left, top + zone[0], left + zone[1]


def _zones(plan: Plan, size: Pair) -> list[Box]:
    """Where the wanted values of the first frame are, one output of one row each."""
    work = plan.work
    # Which pixels the electronics read is asked of them: numbers of pixels in the place of their light.
    places = wanted(torch.arange(math.prod(size)).reshape(1, *size), plan)[0]
    places = places[: work.kernels, : work.groups, : work.rows].flatten(0, 2).flatten(1)
    first, last = places[:, 0].tolist(), places[:, -1].tolist()
    ends = zip(first, last, strict=True)
    return [(a // size[1], a % size[1], b // size[1] + 1, b % size[1] + 1) for a, b in ends]


# Pictures


def _close(plane: Array, used: Pair, plan: Plan, scale: Scale, boxes: Sequence[Box], words: str, stroke: str) -> View:
    """A part of a plane, enlarged: its corner, or the surroundings of the first outline that is further away.

    Args:
        used: pixels of the plane that hold something. words: what is outlined.
    """
    sides = zip(plan.pitch, used, plane.shape, strict=True)
    down, right = (min(max(_PART, min(pitch, _LARGE)), max(n, 8), most) for pitch, n, most in sides)
    top, left = (
        0 if end <= size else max(0, min(end - size * 3 // 4, held - size))
        for end, size, held in zip(boxes[0][2:], (down, right), used, strict=True)
    )
    factor = min(_LARGE / max(down, right), 24.0)
    factor = float(math.floor(factor)) if factor >= 1 else factor
    moved = [(a - top, b - left, c - top, d - left) for a, b, c, d in boxes]
    seen = [box for box in moved if box[2] > 0 and box[3] > 0 and box[0] < down and box[1] < right]
    place = "corner" if (top, left) == (0, 0) else f"part from row {top} and column {left} on,"
    caption = f"{place} of {_by((down, right))} pixels, with {words}"
    values = plane[top : top + down, left : left + right]
    return View(values, scale, caption, factor, seen[:_OUTLINES], stroke)


def _row(heading: str, words: str, *views: View) -> str:
    pictures = "\n".join(view.html() for view in views)
    return f'<h3>{escape(heading)}</h3>\n<p>{escape(words)}</p>\n<div class="views">\n{pictures}\n</div>'


def _by(pair: Pair) -> str:
    return f"{pair[0]} × {pair[1]}"


def pictures(planes: Planes) -> str:
    """Input plane, kernel plane, mask and camera of a frame, as HTML."""
    return "\n".join([_input_row(planes), _kernel_row(planes), _mask_row(planes), _camera_row(planes)])


def _all_of(planes: Planes) -> str:
    size = planes.inputs.shape
    return f"all {_by((size[0], size[1]))} pixels" + ("" if planes.whole else " of the plane that are used")


def _input_row(planes: Planes) -> str:
    plan, work = planes.plan, planes.plan.work
    down, right = (a * c * s for a, c, s in zip(plan.tiles, plan.channels, plan.pitch, strict=True))
    rows = min(plan.rows_at_once, work.rows)
    words = f"{rows:,} of {work.rows:,} rows in a frame, as tiles of {_by(plan.pitch)} pixels"
    if plan.channels_at_once > 1:
        words += f", each with {plan.channels_at_once} channels that are summed as light"
    if plan.channels_at_once < work.channels:
        words += f"; {plan.channels_at_once} of {work.channels} channels, electronics sum the frames"
    inputs = parts(planes.effects, planes.signed)[0]
    if planes.effects.sign == "offset" and planes.signed:
        words += "; all of it is lifted above zero."
    elif inputs == 2:
        words += "; positive and negative parts are rows of their own."
    else:
        words += "; negative numbers have a phase of π." if planes.signed else "."
    negative = bool((planes.inputs < 0).any())
    high = float(np.abs(planes.inputs).max()) or 1.0
    light = Scale(LIGHT, 0, high, ((0, "0"), (1, f"{high:.3g}")))
    scale = of_sign(planes.inputs) if negative else light
    stroke = "#d95f02" if negative else "#ff7f50"
    return _row(
        "Input plane",
        words,
        overview(planes.inputs, scale, f"{_all_of(planes)}; what is used is outlined", (down, right)),
        _close(planes.inputs, (down, right), plan, scale, planes.tiles, "its tiles", stroke),
    )


def _kernel_row(planes: Planes) -> str:
    plan, work = planes.plan, planes.plan.work
    count = min(plan.kernels_at_once, work.kernels)
    words = f"{count:,} of {work.kernels:,} kernels of {_by(work.kernel)}"
    words += f" for each of {plan.groups} groups" if plan.groups > 1 else ""
    words += ", as far apart as all input tiles are wide"
    if SIGNS[planes.effects.sign][1] == 2:
        words += "; positive and negative parts are kernels of their own"
    words += ". Nothing shows this plane: its Fourier transform is the mask."
    scale = of_sign(planes.kernels)
    gallery, places = _gallery(planes.some)
    factor = max(1.0, float(min(12, _LARGE // max(gallery.shape))))
    title = f"the first {len(places)} of its kernels, moved together" if len(places) > 1 else "its first kernel"
    return _row(
        "Kernel plane",
        words,
        overview(planes.kernels, scale, f"{_all_of(planes)}; what is used is outlined", plan.extent),
        View(gallery, scale, title, factor, places, "#888"),
    )


def _gallery(kernels: Array) -> tuple[Array, list[Box]]:
    """Kernels (K, N1, N2) side by side, with a pixel between them; as many as there is room for, and where they are."""
    height, width = kernels.shape[1:]
    across = max(1, min(16, _LARGE // (width + 1)))
    many = min(len(kernels), across * max(1, min(10, _LARGE // (height + 1))))
    down = -(-many // across)
    found = np.zeros((down * (height + 1) - 1, min(across, many) * (width + 1) - 1), kernels.dtype)
    places = []
    for i in range(many):
        top, left = i // across * (height + 1), i % across * (width + 1)
        found[top : top + height, left : left + width] = kernels[i]
        places.append((top, left, top + height, left + width))
    return found, places


def _mask_row(planes: Planes) -> str:
    amplitude = np.abs(planes.mask)
    peak = float(amplitude.max()) or 1.0
    shown = np.log10(np.maximum(amplitude / peak, 10.0**-_DECADES)) + _DECADES
    scale = Scale(LIGHT, 0, _DECADES, ((0, f"{10.0**-_DECADES:g}"), (1, "1")))
    angle = Scale(ANGLE, -math.pi, math.pi, ((0, "−π"), (0.5, "0"), (1, "π")))
    side = min(_PART, *amplitude.shape)
    top, left = ((n - side) // 2 for n in amplitude.shape)
    middle = slice(top, top + side), slice(left, left + side)
    factor = max(1.0, float(SMALL // side))
    near = f"{_by((side, side))} pixels in the middle"
    every = "; each dot is the strongest of its pixels" if max(amplitude.shape) > SMALL else ""
    return _row(
        "Mask",
        f"What the second modulator shows, low frequencies in the middle. {_mask_words(planes)}",
        overview(shown, scale, f"amplitude of {_all_of(planes)}, as a share of the largest, logarithmic{every}"),
        View(shown[middle], scale, f"amplitude of {near}", factor),
        View(np.angle(planes.mask)[middle], angle, f"phase of {near}, in radians", factor),
    )


def _mask_words(planes: Planes) -> str:
    """What of the device's effects the mask has in it."""
    effects, found = planes.effects, []
    if effects.mask != "complex":
        found.append(f"its {effects.mask} alone is shown")
    if effects.mask_amplitude_bits is not None:
        found.append(f"amplitudes of {effects.mask_amplitude_bits} bits")
    if effects.mask_phase_bits is not None:
        found.append(f"phases of {effects.mask_phase_bits} bits")
    if effects.mask_shift_px is not None:
        found.append(f"shifted by {effects.mask_shift_px[0]:g} and {effects.mask_shift_px[1]:g} pixels")
    if effects.defocus_waves is not None:
        found.append(f"{effects.defocus_waves:g} waves out of focus")
    return f"With the limits of the device: {', '.join(found)}." if found else "The device file sets it no limits."


def _camera_row(planes: Planes) -> str:
    plan = planes.plan
    if planes.field:
        scale, stroke = Scale(SIGNED, -1, 1, ((0, "−1"), (0.5, "0"), (1, "1"))), "#111"
        words = "The field that electronics read with its sign"
    else:
        scale, stroke = Scale(LIGHT, 0, 1, ((0, "0"), (0.5, "0.25"), (1, "1")), gamma=0.5), "#ff7f50"
        words = f"The intensity, under sign scheme {planes.effects.sign}, without the camera's noise"
    words += (
        f", turned back by 180 degrees. {len(planes.zones):,} zones with {_by(plan.work.out)} wanted values are "
        "outlined; what is between them nobody reads, and may be brighter than all that is wanted."
    )
    of = "the strongest wanted value" if planes.field else "the brightest wanted pixel, on a square-root scale"
    return _row(
        "Camera",
        words,
        overview(planes.seen, scale, f"{_all_of(planes)}, as a share of {of}", plan.extent),
        _close(planes.seen, plan.extent, plan, scale, planes.zones, "its zones", stroke),
    )
