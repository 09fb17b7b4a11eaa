"""Planes as images: values as colours, a legend, outlines; PNG inside of SVG inside of HTML."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from edgeattn.core.numerics import Array

#: Pixels on the page that a whole plane is shown on.
SMALL = 320

#: (top, left, bottom, right), in pixels of a plane.
Box = tuple[int, int, int, int]
Colours = list[tuple[int, int, int]]


def _ramp(*anchors: str) -> Colours:
    """256 colours through "#rrggbb" at even distances."""
    points = np.array([[int(a[i : i + 2], 16) for i in (1, 3, 5)] for a in anchors], np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    each = [np.interp(at, np.arange(len(anchors)), points[:, i]) for i in range(3)]
    return [(int(r), int(g), int(b)) for r, g, b in np.rint(np.stack(each, 1)).tolist()]


SIGNED = ("#2166ac", "#9ecae1", "#ffffff", "#f4a582", "#b2182b")
LIGHT = ("#000000", "#1b2a6b", "#1f8a8c", "#9fd356", "#fff9c4")
ANGLE = ("#c8534a", "#c9a227", "#3fa796", "#5b5bc0", "#c8534a")


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
class Scale:
    """How values become colours.

    Attributes:
        low, high: values of the first and the last colour. marks: (share of the legend's bar, label).
        gamma: power that shares are raised to, below 1 for details in the dark.
    """

    anchors: tuple[str, ...]
    low: float
    high: float
    marks: tuple[tuple[float, str], ...]
    gamma: float = 1.0

    def levels(self, values: Array) -> Array:
        """Values as numbers of colours, of uint8."""
        share = np.clip((values - self.low) / (self.high - self.low), 0, 1) ** self.gamma
        found: Array = np.rint(255 * share).astype(np.uint8)
        return found


def of_sign(values: Array) -> Scale:
    """A scale for values of both signs, white at zero."""
    high = float(np.abs(values).max()) or 1.0
    return Scale(SIGNED, -high, high, ((0, f"−{high:.3g}"), (0.5, "0"), (1, f"{high:.3g}")))


def _bar(scale: Scale, y: float, width: int) -> list[str]:
    """A legend: colours and marks."""
    name = f"ramp{zlib.crc32(repr(scale.anchors).encode()):08x}"
    last = len(scale.anchors) - 1
    stops = "".join(f'<stop offset="{i / last:.3f}" stop-color="{c}"/>' for i, c in enumerate(scale.anchors))
    length = min(width, 180)
    parts = [
        f'<linearGradient id="{name}">{stops}</linearGradient>',
        f'<rect x="0.5" y="{y}" width="{length}" height="9" fill="url(#{name})" stroke="#999" stroke-width="0.5"/>',
    ]
    for share, label in scale.marks:
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(f'<text x="{share * length:.1f}" y="{y + 22}" text-anchor="{anchor}">{escape(label)}</text>')
    return parts


@dataclass(frozen=True)
class View:
    """A part of a plane on the page. ``factor``: screen pixels of a pixel."""

    values: Array
    scale: Scale
    caption: str
    factor: float
    boxes: Sequence[Box] = ()
    stroke: str = "#d95f02"

    def html(self) -> str:
        """A figure with its caption."""
        height, width = (round(n * self.factor) for n in self.values.shape)
        height, width = max(height, 1), max(width, 1)
        image = base64.b64encode(png(self.scale.levels(self.values), _ramp(*self.scale.anchors))).decode()
        full = max(width, 200), height + 36
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{full[0]}" height="{full[1]}" '
            f'viewBox="-1 -1 {full[0] + 2} {full[1] + 2}" font-family="system-ui, sans-serif" font-size="11" '
            'fill="#333" role="img">',
            f"<title>{escape(self.caption)}</title>",
            f'<image width="{width}" height="{height}" href="data:image/png;base64,{image}" '
            'preserveAspectRatio="none" style="image-rendering: pixelated"/>',
            f'<rect width="{width}" height="{height}" fill="none" stroke="#999"/>',
        ]
        if self.boxes:  # an image of their own cuts off what reaches beyond the part
            parts.append(f'<svg width="{width}" height="{height}" fill="none" stroke="{self.stroke}">')
            for top, left, bottom, right in self.boxes:
                x, y, w, h = (f"{n * self.factor:g}" for n in (left, top, right - left, bottom - top))
                parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}"/>')
            parts.append("</svg>")
        parts += _bar(self.scale, height + 8, width)
        inner = "\n".join([*parts, "</svg>"])
        return f"<figure>{inner}<figcaption>{escape(self.caption)}</figcaption></figure>"


def overview(plane: Array, scale: Scale, caption: str, used: tuple[int, int] | None = None) -> View:
    """All of a plane, with its used part outlined."""
    small = shrunk(plane, SMALL)
    factor = max(1.0, float(SMALL // max(small.shape)))
    ratio = max(small.shape) / max(plane.shape)
    boxes = [(0, 0, round(used[0] * ratio), round(used[1] * ratio))] if used else []
    return View(small, scale, caption, factor, boxes, "#888")
