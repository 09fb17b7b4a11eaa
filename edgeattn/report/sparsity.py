"""Sparsity as a page with a picture."""

from __future__ import annotations

from html import escape
from pathlib import Path

from edgeattn.core.files import write_whole
from edgeattn.pipeline.sparsity import Sparsity
from edgeattn.report.page import page as whole

#: Bars at most, in the model's order.
BARS = 120
_ROW, _LEFT, _WIDTH, _TOP, _RIGHT = 24, 300, 520, 36, 80
#: Fills that can be told apart by those who see fewer colours, too.
_ZERO, _DEAD, _REST = "#1f77b4", "#d95f02", "#e4e9ee"
#: Of what shows the range: dark on a light rim, to be seen on all fills.
_STROKES = ('stroke="#fff" stroke-width="4" stroke-opacity="0.7"', 'stroke="#222" stroke-width="1.5"')


def worth(found: Sparsity) -> str:
    """What skipping the zeros saves a decoder, in sentences; "" for other models."""
    if found.read is None or found.weights is None:
        return ""
    count = len(found.readers)
    return (
        f"{count} linear layer{'s' * (count != 1)} read{'s' * (count == 1)} them: with the columns that meet a zero "
        f"skipped, which is exact, a decoded token reads {found.read:.1%} of the {found.weights:,} weights that it "
        f"multiplies with. Where reading weights takes all the time, that is {1 / found.read:.2f}x as fast at most. "
        "It holds for one token at a time: several at once, as in a prefill, need the union of their columns."
    )


def _short(name: str, most: int = 42) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def picture(found: Sparsity) -> str:
    """A bar for each activation, an SVG image: zeros, units among them that are never used, the range over rows."""
    sites = found.sites[:BARS]
    bottom = _TOP + _ROW * len(sites)
    size = (_LEFT + _WIDTH + _RIGHT, bottom + 64)
    row = found.unit.removesuffix("s")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
    ]
    for percent in range(0, 101, 20):
        x = _LEFT + _WIDTH * percent / 100
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom}" stroke="#ccc"/>')
        parts.append(_text(x, _TOP - 10, f"{percent} %", 'text-anchor="middle" fill="#555"'))
    for i, site in enumerate(sites):
        y = _TOP + _ROW * i
        middle, end = y + _ROW / 2, _LEFT + _WIDTH * site.zeros
        low, high = (_LEFT + _WIDTH * value for value in (site.low, site.high))
        dead = _WIDTH * (site.never or 0) / (site.units or 1)
        whisker = f"M{low:.1f} {middle - 4}v8m0-4H{high:.1f}m0-4v8"
        about = f"{site.path or '(model)'}: {site.zeros:.2%}, {site.low:.1%} to {site.high:.1%}"
        parts += [
            f"<g><title>{escape(about)}</title>",
            _text(_LEFT - 8, y + 16, _short(site.path or "(model)"), 'text-anchor="end"'),
            f'<rect x="{_LEFT}" y="{y + 3}" width="{_WIDTH}" height="{_ROW - 6}" fill="{_REST}"/>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{end - _LEFT:.1f}" height="{_ROW - 6}" fill="{_ZERO}"/>',
            *([f'<rect x="{_LEFT}" y="{y + 3}" width="{dead:.1f}" height="{_ROW - 6}" fill="{_DEAD}"/>'] * (dead > 0)),
            *(f'<path d="{whisker}" {stroke} fill="none"/>' for stroke in _STROKES),
            _text(_LEFT + _WIDTH + 8, y + 16, f"{site.zeros:.1%}"),
            "</g>",
        ]
    legend = [(_ZERO, "zeros", 70)]
    if any(site.never for site in sites):
        legend.append((_DEAD, f"units that are zero at every {row}", 235))
    place = float(_LEFT - 150)
    for colour, words, width in legend:
        parts.append(f'<rect x="{place}" y="{bottom + 22}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(place + 18, bottom + 32, words))
        place += width
    bar = f"M{place} {bottom + 24}v8m0-4h24m0-4v8"
    parts.append(f'<path d="{bar}" stroke="#222" stroke-width="1.5" fill="none"/>')
    parts.append(_text(place + 32, bottom + 32, f"of a single {row}, lowest to highest"))
    return "\n".join([*parts, "</svg>", ""])


def page(found: Sparsity) -> str:
    """The picture, what it is worth, and the figures as a table."""
    title = f"{found.title}: exact zeros behind each ReLU"
    cut = f"; the picture has the first {BARS} of {len(found.sites)}" if len(found.sites) > BARS else ""
    body = [f"<h1>{escape(title)}</h1>", f"<p>{found.zeros:.1%} on average, on {escape(found.data)}{cut}</p>"]
    if found.random:
        body.append('<p class="note">The weights are random: a trained model has other zeros.</p>')
    body.append(picture(found))
    if words := worth(found):
        body.append(f"<p>{escape(words)}</p>")
    known = found.unit == "tokens"
    head = ["activation", "zeros", "lowest", "highest", found.unit, *(("units", "never used") if known else ())]
    rows = [
        [
            site.path or "(model)",
            *(f"{value:.2%}" for value in (site.zeros, site.low, site.high)),
            f"{site.rows:,}",
            *((f"{site.units:,}", f"{site.never:,}") if known else ()),
        ]
        for site in found.sites
    ]
    cells = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for row in rows]
    body += ["<table>", *cells, "</table>"]
    return whole(title, body, width=900)


def write(found: Sparsity, file: Path) -> None:
    """The page, in the place of an earlier one."""
    write_whole(file, page(found).encode())
