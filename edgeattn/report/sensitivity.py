"""Sensitivity as a picture, and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from edgeattn.core.files import write_whole
from edgeattn.pipeline.sensitivity import Sensitivity

#: Bars at most: what is below the worst of so many is not worth a look.
BARS = 40
_ROW, _LEFT, _WIDTH, _TOP, _RIGHT = 22, 330, 520, 86, 110
#: Fills that can be told apart by those who see fewer colours, too.
_ALONE, _KEPT, _NONE = "#1f77b4", "#d95f02", "#666666"


def _bad(error: Mapping[str, Any]) -> bool:
    return bool(error["nonfinite"]) or error["relative_l2"] is None


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the ends."""
    return [10.0**e for e in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def _short(name: str, most: int = 46) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def picture(found: Sensitivity) -> str:
    """The rows as bars on a logarithmic scale, an SVG image: each alone, those to be kept in another colour."""
    rows, kept = found.rows[:BARS], set(found.keep)
    errors = [row["alone"]["relative_l2"] for row in rows if not _bad(row["alone"]) and row["alone"]["relative_l2"] > 0]
    high = 10.0 ** math.ceil(math.log10(max([*errors, found.tolerance])))
    low = 10.0 ** math.floor(math.log10(min([*errors, found.tolerance])) - 0.1)

    def at(value: float) -> float:
        share = (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        return _LEFT + _WIDTH * min(1.0, share)

    bottom = _TOP + _ROW * len(rows)
    size = (_LEFT + _WIDTH + _RIGHT, bottom + 62)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        _text(12, 26, f"{found.title}: sensitivity to {found.precision} on {found.target}", 'font-size="17"'),
    ]
    random = "; the weights are random" if found.random else ""
    parts.append(_text(12, 48, f"relative L2 of the outputs, each alone in {found.precision}; {found.samples}{random}"))
    if len(found.rows) > len(rows):
        parts.append(_text(12, 66, f"the worst {len(rows)} of {len(found.rows)}"))
    for tick in _ticks(low, high):
        x = at(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 17, f"{tick:g}", 'text-anchor="middle" fill="#555"'))
    for i, row in enumerate(rows):
        y, error = _TOP + _ROW * i, row["alone"]
        bad = _bad(error)
        end = _LEFT + _WIDTH if bad else at(error["relative_l2"])
        colour = _NONE if bad else _KEPT if row["name"] in kept else _ALONE
        label = "not finite" if bad else f"{error['relative_l2']:.2g}"
        parts += [
            f"<g><title>{escape(row['name'])}</title>",
            _text(_LEFT - 8, y + 15, _short(row["name"]), 'text-anchor="end"'),
            f'<rect x="{_LEFT}" y="{y + 3}" width="{max(1.0, end - _LEFT):.1f}" height="{_ROW - 6}" fill="{colour}"/>',
            _text(end + 6, y + 15, label, 'fill="#555" stroke="white" stroke-width="3" paint-order="stroke"'),
            "</g>",
        ]
    x = at(found.tolerance)
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}" stroke="#b00" stroke-dasharray="4 3"/>'
    )
    parts.append(_text(x, _TOP - 10, f"holds below {found.tolerance:g}", 'text-anchor="middle" fill="#b00"'))
    legend = [(_ALONE, "quantized alone"), (_KEPT, "to be kept in floats, so that the rest holds")]
    place = _LEFT
    for colour, words in legend[: 2 if kept else 1]:
        parts.append(f'<rect x="{place}" y="{bottom + 34}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(place + 18, bottom + 45, words))
        place += 150
    return "\n".join([*parts, "</svg>", ""])


def write(found: Sensitivity, folder: Path) -> list[Path]:
    """``sensitivity.json`` and ``sensitivity.svg`` in a folder, in the place of earlier ones."""
    files = {
        folder / "sensitivity.json": json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n",
        folder / "sensitivity.svg": picture(found),
    }
    for path, text in files.items():
        write_whole(path, text.encode())
    return list(files)
