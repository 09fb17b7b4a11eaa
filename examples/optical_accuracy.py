"""Measure what noise, bits and misalignment of a 4f correlator do to trained ConvShareViTs, in simulation.

    python examples/optical_accuracy.py                       # v2, a quarter of an hour on one CPU core
    python examples/optical_accuracy.py --models v1 v2 v3     # hours: v1 has an output for every pair of numbers

Exports the recipes convsharevit-{v1,v2,v3}-digits to target optical, scores them on all 360 held-out digits under one
effect of hardware at a time, prints the accuracies as markdown, and draws them: docs/optical-accuracy.svg. Effects that
depend on the place need whole planes computed, which takes long: these are scored on the first --on-planes digits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import edgeattn
from edgeattn.pipeline.optics import KINDS, Curves, Kind, Point, curves
from edgeattn.report.optics_charts import curves as charts
from edgeattn.report.optics_charts import mark

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "optical-accuracy.svg"

SETTINGS: dict[str, tuple[float, ...]] = {
    "full_well_e": (1e2, 3e2, 1e3, 3e3, 1e4, 1e5, 1e6),
    "adc_bits": (4, 5, 6, 7, 8, 10, 12),
    "laser_drift": (0.01, 0.1, 0.3),
    "input_amplitude_bits": (2, 3, 4, 6, 8),
    "mask_amplitude_bits": (2, 3, 4, 5, 6, 8),
    "mask_phase_bits": (2, 3, 4, 5, 6, 8),
    "mask_shift_px": (0, 1, 2, 3, 4, 8),
    "camera_shift_px": (0, 0.02, 0.05, 0.1, 0.2, 0.5),
}
"""More of them than ``edgeattn optics show --curves`` goes through."""

PARTS = {
    "Noise": ("full_well_e", "laser_drift"),
    "Bits": ("adc_bits", "input_amplitude_bits", "mask_amplitude_bits", "mask_phase_bits"),
    "Shift": ("mask_shift_px", "camera_shift_px"),
}


def kinds() -> list[Kind]:
    """The switches with more settings."""
    return [replace(kind, settings=SETTINGS[kind.field]) for kind in KINDS]


def cell(point: Point) -> str:
    """An accuracy with its interval, in percent."""
    low, high = point.interval
    return f"{100 * point.accuracy:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def tables(found: Sequence[tuple[str, Curves]]) -> str:
    """The accuracies as markdown, a column for each model."""
    whole, lines = found[0][1], []

    def table(rows: Sequence[tuple[str, str, Sequence[Point | None]]]) -> None:
        names = " | ".join(name for name, _ in found)
        lines.extend([f"| effect | setting | {names} |", "|---|---|" + "---:|" * len(found)])
        for effect, setting, points in rows:
            cells = " | ".join("" if point is None else cell(point) for point in points)
            lines.append(f"| {effect} | {setting} | {cells} |")

    first = [("PyTorch", "reference"), ("ideal planes", "ideal"), (f"sign scheme {whole.sign} alone", "scheme")]
    first += [("all effects of the device", "device")] if whole.device else []
    table([(words, f"{on(found, name)} digits", [getattr(each, name) for _, each in found]) for words, name in first])
    for title, fields in PARTS.items():
        rows: list[tuple[str, str, Sequence[Point | None]]] = []
        for i, sweep in enumerate(whole.sweeps):
            for j, point in enumerate(sweep.points if sweep.kind.field in fields else ()):
                effect = f"{sweep.kind.title} ({point.of} digits)" if j == 0 else ""
                setting = f"{mark(point.setting)} {sweep.kind.unit}"
                rows.append((effect, setting, [each.sweeps[i].points[j] for _, each in found]))
        lines += ["", f"**{title}**", ""]
        table(rows)
    return "\n".join(lines)


def on(found: Sequence[tuple[str, Curves]], name: str) -> int:
    """Digits that a point of all models was scored on."""
    point: Point = getattr(found[0][1], name)
    return point.of


def main() -> None:
    """Export, score, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["v1", "v2", "v3"], default=["v2"])
    parser.add_argument("--device", default="optical-4f-4k-2mhz")
    parser.add_argument("--on", type=int, default=360, help="held-out digits (default: all 360)")
    parser.add_argument("--on-planes", type=int, default=128, help="the same where whole planes are needed")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args()
    found, began = [], time.perf_counter()

    def say(words: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {words}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            say(f"exporting {name}")
            recipe = f"convsharevit-{name}-digits"
            bundle = edgeattn.export(recipe, target="optical", device=given.device, output=folder)
            found.append((name, curves(bundle, given.on, say, on_planes=given.on_planes, kinds=kinds())))
    print(f"\nTop-1 accuracy in percent with 95 % intervals, simulated, on device {given.device}.\n")
    print(tables(found))
    title = f"ConvShareViT on digits, simulated on {given.device}: accuracy under one effect at a time"
    given.picture.write_text(charts(found, title), encoding="utf-8")
    print(f"\nwrote {given.picture} after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
