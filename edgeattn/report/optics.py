"""An optical bundle as a page: its operations, what they cost, when they happen, what the planes look like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from edgeattn.core.files import write_whole
from edgeattn.device import Optics
from edgeattn.pipeline.optics import Costs, Curves, Opened, Span
from edgeattn.report.optics_charts import curves as charts
from edgeattn.report.optics_charts import mark, si, timeline
from edgeattn.report.optics_planes import Planes, pictures
from edgeattn.report.page import page as whole
from edgeattn.targets.optical.cost import Cost, cost
from edgeattn.targets.optical.program import Operation

#: What the page is worth.
SIMULATED = (
    "Simulated: no optical hardware has run it. Numbers are those of a 4f correlator computed with Fourier transforms; "
    "times and energies follow from the plans and from the device file, and rest on what is assumed below."
)

#: Many narrow columns, names in the first two; views of the planes beside each other.
_STYLE = """
table { margin: 8px 0 12px; font-size: 13px; }
th, td { padding-right: 14px; white-space: nowrap; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.shown td { background: #eaf2fa; }
.views { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
figure { margin: 0; max-width: 480px; }
figcaption { font-size: 12px; color: #555; max-width: 340px; line-height: 1.35; }
"""


@dataclass(frozen=True)
class Shown:
    """All that is shown of a bundle.

    Attributes:
        spans: of one run. planes: of one operation; None where no page is made. curves: None where none were asked for.
    """

    opened: Opened
    costs: Costs
    spans: list[Span]
    curves: Curves | None = None
    planes: Planes | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        program = self.opened.program
        return {
            "bundle": self.opened.title,
            "entry": self.opened.entry,
            "random": self.opened.random,
            "device": program.device,
            "optics": program.optics.model_dump(mode="json"),
            "simulated": SIMULATED,
            "operations": [_plain(op, program.optics) for op in program.operations],
            "costs": self.costs.as_dict(),
            "timeline": [vars(span) for span in self.spans],
            "curves": self.curves.as_dict() if self.curves else None,
        }


def _plain(op: Operation, optics: Optics) -> dict[str, Any]:
    spent = cost([op.plan], optics)
    known = {"name": op.name, "module": op.module, "op": op.op, "signed": op.signed, "error": op.error}
    return known | {"plan": op.plan.as_dict(), "share_of_plane": used(op), "seconds": spent.seconds}


def used(op: Operation) -> float:
    """Share of the plane that has tiles or zones in it."""
    return math.prod(op.plan.extent) / math.prod(op.plan.plane)


def by(pair: Sequence[int]) -> str:
    """Two sizes, as 8x8."""
    return "x".join(map(str, pair))


#: Headings of ``operation_row``; all but the first two are figures.
OPERATION = ("module", "op", "maps", "kernel", "shown", "tiles", "frames", "masks", "used", "error")


def operation_row(op: Operation) -> tuple[str, ...]:
    """An operation in a table; rows and kernels as they are shown, parts of either sign on their own."""
    plan, work = op.plan, op.plan.work
    groups = f"{work.groups}*" if work.groups > 1 else ""
    tiles = [plan.tiles, plan.kernels, *([plan.channels] if plan.channels_at_once > 1 else [])]
    return (
        op.module or op.name,
        op.op,
        by(work.map),
        by(work.kernel),
        f"{work.rows} x {groups}{work.kernels} x {work.channels}",
        "·".join(map(by, tiles)),
        f"{plan.frames:,}",
        f"{plan.masks:,}",
        f"{used(op):.1%}",
        f"{op.error:.0e}",
    )


#: What the columns of ``OPERATION`` mean.
OPERATION_WORDS = (
    "shown: rows x kernels x channels, positive and negative parts on their own, 2*8 kernels being 8 in each of 2 "
    "groups; tiles: inputs·kernels·zones of a tile's channels, down x right on the plane; used: share of the plane; "
    "error: relative L2 of ideal planes against a plain convolution"
)


def cost_head(costs: Costs) -> tuple[str, ...]:
    """Headings of ``cost_rows``."""
    many = costs.filled.batch
    return "", "", "one input", *((f"{many:,} inputs", f"each of {many:,}") if many > 1 else ())


def cost_rows(costs: Costs, optics: Optics) -> list[tuple[str, ...]]:
    """Rows (part, amount, one input, batch that fills the planes, each of it): counts, times and energies.

    What the device file is silent about is not counted and has no row; the assumptions say so.
    """
    cases = [costs.one, *([costs.filled] if costs.filled.batch > 1 else [])]
    rows: list[tuple[str, ...]] = []

    def add(name: str, amount: str, of: Callable[[Cost], float], write: Callable[[float], str]) -> None:
        values = [of(case) for case in cases]
        per = [write(values[-1] / cases[-1].batch)] if len(cases) > 1 else []
        same = any(row[0] == name for row in rows)
        rows.append(("" if same else name, amount, *map(write, values), *per))

    def count(name: str, amount: str, of: Callable[[Cost], float]) -> None:
        add(name, amount, of, lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")

    def time(name: str, rate: float | None, of: Callable[[Cost], float]) -> None:
        if rate is not None:
            add(name, "time", of, lambda value: si(value, "s"))

    def energy(name: str, known: float | None, of: Callable[[Cost], float]) -> None:
        if known is not None:
            add(name, "energy", of, lambda value: si(value, "J"))

    count("frames", "count", lambda c: c.frames)
    time("frames", optics.frame_rate_hz, lambda c: c.seconds["frames"])
    count("mask writes", "count", lambda c: c.mask_writes)
    time("mask writes", optics.mask_rate_hz, lambda c: c.seconds["masks"])
    energy("mask writes", optics.mask_pj_px, lambda c: c.joules["masks"])
    count("input writes", "count", lambda c: c.input_writes)
    energy("input writes", optics.input_pj_px, lambda c: c.joules["input"])
    time("read-out of whole frames", optics.readout_px_s, lambda c: c.seconds["readout"])
    energy("read-out of whole frames", optics.readout_pj_px, lambda c: c.joules["readout"])
    time("(of wanted pixels alone)", optics.readout_px_s, lambda c: c.roi_readout_s)
    energy("(of wanted pixels alone)", optics.readout_pj_px, lambda c: c.roi_readout_j)
    count("electronics", "operations", lambda c: c.electronic_ops)
    time("electronics", optics.electronics_ops_s, lambda c: c.seconds["electronics"])
    energy("electronics", optics.electronics_pj_op, lambda c: c.joules["electronics"])
    energy("laser, modulators, camera", optics.static_w, lambda c: c.joules["static"])
    count("optics", "MACs", lambda c: c.optical_macs)
    time("all", optics.frame_rate_hz, lambda c: c.total_s)
    if any(value for value in costs.one.joules.values()):
        energy("all", 0.0, lambda c: c.total_j)
    return rows


def batch_words(costs: Costs) -> str:
    """What the batch of ``cost_rows`` is."""
    many, twice = costs.filled, costs.doubled
    more = f"{twice.batch:,} need {twice.frames:,} frames instead of {many.frames:,}"
    if many.batch == 1:
        return f"one input fills the planes: {more}"
    return f"{many.batch:,} inputs fill the planes: they need no more frames than one, {more}"


def share_words(spent: Cost) -> str:
    """How much of the arithmetic optics do."""
    everything = spent.optical_macs + spent.electronic_ops
    return (
        f"{spent.share:.1%} of {everything:,} operations are multiply-accumulates of optics; "
        f"zones lie on {spent.fill:.1%} of the planes, with {spent.macs_a_pixel:.2g} of them behind a pixel of a frame"
    )


def curve_rows(found: Curves) -> list[tuple[str, str, str, str]]:
    """Rows (switch, setting, accuracy, 95 % interval)."""
    rows = [
        _curve_row("ideal planes", "", found.ideal),
        _curve_row(f"sign scheme {found.sign} alone", "", found.scheme),
    ]
    if found.device:
        rows.append(_curve_row("all effects of the device", "", found.device))
    for sweep in found.sweeps:
        for i, point in enumerate(sweep.points):
            rows.append(_curve_row("" if i else sweep.kind.title, f"{mark(point.setting)} {sweep.kind.unit}", point))
    return rows


def _curve_row(name: str, setting: str, point: Any) -> tuple[str, str, str, str]:
    low, high = point.interval
    return name, setting, f"{point.accuracy:.1%} ({point.correct} of {point.of})", f"{low:.1%} to {high:.1%}"


def curve_words(found: Curves) -> str:
    """What the curves were computed on."""
    words = (
        f"top-1 accuracy on held-out samples, one effect at a time under sign scheme {found.sign}; {found.batch} of "
        f"them share the planes at most, none where the laser drifts; PyTorch has {found.reference.correct} of "
        f"{found.reference.of} right, ideal planes {found.ideal.correct} of {found.ideal.of}"
    )
    if found.device is None:
        return f"{words}; the device file names no effects beside its scheme"
    return f"{words}, all effects of the device together {found.device.correct} of {found.device.of}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], shown: int | None = None) -> str:
    cells = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>"]
    for i, row in enumerate(rows):
        mark = ' class="shown"' if i == shown else ""
        cells.append(f"<tr{mark}>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>")
    return "\n".join(['<div class="wide"><table>', *cells, "</table></div>"])


def page(found: Shown) -> str:
    """Everything on one page, which needs nothing beside it."""
    opened, optics = found.opened, found.opened.program.optics
    title = f"{opened.title}: on a 4f correlator"
    entry = "" if opened.entry == "main" else f", entry {opened.entry}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Device {escape(opened.program.device)}{escape(entry)}: planes of {optics.rows} × {optics.cols} pixels, "
        f"sign scheme {escape(optics.effects.sign)}.</p>",
        f'<p class="note">{escape(SIMULATED)}</p>',
    ]
    if opened.random:
        body.append('<p class="note">The weights are random: what the model says means nothing.</p>')
    body += [*_cost_part(found), *_time_part(found)]
    if found.planes:
        body += _plane_part(found.planes)
    if found.curves:
        body += [
            "<h2>Accuracy under what hardware does</h2>",
            f"<p>{escape(_sentence(curve_words(found.curves)))}</p>",
            charts([(opened.title, found.curves)]),
            "<details><summary>The numbers</summary>",
            _table(("effect", "setting", "accuracy", "95 % interval"), curve_rows(found.curves)),
            "</details>",
        ]
    body += _operation_part(found)
    return whole(title, body, width=1060, style=_STYLE)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _cost_part(found: Shown) -> list[str]:
    costs, optics = found.costs, found.opened.program.optics
    return [
        "<h2>What it costs</h2>",
        f"<p>{escape(_sentence(share_words(costs.one)))} {escape(_sentence(batch_words(costs)))}</p>",
        _table(cost_head(costs), cost_rows(costs, optics)),
        "<p>Assumed:</p>",
        "<ul>",
        *(f"<li>{escape(words)}</li>" for words in costs.one.assumptions),
        "</ul>",
    ]


def _time_part(found: Shown) -> list[str]:
    total = found.costs.one.total_s
    free = [name for name, seconds in found.costs.one.seconds.items() if not seconds]
    silent = f" Not drawn, for they take no time here: {', '.join(free)}." if free else ""
    return [
        "<h2>When it happens</h2>",
        f"<p>One input, {si(total, 's')}, with nothing at the same time.{escape(silent)}</p>",
        timeline(found.spans),
    ]


def _plane_part(planes: Planes) -> list[str]:
    op, plan = planes.op, planes.plan
    words = (
        f"Operation {op.name} ({op.op}) on {planes.sample}: the first of {plan.frames:,} "
        f"frame{'s' * (plan.frames != 1)}, with its mask."
    )
    return ["<h2>What the planes look like</h2>", f"<p>{escape(words)}</p>", pictures(planes)]


def _operation_part(found: Shown) -> list[str]:
    ops = found.opened.program.operations
    shown = ops.index(found.planes.op) if found.planes else None
    return [
        f"<h2>All {len(ops)} operations</h2>" if len(ops) > 1 else "<h2>The operation</h2>",
        _table(OPERATION, map(operation_row, ops), shown),
        f'<p class="dim">{escape(_sentence(OPERATION_WORDS))}</p>',
    ]


def write(found: Shown, file: Path) -> None:
    """The page, in the place of an earlier one."""
    write_whole(file, page(found).encode())
