"""The planes of one optical operation as one would see them, on a golden sample."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

import numpy as np
import torch
from torch import Tensor

from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array
from edgeattn.device import SIGNS, Effects
from edgeattn.pipeline.optics import Opened
from edgeattn.targets.base import own_feeds
from edgeattn.targets.optical.convolve import REFERENCE, fast_size, input_planes, kernel_plane, parts, wanted
from edgeattn.targets.optical.physics import Correlator
from edgeattn.targets.optical.program import Operation
from edgeattn.targets.optical.runtime import OpticalRuntime
from edgeattn.targets.optical.schedule import Pair, Plan, in_parts, make_plan

#: Pixels of the largest plane that is computed whole; of a larger one its used part is.
_WHOLE = 1 << 24
#: Pixels on the page: of a whole plane, and of a part of it. Pixels of the plane that such a part has at least.
_SMALL, _LARGE, _PART = 320, 480, 128
#: Powers of ten that the mask's amplitude is shown over.
_DECADES = 3
#: Outlines of one picture at most.
_OUTLINES = 4000

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Planes:
    """The first frame of an operation.

    Attributes:
        sample: the golden sample's file. plan: of the run. whole: whether all of the device's plane was computed.
        inputs, kernels: amplitudes (H, W), negative ones with a phase of pi. mask: complex, (H, W), its middle in the
            middle of the plane.
        seen: intensity on the camera (H, W), turned back, the brightest wanted pixel being 1; the field where the
            device's is read with its sign.
        tiles, zones: (top, left, bottom, right) of input tiles and of the wanted values.
        signed: whether inputs have negative numbers. field: whether ``seen`` is a field.
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
    return Planes(op, sample, plan, whole, effects, *arrays, tiles, zones, signed)


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
    """Intensity (H, W) of the fields (1, H, W) of a frame, as a camera without noise has it, its scale as ``Planes``'."""
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

Colours = list[tuple[int, int, int]]


def _ramp(*anchors: str) -> Colours:
    """256 colours through "#rrggbb" at even distances."""
    points = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors], np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    each = [np.interp(at, np.arange(len(anchors)), points[:, i]) for i in range(3)]
    return [(int(r), int(g), int(b)) for r, g, b in np.rint(np.stack(each, 1)).tolist()]


_SIGNED = ("#2166ac", "#9ecae1", "#ffffff", "#f4a582", "#b2182b")
_LIGHT = ("#000000", "#1b2a6b", "#1f8a8c", "#9fd356", "#fff9c4")
_ANGLE = ("#c8534a", "#c9a227", "#3fa796", "#5b5bc0", "#c8534a")


def png(levels: Array, colours: Colours) -> bytes:
    """A PNG image of (H, W) of uint8 that count in a palette of 256 colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), levels.astype(np.uint8)], 1)  # each row without a filter
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", bytes(value for colour in colours for value in colour)),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


def shrunk(plane: Array, most: int) -> Array:
    """A plane of at most so many pixels a side; each is the strongest of those that it stands for."""
    step = -(-max(plane.shape) // most)
    if step == 1:
        return plane
    rows, cols = (-(-n // step) for n in plane.shape)
    filled = np.zeros((rows * step, cols * step), plane.dtype)
    filled[: plane.shape[0], : plane.shape[1]] = plane
    blocks = filled.reshape(rows, step, cols, step).transpose(0, 2, 1, 3).reshape(rows, cols, -1)
    strongest = np.abs(blocks).argmax(-1)
    found: Array = np.take_along_axis(blocks, strongest[..., None], -1)[..., 0]
    return found


@dataclass(frozen=True)
class _Scale:
    """How values become colours. ``marks``: (share of the bar, label)."""

    anchors: tuple[str, ...]
    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    gamma: float = 1.0

    def levels(self, values: Array) -> Array:
        share = np.clip((values - self.low) / (self.high - self.low), 0, 1) ** self.gamma
        found: Array = np.rint(255 * share).astype(np.uint8)
        return found


def _of_sign(values: Array) -> _Scale:
    high = float(np.abs(values).max()) or 1.0
    return _Scale(_SIGNED, -high, high, ((0, f"−{high:.3g}"), (0.5, "0"), (1, f"{high:.3g}")))


def _of_light(label: str) -> _Scale:
    return _Scale(_LIGHT, 0, 1, ((0, "0"), (0.5, "0.25"), (1, label)), gamma=0.5)


_numbers = count()


def _bar(scale: _Scale, y: float, width: int, caption: str) -> list[str]:
    """A legend: colours, marks and what they are of."""
    name = f"ramp{next(_numbers)}"
    last = len(scale.anchors) - 1
    stops = "".join(f'<stop offset="{i / last:.3f}" stop-color="{c}"/>' for i, c in enumerate(scale.anchors))
    length = min(width, 180)
    parts = [
        f'<linearGradient id="{name}">{stops}</linearGradient>',
        f'<rect x="0.5" y="{y}" width="{length}" height="9" fill="url(#{name})" stroke="#999" stroke-width="0.5"/>',
    ]
    for share, label in scale.marks:
        anchor = {0: "start", 1: "end"}.get(share, "middle")
        parts.append(f'<text x="{share * length:.1f}" y="{y + 22}" text-anchor="{anchor}">{escape(label)}</text>')
    parts.append(f'<text x="{length + 10}" y="{y + 9}">{escape(caption)}</text>')
    return parts


@dataclass(frozen=True)
class _View:
    """A part of a plane on the page. ``factor``: screen pixels of a pixel."""

    values: Array
    scale: _Scale
    caption: str
    legend: str
    factor: float
    boxes: Sequence[Box] = ()
    stroke: str = "#d95f02"

    def svg(self) -> str:
        height, width = (round(n * self.factor) for n in self.values.shape)
        height, width = max(height, 1), max(width, 1)
        image = base64.b64encode(png(self.scale.levels(self.values), _ramp(*self.scale.anchors))).decode()
        full = max(width, 320), height + 36
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{full[0]}" height="{full[1]}" '
            f'viewBox="-1 -1 {full[0] + 2} {full[1] + 2}" font-family="system-ui, sans-serif" font-size="11" '
            'fill="#333" role="img">',
            f"<title>{escape(self.caption)}</title>",
            f'<image width="{width}" height="{height}" href="data:image/png;base64,{image}" '
            'preserveAspectRatio="none" style="image-rendering: pixelated"/>',
            f'<rect width="{width}" height="{height}" fill="none" stroke="#999"/>',
        ]
        for top, left, bottom, right in self.boxes:
            x, y, w, h = (round(n * self.factor, 2) for n in (left, top, right - left, bottom - top))
            parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="none" stroke="{self.stroke}"/>')
        parts += _bar(self.scale, height + 8, width, self.legend)
        inner = "\n".join([*parts, "</svg>"])
        return f"<figure>{inner}<figcaption>{escape(self.caption)}</figcaption></figure>"


def _overview(plane: Array, scale: _Scale, caption: str, legend: str, used: Pair | None = None) -> _View:
    """All of a plane, with its used part outlined."""
    small = shrunk(plane, _SMALL)
    factor = max(1, _SMALL // max(small.shape))
    boxes = [(0, 0, *(n / max(plane.shape) * max(small.shape) for n in used))] if used else []
    return _View(small, scale, caption, legend, factor, boxes, "#555")  # type: ignore[arg-type]


def _part(plan: Plan, plane: Pair, used: Pair) -> Pair:
    """Sides of the part of a plane that is shown enlarged, from its corner on: some tiles, of the used ones."""
    sides = zip(plan.pitch, plan.channels, used, plane, strict=True)
    down, right = (min(max(_PART, min(s * c, _LARGE), s), max(n, 8), most) for s, c, n, most in sides)
    return down, right


def _close(plane: Array, part: Pair, scale: _Scale, caption: str, legend: str, boxes: Sequence[Box]) -> _View:
    """The corner of a plane, enlarged, with outlines."""
    inside = [box for box in boxes if box[2] <= part[0] and box[3] <= part[1]]
    # A line around every pixel would hide what it is drawn around.
    factor = _LARGE / max(part)
    factor = float(math.floor(factor)) if factor >= 1 else factor
    if len(inside) > _OUTLINES:
        inside = inside[:_OUTLINES]
    return _View(plane[: part[0], : part[1]], scale, caption, legend, factor, inside)


def _row(heading: str, words: str, *views: _View) -> str:
    pictures = "\n".join(view.svg() for view in views)
    return f'<h3>{escape(heading)}</h3>\n<p>{escape(words)}</p>\n<div class="views">\n{pictures}\n</div>'


def _by(pair: Pair) -> str:
    return f"{pair[0]} × {pair[1]}"


def pictures(planes: Planes) -> str:
    """Input plane, kernel plane, mask and camera of a frame, as HTML."""
    plan, work = planes.plan, planes.plan.work
    (used_in, used_out), plane = (_used(plan), plan.extent), planes.inputs.shape
    about = "the plane" if planes.whole else "its used part"
    near_in, near_out = (_part(plan, plane, used) for used in (used_in, used_out))
    boxes = [box for box in planes.tiles if planes.plan.pitch != (1, 1) or plan.channels != (1, 1)]
    scale = _of_sign(planes.inputs)
    rows = min(plan.rows_at_once, work.rows)
    inputs = _row(
        "Input plane",
        f"{rows} of {work.rows} rows, in tiles of {_by((plan.channels[0] * plan.pitch[0], plan.channels[1] * plan.pitch[1]))} "
        f"pixels: {_by(plan.channels)} channels side by side, {_by(plan.pitch)} pixels apart. " + _input_words(planes),
        _overview(planes.inputs, scale, f"all of {about}, {_by(plane)} pixels", "amplitude", used_in),
        _close(planes.inputs, near_in, scale, f"its corner, {_by(near_in)} pixels; a tile in each frame", "", boxes),
    )
    scale = _of_sign(planes.kernels)
    kernels = _row(
        "Kernel plane",
        f"{plan.kernels_at_once} of {work.kernels} kernels of {_by(work.kernel)} for each of {plan.groups} groups, "
        f"laid out {_by(plan.kernels)}, each as far from the next as all input tiles are wide. Nothing shows this plane: "
        "its Fourier transform is the mask." + _kernel_words(planes),
        _overview(planes.kernels, scale, f"all of {about}", "weight", used_out),
        _close(planes.kernels, near_out, scale, f"its corner, {_by(near_out)} pixels", "", ()),
    )
    return "\n".join([inputs, kernels, _mask_row(planes), _camera_row(planes, near_out)])


def _used(plan: Plan) -> Pair:
    down, right = (a * c * s for a, c, s in zip(plan.tiles, plan.channels, plan.pitch, strict=True))
    return down, right


def _input_words(planes: Planes) -> str:
    inputs = parts(planes.effects, planes.signed)[0]
    if planes.effects.sign == "offset" and planes.signed:
        return "All of it is lifted above zero."
    if inputs == 2:
        return "Positive and negative parts are rows of their own: nothing is negative."
    return "Negative numbers have a phase of pi." if planes.signed else ""


def _kernel_words(planes: Planes) -> str:
    if SIGNS[planes.effects.sign][1] == 2:
        return " Positive and negative parts are kernels of their own."
    return ""


def _mask_row(planes: Planes) -> str:
    amplitude = np.abs(planes.mask)
    peak = float(amplitude.max()) or 1.0
    shown = np.log10(np.maximum(amplitude / peak, 10.0**-_DECADES)) + _DECADES
    marks = ((0, f"10^−{_DECADES}"), (1, "peak"))
    scale = _Scale(_LIGHT, 0, _DECADES, marks)
    angle = _Scale(_ANGLE, -math.pi, math.pi, ((0, "−π"), (0.5, "0"), (1, "π")))
    side = min(_PART, *amplitude.shape)
    top, left = ((n - side) // 2 for n in amplitude.shape)
    middle = slice(top, top + side), slice(left, left + side)
    factor = max(1, _SMALL // side)
    near = f"its middle, {_by((side, side))} pixels"
    return _row(
        "Mask",
        f"What the second modulator shows, low frequencies in the middle. {_shown_words(planes)}",
        _overview(shown, scale, "amplitude", "logarithmic"),
        _View(shown[middle], scale, f"amplitude, {near}", "logarithmic", factor),
        _View(np.angle(planes.mask)[middle], angle, f"phase, {near}", "radians", factor),
    )


def _shown_words(planes: Planes) -> str:
    """What of the device's effects the mask has in it."""
    effects, found = planes.effects, []
    if effects.mask != "complex":
        found.append(f"its {effects.mask} alone can be shown")
    if effects.mask_amplitude_bits is not None:
        found.append(f"amplitudes of {effects.mask_amplitude_bits} bits")
    if effects.mask_phase_bits is not None:
        found.append(f"phases of {effects.mask_phase_bits} bits")
    return f"With the device's own limits: {', '.join(found)}." if found else "As exact as numbers are."


def _camera_row(planes: Planes, near: Pair) -> str:
    plan, what = planes.plan, "field" if planes.field else "intensity"
    if planes.field:
        scale, legend = _Scale(_SIGNED, -1, 1, ((0, "−1"), (0.5, "0"), (1, "1"))), "of the strongest wanted one"
    else:
        scale, legend = _of_light("1"), "of the brightest wanted one, square root"
    words = (
        f"The {what} that electronics read, turned back by 180 degrees, without the camera's noise. "
        f"{len(planes.zones):,} wanted zones of {_by(plan.work.out)} values are outlined; what is between them nobody reads"
        + ("." if planes.field else f", and may be brighter than all that is wanted. Sign scheme {planes.effects.sign}.")
    )
    stroke = "#111" if planes.field else "#ff7f50"
    view = _close(planes.seen, near, scale, f"its corner, {_by(near)} pixels", "", planes.zones)
    return _row(
        "Camera",
        words,
        _overview(planes.seen, scale, f"all of {'the plane' if planes.whole else 'its used part'}", legend, plan.extent),
        _View(view.values, scale, view.caption, "", view.factor, view.boxes, stroke),
    )
