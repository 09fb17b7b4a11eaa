"""``edgeattn profile`` and ``edgeattn history``."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import edgeattn
from benchmarks.planted import slower
from edgeattn.bundle import Bundle
from edgeattn.profile import store
from edgeattn.profile.record import Record, parse
from tests.report.making import record

Cli = Callable[..., subprocess.CompletedProcess[str]]

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
"""


def records_of(done: subprocess.CompletedProcess[str]) -> list[Record]:
    assert done.returncode == 0, done.stderr
    return parse(json.loads(done.stdout), "stdout")


def test_several_bundles_have_ratios_and_operations(
    edgeattn_cli: Cli, digits: Bundle, digits_tflite: Bundle, tmp_path: Path
) -> None:
    home = {"EDGEATTN_HOME": str(tmp_path)}
    words = ("--threads", "1", "--rounds", "3", "--runs", "40", "--json")
    done = edgeattn_cli("profile", digits.path, digits_tflite.path, *words, **home)
    ours, theirs = records_of(done)
    (ratio,) = json.loads(done.stdout)["ratios"]
    assert (ratio["a"], ratio["b"], ratio["rounds"]) == (ours.id, theirs.id, 3)
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ours.settings.session == theirs.settings.session != ""
    assert ours.settings.interleaved == ("fmvit-digits.tflite.fp32, 1 threads",)
    for one, unit in ((ours, "cpu"), (theirs, "xnnpack")):
        assert one.latency is not None
        assert one.latency.runs == 120
        assert [len(process) for process in one.latency.blocks] == [4, 4, 4]
        assert one.breakdown.wanted == unit
        assert one.breakdown.fallback == {}
        assert sum(op.share or 0 for op in one.breakdown.operations) == pytest.approx(1)
        heavy = [op for op in one.breakdown.operations if op.macs]
        assert sum(op.macs or 0 for op in heavy) == pytest.approx(one.subject.macs, rel=0.02)
        assert all(op.module for op in heavy)
        assert all(op.estimate_ms for op in heavy)
        assert {"before", "during", "after"} == {state.when for state in one.states}
        assert one.proof.accuracy == pytest.approx(358 / 360)
        assert one.proof.fused == 63
    assert store.find("fmvit-digits", file=tmp_path / "history.sqlite") == [ours, theirs]


def test_a_planted_slow_down_is_found(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    other = slower(digits.path, tmp_path, 0.5)
    done = edgeattn_cli("profile", digits.path, other, "--threads", "1", "--rounds", "4", "--no-ops", "--json")
    (ratio,) = json.loads(done.stdout)["ratios"]
    assert ratio["low"] > 1
    assert 1.2 < ratio["value"] < 2.0


def test_the_table_says_what_was_timed(edgeattn_cli: Cli, digits: Bundle) -> None:
    done = edgeattn_cli("profile", digits.path, "--threads", "1,2", "--rounds", "1", "--runs", "9")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "timed: one run of main, from inputs in host memory to outputs in host memory" in text
    assert "timing an empty run takes" in text
    assert "fmvit-digits.onnx.fp32, 2 threads" in text
    assert "slowest operations of" in text
    assert "by ONNX Runtime's profiler" in text
    assert "off cpu: nothing" in text


def test_a_folder_and_precisions(edgeattn_cli: Cli, digits: Bundle, digits_tflite: Bundle, tmp_path: Path) -> None:
    for bundle in (digits, digits_tflite):
        shutil.copytree(bundle.path, tmp_path / bundle.path.name)
    words = ("--rounds", "1", "--runs", "2", "--no-ops", "--no-history", "--json")
    found = records_of(edgeattn_cli("profile", tmp_path, "--precision", "fp32", *words))
    assert [record.subject.target for record in found] == ["onnx", "tflite"]
    done = edgeattn_cli("profile", digits.path, "--precision", "w8a8", *words)
    assert done.returncode == 2
    assert "edgeattn export fmvit-digits --target onnx --precision w8a8" in done.stderr


def test_the_batch_is_the_artifacts(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    made = edgeattn_cli("export", "net.py:Net", "--input", "x=4x3x8x8", "-o", "out", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    bundle = next((tmp_path / "out").glob("*/manifest.json")).parent
    words = ("--rounds", "1", "--runs", "3", "--no-ops", "--no-history", "--json")
    (four,) = records_of(edgeattn_cli("profile", bundle, "--batch", "4", *words))
    assert four.settings.batch == 4
    assert four.subject.weights == "random"
    done = edgeattn_cli("profile", digits.path, "--batch", "2", *words)
    assert done.returncode == 2, done.stdout
    assert "takes no batch of 2: it takes 1 alone" in done.stderr
    assert "--input x=2x1x32x32" in done.stderr


def test_an_estimate_runs_nothing(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    (copy := tmp_path / digits.path.name).mkdir()
    for name in ("manifest.json", "model.onnx"):  # there is nothing to run
        (copy / name).write_bytes((digits.path / name).read_bytes())
    done = edgeattn_cli("profile", copy, "--estimate", "--device", "raspberry-pi-5", "--json")
    (record,) = records_of(done)
    assert (record.kind, record.latency, record.place.device) == ("estimated", None, "raspberry-pi-5")
    assert record.breakdown.estimate_ms is not None
    assert record.breakdown.estimate_ms > 0
    assert record.breakdown.roofline is not None
    assert record.breakdown.roofline.gb_s == 17.0
    shown = edgeattn_cli("profile", copy, "--estimate", "--device", "raspberry-pi-5")
    assert "uncalibrated estimate" in shown.stdout
    lacking = edgeattn_cli("profile", copy, "--estimate", "--device", "iphone-15-pro")
    assert lacking.returncode == 2
    assert "peak" in lacking.stderr
    address = edgeattn_cli("profile", copy, "--estimate", "--device", "ssh://pi@board")
    assert address.returncode == 2
    assert "no documented peaks" in address.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--threads", "0"), "too small"),
        (("--threads", "two"), "whole numbers"),
        (("--batch", "1,,2"), "whole numbers"),
        (("--backend", "onx"), "onnx"),
        (("--entry", "mian"), "main"),
        (("--output", "records.html"), "records.json"),
        (("--device", "raspberry-pi-5"), "an emulated CPU has no latency"),
        (("--device", "raspbery-pi-5"), "raspberry-pi-5"),
    ],
)
def test_bad_words(words: tuple[str, ...], says: str, edgeattn_cli: Cli, digits: Bundle) -> None:
    done = edgeattn_cli("profile", digits.path, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_of_an_older_runner(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    files = {name: info for name, info in digits.manifest.files.items() if name != "run_profile.py"}
    (tmp_path / "manifest.json").write_text(digits.manifest.model_copy(update={"files": files}).sealed().text())
    done = edgeattn_cli("profile", tmp_path)
    assert done.returncode == 2
    assert "older EdgeAttn" in done.stderr


def test_a_history_that_cannot_be_written_loses_nothing(edgeattn_cli: Cli, digits: Bundle, tmp_path: Path) -> None:
    (tmp_path / "history.sqlite").write_bytes(b"damaged" * 1000)
    words = ("--rounds", "1", "--runs", "2", "--no-ops", "-o", tmp_path / "r.json")
    done = edgeattn_cli("profile", digits.path, *words, EDGEATTN_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "the history is damaged" in done.stderr
    assert "fmvit-digits.onnx.fp32" in done.stdout
    assert parse(json.loads((tmp_path / "r.json").read_text()), "r.json")


def test_the_history(edgeattn_cli: Cli, tmp_path: Path) -> None:
    home = {"EDGEATTN_HOME": str(tmp_path)}
    empty = edgeattn_cli("history", **home)
    assert (empty.returncode, "nothing was measured yet" in empty.stdout) == (0, True)
    made = [record(model="net", device="pi"), record(7.0, model="[bold]", device="<script>")]
    store.append(made, tmp_path / "history.sqlite")
    shown = edgeattn_cli("history", **home)
    assert "[bold].onnx.fp32" in shown.stdout
    assert "<script>" in shown.stdout
    assert edgeattn_cli("history", "net", "--csv", **home).stdout.count("\n") == 2
    assert len(records_of(edgeattn_cli("history", "--json", "--device", "pi", **home))) == 1
    done = edgeattn_cli("history", "nett", **home)
    assert done.returncode == 2
    assert "net" in done.stderr
    for name in ("h.json", "h.csv", "h.html"):
        done = edgeattn_cli("history", "--output", tmp_path / name, **home)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).stat().st_size > 100
    assert edgeattn_cli("history", "--output", "h.txt", **home).returncode == 2
    assert edgeattn_cli("history", "--csv", "--json", **home).returncode == 2


def test_profile_from_python(digits: Bundle) -> None:
    from edgeattn.profile import run
    from edgeattn.profile.measure import Effort

    jobs = run.jobs_of(run.select([digits.path]), run.Wanted(threads=(1,)))
    outcome = run.measure(jobs, "local", Effort(rounds=1, runs=3, operations=False))
    assert outcome.records[0].edgeattn == edgeattn.__version__


def test_a_precision_that_no_bundle_has_is_one_to_export_or_none_at_all(edgeattn_cli: Cli, digits: Bundle) -> None:
    for precision, fix in (
        ("w8", "edgeattn export fmvit-digits --target onnx --precision w8"),
        ("int3", "onnx has fp32"),
    ):
        done = edgeattn_cli("profile", digits.path, "--precision", precision)
        assert done.returncode == 2
        assert fix in done.stderr
