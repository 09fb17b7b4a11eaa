"""Drawings of an optical program: when what happens in a run, and accuracy under effects. SVG, written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from edgeattn.pipeline.optics import Curves, Kind, Point, Span, Sweep

#: Fills that can be told apart by those who see fewer colours, too.
COLOURS = {"frames": "#1f77b4", "masks": "#d95f02", "readout": "#7570b3", "electronics": "#66a61e"}
#: What the lanes are called.
LANES = {
    "frames": "optical frames",
    "masks": "mask writes",
    "readout": "read-out",
    "electronics": "electronics",
}
#: Of curves of several models.
_LINES = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
_FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="#222"'


def si(value: float, unit: str) -> str:
    """A quantity with a prefix that suits it, three digits."""
    if not value:
        return f"0 {unit}"
    for factor, prefix in ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}" if value >= 1000 else f"{value / factor:.3g} {prefix}{unit}"
    return f"{value * 1e12:.3g} p{unit}"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" {_FONT}>'
    )
    return "\n".join([head, f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *parts, "</svg>", ""])


def _even_ticks(high: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to ``high``."""
    raw = high / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    return [i * step for i in range(math.floor(high / step * (1 + 1e-9)) + 1)]


def timeline(spans: Sequence[Span]) -> str:
    """A run to scale: lanes of optical frames, masks, read-out and electronics, of those that take time."""
    total = math.fsum(span.seconds for span in spans)
    kinds = [kind for kind in LANES if any(span.kind == kind and span.seconds > 0 for span in spans)]
    left, width, lane, top = 120, 880, 30, 8
    bottom = top + lane * len(kinds)
    labels = _labels(spans, total, left, width)
    deep = max((len(name) for _, name in labels), default=0) * 4.6 + 14 if labels else 0
    parts = []
    for at in _even_ticks(total):
        x = left + width * at / total
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom + 5}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 19, si(at, "s"), 'text-anchor="middle" fill="#555"'))
    for row, kind in enumerate(kinds):
        y, now = top + row * lane, 0.0
        taken = math.fsum(span.seconds for span in spans if span.kind == kind)
        share = f"{taken / total:.1%}" if taken / total >= 0.001 else "below 0.1%"
        parts.append(_text(left - 8, y + 13, LANES[kind], 'text-anchor="end"'))
        parts.append(_text(left - 8, y + 25, share, 'text-anchor="end" fill="#777" font-size="10"'))
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y + lane - 4}" y2="{y + lane - 4}" stroke="#eee"/>')
        for span in spans:
            if span.kind == kind and span.seconds > 0:
                x, length = left + width * now / total, width * span.seconds / total
                title = f"{span.name}: {LANES[kind]}, {span.count:,}, {si(span.seconds, 's')}"
                parts.append(
                    f'<rect x="{x:.2f}" y="{y + 3}" width="{max(length - 0.5, 0.4):.2f}" height="{lane - 8}" '
                    f'fill="{COLOURS[kind]}"><title>{escape(title)}</title></rect>'
                )
            now += span.seconds
    for x, name in labels:
        turn = f'transform="rotate(55 {x:.1f} {bottom + 34})" font-size="10" fill="#555"'
        parts.append(_text(x, bottom + 34, name, turn))
    return _svg(left + width + 60, bottom + 30 + deep, parts)


def _labels(spans: Sequence[Span], total: float, left: float, width: float) -> list[tuple[float, str]]:
    """(x, module) of operations, as many as have room beside each other, the longest first."""
    found: dict[str, list[float]] = {}
    now = 0.0
    for span in spans:
        if span.kind != "electronics":
            ends = found.setdefault(span.name, [now, now])
            ends[1] = now + span.seconds
        now += span.seconds
    kept: list[tuple[float, str]] = []
    for name, (begin, end) in sorted(found.items(), key=lambda item: item[1][0] - item[1][1]):
        x = left + width * (begin + end) / 2 / total
        if all(abs(x - other) >= 13 for other, _ in kept):
            kept.append((x, name if len(name) <= 30 else f"…{name[-29:]}"))
    return kept


# Curves

_WIDE, _HIGH, _PAD = 340, 250, (46, 34, 14, 52)  # of a chart; left, top, right, bottom of its axes


def _places(kind: Kind) -> tuple[Callable[[float], float], list[float]]:
    """Shares of the axis of settings, and the settings that are labelled."""
    values = sorted(kind.settings)
    turned = [math.log10(value) for value in values] if kind.log else list(values)
    low, high = turned[0], turned[-1] if turned[-1] > turned[0] else turned[0] + 1

    def at(value: float) -> float:
        place = math.log10(value) if kind.log else value
        return (place - low) / (high - low)

    shown: list[float] = []
    for value in values:
        if all(abs(at(value) - at(other)) > 0.075 for other in shown):
            shown.append(value)
    return at, shown


def mark(value: float) -> str:
    """A setting as a label: 10000 as 10k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _bar(x: float, point: Point, y: Callable[[float], float], colour: str) -> str:
    low, high = (y(value) for value in point.interval)
    title = f"{mark(point.setting)}: {point.correct} of {point.of}, {point.accuracy:.1%}"
    return (
        f'<path d="M{x - 3:.1f} {low:.1f}h6m-3 0V{high:.1f}m-3 0h6" stroke="{colour}" fill="none"/>'
        f'<circle cx="{x:.1f}" cy="{y(point.accuracy):.1f}" r="3" fill="{colour}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _chart(sweeps: Sequence[Sweep], colours: Sequence[str], left: float, top: float) -> list[str]:
    """One switch, of one or several models."""
    kind = sweeps[0].kind
    at, marks = _places(kind)
    x0, y0 = left + _PAD[0], top + _PAD[1]
    width, height = _WIDE - _PAD[0] - _PAD[2], _HIGH - _PAD[1] - _PAD[3]

    def x(setting: float) -> float:
        return x0 + 8 + (width - 16) * at(setting)

    def y(share: float) -> float:
        return y0 + height * (1 - share)

    samples = sorted({point.of for sweep in sweeps for point in sweep.points})
    on = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    parts = [
        _text(left + _PAD[0], top + 18, kind.title, 'font-size="13" font-weight="600"'),
        _text(x0 + width / 2, y0 + height + 34, f"{kind.unit}; {on} samples", 'text-anchor="middle" fill="#555"'),
    ]
    for percent in range(0, 101, 25):
        line = y(percent / 100)
        parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{line:.1f}" y2="{line:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(x0 - 6, line + 4, f"{percent} %", 'text-anchor="end" fill="#555" font-size="11"'))
    for value in marks:
        parts.append(f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y(0)}" y2="{y(0) + 4}" stroke="#888"/>')
        parts.append(_text(x(value), y(0) + 17, mark(value), 'text-anchor="middle" fill="#555" font-size="11"'))
    for sweep, colour in zip(sweeps, colours, strict=True):
        ideal = y(sweep.ideal.accuracy)
        dash = f'stroke="{colour}" stroke-dasharray="5 4" stroke-opacity="0.7"'
        parts.append(f'<line x1="{x0}" x2="{x0 + width}" y1="{ideal:.1f}" y2="{ideal:.1f}" {dash}/>')
        path = " ".join(f"{x(point.setting):.1f},{y(point.accuracy):.1f}" for point in sweep.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [_bar(x(point.setting), point, y, colour) for point in sweep.points]
    parts.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#888"/>')
    return parts


def curves(found: Sequence[tuple[str, Curves]], title: str = "") -> str:
    """Charts of all switches, three in a row; a line for each model (name, its curves), which share the switches."""
    kinds = [sweep.kind for sweep in found[0][1].sweeps]
    colours = [_LINES[i % len(_LINES)] for i in range(len(found))]
    across = min(3, len(kinds))
    top = 56 if title else 32
    parts = [_text(14, 24, title, 'font-size="16" font-weight="600"')] if title else []
    x, y = 14.0, top - 16
    for (name, _), colour in zip(found, colours, strict=True):
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<circle cx="{x + 11}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(_text(x + 28, y + 4, name))
        x += 44 + 7.0 * len(name)
    dash = 'stroke="#555" stroke-dasharray="5 4"'
    parts.append(f'<line x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" {dash}/>')
    parts.append(_text(x + 28, y + 4, "ideal planes, on the same samples; bars are 95 % intervals"))
    for i in range(len(kinds)):
        parts += _chart([each.sweeps[i] for _, each in found], colours, i % across * _WIDE, top + i // across * _HIGH)
    return _svg(max(across * _WIDE, 3 * _WIDE), top + -(-len(kinds) // across) * _HIGH, parts)
