"""``edgeattn optics show``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeattn
from edgeattn.bundle import Bundle
from edgeattn.cli import main
from edgeattn.core.errors import CheckFailed
from edgeattn.device import Effects
from edgeattn.pipeline.optics import KINDS, Curves, Point, Span, Sweep, find_costs, open_optical, timeline
from edgeattn.report import optics_charts
from edgeattn.report.optics import Shown, cost_rows, page
from edgeattn.report.optics_image import png, shrunk
from edgeattn.report.optics_planes import find_planes

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

GUEST = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(),
        nn.Linear(108, 5))
"""

DEVICE = """
name = "bench"
description = "small planes"
kind = "optical"
machine = "any"
targets = ["optical"]
[optics]
rows = 120
cols = 90
frame_rate_hz = 1000.0
readout_px_s = 1e7
static_w = 5.0
[optics.effects]
sign = "reference"
mask_phase_bits = 6
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("optics")
    (folder / "net.py").write_text(GUEST)
    (folder / "bench.toml").write_text(DEVICE)
    return edgeattn.export(
        f"{folder / 'net.py'}:net",
        target="optical",
        device=str(folder / "bench.toml"),
        inputs=["x=1x2x8x8"],
        output=folder / "bundles",
    )


def test_it_prints_operations_and_cost_and_writes_a_page(edgeattn_cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    done = edgeattn_cli("optics", "show", bundle.path, "-o", "page.html", "--operation", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "weights are random" in text
    assert "no optical hardware has run it" in text
    assert re.search(r"^0 +Conv +8x8 +3x3 +1 x 2\*2 x 1 ", text, re.MULTILINE)
    assert "planes of 120 x 90 pixels, 1000 frames a second" in text
    assert "read-out of whole frames" in text
    assert "mask writes" in text
    assert "wrote page.html" in text
    html = (tmp_path / "page.html").read_text()
    assert "The weights are random" in html
    assert "Operation 001-2 (Conv) on golden/main-000.npz" in html
    assert "phases of 6 bits" in html
    assert "sign scheme reference" in html
    assert len(re.findall("data:image/png;base64,", html)) == 9


def test_json(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    main(["optics", "show", str(bundle.path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [op["module"] for op in found["operations"]] == ["0", "2", "4"]
    assert found["device"] == "bench"
    assert found["random"] is True
    assert found["costs"]["one"]["frames"] == 3
    assert found["costs"]["one"]["total_s"] == pytest.approx(sum(span["seconds"] for span in found["timeline"]))
    assert found["curves"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{bundle}", "--operation", "21"], "did you mean '2'?"),
        (["{bundle}", "--operation", "head.linear"], "unknown operation"),
        (["{bundle}", "--entry", "mian"], "did you mean 'main'?"),
        (["{bundle}", "--curves", "--on", "4"], "the bundle has no held-out samples"),
        (["{bundle}", "--on", "4"], "--curves --on 4"),
        (["{bundle}", "-o", "page.svg"], "--output page.html"),
        (["{bundle}", "-o", "taken.html"], "a folder is in its place"),
        (["{bundle}", "-o", "/proc/none/page.html"], "cannot be written"),
        (["{folder}"], "this is not a bundle"),
        (["none"], "there is no such folder"),
    ],
)
def test_what_is_refused(
    bundle: Bundle,
    tmp_path: Path,
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken.html").mkdir()
    monkeypatch.chdir(tmp_path)
    places = {"bundle": bundle.path, "folder": tmp_path}
    with pytest.raises(SystemExit) as end:
        main(["optics", "show", *(word.format(**places) for word in words)])
    shown = capsys.readouterr()
    assert end.value.code == 2, shown.err
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert not shown.out
    assert not list(tmp_path.glob("page*"))


def with_curves(bundle: Bundle) -> Shown:
    opened = open_optical(bundle)
    program = opened.program
    named = replace(program.operations[0], module="<b>a & b</b>", name="<i>")
    turns = [
        replace(turn, optics=tuple(named if op.module == "0" else op for op in turn.optics)) for turn in program.turns
    ]
    opened = replace(opened, program=replace(program, device="<u>bench", turns=tuple(turns)))
    point = Point(0.0, 3, 4)
    sweeps = [Sweep(kind, tuple(Point(s, i, 8) for i, s in enumerate(kind.settings)), point, False) for kind in KINDS]
    found = Curves("kernel_split", 64, point, point, point, point, tuple(sweeps))
    planes = find_planes(opened, named)
    return Shown(opened, find_costs(opened.program), timeline(opened), found, planes)


def test_names_are_escaped_and_images_are_whole(bundle: Bundle) -> None:
    shown = with_curves(bundle)
    text = page(shown)
    for name in ("&lt;b&gt;a &amp; b&lt;/b&gt;", "&lt;i&gt;", "&lt;u&gt;bench"):
        assert name in text
    for tag in ("<b>", "<i>", "<u>"):
        assert tag not in text
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    assert len(figures) == 9
    assert shown.curves is not None
    charts = optics_charts.timeline(shown.spans), optics_charts.curves([("<s>", shown.curves)], "<s>")
    for image in (*figures, *charts):
        ElementTree.fromstring(image)
    assert "Mask: shift, down and right" in text
    assert json.dumps(shown.as_dict(), allow_nan=False)


def test_a_picture_is_a_png_of_its_colours() -> None:
    image = pytest.importorskip("PIL.Image")
    levels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colours = [(i, 255 - i, 7) for i in range(256)]
    seen = image.open(io.BytesIO(png(levels, colours))).convert("RGB")
    assert seen.size == (4, 3)
    assert [seen.getpixel((x, y)) for y in range(3) for x in range(4)] == colours[:12]
    assert base64.b64encode(png(levels, colours))[:8] == b"iVBORw0K"


def test_shrunk_planes_keep_the_strongest_values() -> None:
    plane = np.zeros((100, 70))
    plane[33, 60], plane[99, 69] = -5.0, 2.0
    small = shrunk(plane, 20)
    assert small.shape == (20, 14)
    assert small[6, 12] == -5.0
    assert small[19, 13] == 2.0
    assert np.abs(small).sum() == 7.0
    assert shrunk(plane, 100) is plane


@pytest.mark.parametrize("sign", ["field", "reference", "offset", "kernel_split", "full_split"])
def test_the_camera_shows_the_numbers_that_were_wanted(bundle: Bundle, sign: str) -> None:
    """What the outlined zones hold is what the operation gives, as the sign scheme has it."""
    opened = open_optical(bundle)
    optics = opened.program.optics.model_copy(update={"effects": Effects.model_validate({"sign": sign})})
    opened = replace(opened, program=replace(opened.program, optics=optics))
    op = opened.operation("2")
    planes = find_planes(opened, op)
    assert planes.whole
    assert planes.inputs.shape == planes.mask.shape == planes.seen.shape == (120, 90)
    inputs = 1 if sign in ("field", "reference", "offset") else planes.plan.work.rows
    assert len(planes.zones) == inputs * planes.plan.work.kernels
    assert len(planes.tiles) == inputs
    zones = [planes.seen[a:c, b:d] for a, b, c, d in planes.zones]
    assert all(zone.shape == (6, 6) for zone in zones)
    assert max(np.abs(zone).max() for zone in zones) == pytest.approx(1.0)
    # Tiles of the input plane have all that is in it.
    assert sum(np.abs(planes.inputs[a:c, b:d]).sum() for a, b, c, d in planes.tiles) == pytest.approx(
        np.abs(planes.inputs).sum()
    )
    if sign == "field":
        _, _, feeds, _ = next(bundle.golden())
        from edgeattn.targets.optical.runtime import OpticalRuntime

        (wanted,) = (
            item.value
            for item in OpticalRuntime(opened.artifact).trace("main", feeds, {op.output})
            if item.name == op.output
        )
        bias = op.offset(opened.folder)
        plain = wanted[0] - (0 if bias is None else bias.reshape(-1, 1, 1))
        assert np.stack(zones) == pytest.approx(plain / np.abs(plain).max(), abs=1e-4)


def test_a_bundle_without_golden_samples_has_no_planes(bundle: Bundle) -> None:
    opened = replace(open_optical(bundle), entry="decode")
    opened = replace(opened, artifact=replace(opened.artifact, entries={"decode": opened.artifact.entries["main"]}))
    with pytest.raises(CheckFailed, match="no golden sample"):
        find_planes(opened, opened.operation(None))


def test_the_timeline_is_to_scale() -> None:
    spans = [
        Span("electronics", "turn 0", 10, 1e-3),
        Span("masks", "<a>", 1, 0.0),
        Span("frames", "<a>", 3, 3e-3),
        Span("readout", "<a>", 3, 4e-3),
    ]
    root = ElementTree.fromstring(optics_charts.timeline(spans))
    bars = [e for e in root.iter() if e.tag.endswith("rect") and list(e)]
    widths = {next(iter(e)).text: float(e.get("width", "0")) for e in bars}  # type: ignore[misc]
    assert list(widths) == [
        "<a>: optical frames, 3, 3 ms",
        "<a>: read-out, 3, 4 ms",
        "turn 0: electronics, 10, 1 ms",
    ]
    assert [round(width + 0.5) for width in widths.values()] == [330, 440, 110]
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "mask writes" not in texts
    assert "<a>" in texts


def test_quantities() -> None:
    assert [optics_charts.si(v, "s") for v in (0, 9e-6, 0.3, 12345.6, 5e-13)] == [
        "0 s",
        "9 us",
        "300 ms",
        "1.235e+04 s",
        "0.5 ps",
    ]
    assert [optics_charts.mark(v) for v in (100, 3e3, 1e6, 0.05)] == ["100", "3k", "1M", "0.05"]


def test_costs_that_are_not_counted_have_no_row(bundle: Bundle) -> None:
    opened = open_optical(bundle)
    costs = find_costs(opened.program)
    rows = cost_rows(costs, opened.program.optics)
    labels = {(name, amount) for name, amount, *_ in rows}
    assert ("read-out of whole frames", "time") in labels
    assert ("laser, modulators, camera", "energy") in labels
    assert ("mask writes", "count") in labels
    assert sum(amount == "energy" for _, amount, *_ in rows) == 2  # of static power, and of all
