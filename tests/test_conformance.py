"""The conformance kit: it holds on a third party's target, and sees each fault with the check that is there for it."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edgeattn
from edgeattn import doctor, targets
from edgeattn.bundle import Bundle
from edgeattn.conformance import CHECKS, conform, models
from edgeattn.conformance.kit import Kit
from edgeattn.core import tools
from edgeattn.core.errors import CheckFailed, ConversionFailed, ToolchainMissing, UsageError
from edgeattn.pipeline.cache import Cache
from edgeattn.pipeline.export import make_job
from edgeattn.pipeline.plan import make_plan
from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]

PARTY = ROOT / "tests" / "third_party"
#: Those that start processes; the others are looked at for every fault.
APART = ("imports", "availability", "process", "export")
HERE = tuple(check.name for check in CHECKS if check.name not in APART)
#: Class of ``broken_targets`` by the check that is to see it.
FAULTS = {
    "Names": "names",
    "Attributes": "attributes",
    "Precisions": "precisions",
    "Options": "options",
    "Packages": "packages",
    "Requirement": "requirement",
    "Lower": "lower",
    "LowerSilent": "lower",
    "Files": "files",
    "FilesFar": "files",
    "Program": "program",
    "Bytes": "bytes",
    "Outputs": "outputs",
    "Numbers": "numbers",
    "MorePrecisions": "more-precisions",
    "Runs": "runs",
    "Feeds": "feeds",
    "Steps": "steps",
    "Trace": "trace",
    "Operations": "operations",
    "Adopt": "adopt",
    "Others": "others",
    "Lint": "lint",
}
SMALL = {"model": "edgeattn.conformance.models:rectified", "inputs": ["x=2x64"]}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third party's package, installed by pip into a folder of its own; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("party")
    shutil.copytree(PARTY / "edgeattn-target-npz", folder / "source")  # pip builds beside the sources
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder / "site"), str(folder / "source")], check=True, timeout=300)
    return folder / "site"


@pytest.fixture
def installed(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the installed package, to be found by this process and its children."""
    site = tmp_path / "site"
    shutil.copytree(package, site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    yield site
    for name in ("edgeattn_target_npz", "broken_targets", "heavy_target"):
        sys.modules.pop(name, None)


@pytest.fixture
def broken(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the targets with faults can be imported from."""
    monkeypatch.syspath_prepend(str(PARTY))
    return PARTY


def register(site: Path, package: str, name: str, place: str) -> None:
    """What pip leaves of a package with one entry point."""
    folder = site / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{targets.GROUP}]\n{name} = {place}\n")
    importlib.invalidate_caches()


def test_every_check_has_a_fault_that_it_sees() -> None:
    assert {*FAULTS.values(), *APART} == {check.name for check in CHECKS}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_by_its_check_and_by_no_other(broken: Path, fault: str) -> None:
    try:
        report = conform(f"broken_targets:{fault}", HERE)
    finally:
        if fault == "Program":
            models.case.cache_clear()
    assert [outcome.check for outcome in report.failed] == [FAULTS[fault]]
    (failed,) = report.failed
    assert failed.expected
    assert failed.given
    assert failed.mend


@pytest.mark.parametrize(
    ("place", "check"), [("heavy_target:Heavy", "imports"), ("broken_targets:Availability", "availability")]
)
def test_a_fault_of_the_first_look(broken: Path, place: str, check: str) -> None:
    assert [outcome.check for outcome in conform(place, APART[:2]).failed] == [check]


def test_the_order_of_a_set_is_seen_in_another_process(broken: Path) -> None:
    report = conform("broken_targets:Process", ("bytes", "process"))
    assert [outcome.check for outcome in report.failed] == ["process"]
    assert "made.json" in report.failed[0].given


@pytest.mark.slow
def test_an_artifact_that_runs_where_it_was_made_alone_is_no_bundle(broken: Path, installed: Path) -> None:
    register(installed, "faulty", "export-fault", "broken_targets:Export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{installed}:{PARTY}")
        report = conform("export-fault", ("export",))
    assert [outcome.check for outcome in report.failed] == ["export"]


def test_a_third_partys_target_holds(installed: Path) -> None:
    report = conform("npz", HERE)
    assert {outcome.check for outcome in report.outcomes if outcome.verdict == "held"} == {*HERE} - {"more-precisions"}
    (lower,) = (outcome for outcome in report.outcomes if outcome.check == "lower")
    assert "refused convolution" in lower.detail
    assert json.dumps(report.as_dict())


def test_it_is_listed_exported_verified_and_gone(installed: Path, tmp_path: Path, edgeattn_cli: Run) -> None:
    assert "npz" in targets.names()
    listed = edgeattn_cli("targets")
    assert "npz" in listed.stdout
    bundle = edgeattn.export(**SMALL, target="npz", output=tmp_path / "out")  # type: ignore[arg-type]
    done = edgeattn_cli("verify", bundle.path)
    assert done.returncode == 0, done.stderr
    (file,) = bundle.path.glob("main.npz")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckFailed):
        Bundle.open(bundle.path).verify()
    shutil.rmtree(installed)
    importlib.invalidate_caches()
    assert "npz" not in targets.names()
    with pytest.raises(UsageError, match="unknown target"):
        targets.get("npz")


def test_an_edited_target_gives_no_stale_results(installed: Path) -> None:
    def keys(target: str) -> dict[str, str]:
        job = make_job(**SMALL, target=target)  # type: ignore[arg-type]
        return {planned.stage.name: planned.key for planned in make_plan(job, Cache.default())}

    before, onnx = keys("npz"), keys("onnx")
    with (installed / "edgeattn_target_npz.py").open("a") as file:
        file.write("# the same version, another text\n")
    after = keys("npz")
    assert {name for name in before if before[name] != after[name]} == {"lint", "lower", "verify", "bundle"}
    assert keys("onnx") == onnx


def test_the_code_of_a_package_is_all_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "vendor"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "target.py").write_text("from vendor.deep import part\n")
    (folder / "deep" / "part.py").write_text("ONE = 1\n")
    register(tmp_path, "vendor-target", "vendored", "vendor.target:Mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = targets.code_of("vendored")
    (folder / "deep" / "part.py").write_text("ONE = 2\n")
    assert before
    assert targets.code_of("vendored") not in ("", before)
    assert targets.code_of("onnx") == ""
    sys.modules.pop("vendor", None)


@pytest.mark.parametrize(
    ("place", "why"),
    [("no_such_module_of_theirs:Target", "ModuleNotFoundError"), ("json:JSONDecoder", "no subclass of")],
)
def test_a_target_that_cannot_be_loaded_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, why: str
) -> None:
    register(tmp_path, "theirs", "theirs", place)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = targets.get("theirs").availability()
    assert not found.found
    assert why in found.detail
    assert found.fix == "pip install --upgrade theirs, or uninstall it"
    with pytest.raises(ToolchainMissing) as caught:
        make_job("fmvit-digits", target="theirs")
    assert why in str(caught.value.why)
    with pytest.raises(UsageError, match="cannot be loaded"):
        conform("theirs")
    assert make_job("plm-tiny", target="onnx").target == "onnx"
    (said,) = (finding for finding in doctor.examine() if finding.name == "target theirs")
    assert why in said.detail


def test_a_name_that_two_packages_take_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, "theirs", "onnx", "no_such_module_of_theirs:Target")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert targets.get("onnx").availability().found


def test_a_missing_toolchain_ends_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tools.version
    monkeypatch.setattr(tools, "version", lambda name: None if name == "gguf" else real(name))
    report = conform("gguf", ("precisions", "lower"))
    assert report.missing == ("not installed: gguf", "pip install 'edgeattn[gguf]'")
    assert [outcome.verdict for outcome in report.outcomes] == ["held", "skipped"]
    assert not report.as_dict()["holds"]


def test_core_ml_refuses_names_that_its_converter_would_change(tmp_path: Path) -> None:
    if tools.version("coremltools") is None:
        pytest.skip("needs coremltools")
    made = Kit(targets.get("coreml"), "coreml", "", tmp_path).lowered(models.case("names"), "fp32")
    assert isinstance(made.refused, ConversionFailed)
    assert made.refused.value == "input.1, return.value"


def test_the_command(installed: Path, edgeattn_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{installed}:{PARTY}")
    held = edgeattn_cli("targets", "test", "npz", "--check", "names", "--check", "options", "--json")
    assert held.returncode == 0, held.stderr
    assert [check["verdict"] for check in json.loads(held.stdout)["checks"]] == ["held", "held"]
    failed = edgeattn_cli("targets", "test", "broken_targets:Attributes", "--check", "attributes")
    assert failed.returncode == 1
    assert "layouts out of nchw and nhwc" in " ".join(failed.stdout.split())
    unknown = edgeattn_cli("targets", "test", "npz", "--check", "nmaes")
    assert unknown.returncode == 2
    assert "did you mean 'names'?" in unknown.stderr


@pytest.mark.slow
def test_the_whole_kit_on_a_third_partys_target(installed: Path, edgeattn_cli: Run) -> None:
    done = edgeattn_cli("targets", "test", "npz", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {check["check"]: check["verdict"] for check in json.loads(done.stdout)["checks"]}
    assert {name for name, verdict in verdicts.items() if verdict != "held"} == {"more-precisions"}
    assert list(verdicts) == [check.name for check in CHECKS]


HAND = [pytest.param(name, marks=pytest.mark.hand) for name in ("onnx", "optical", "coreml", "tensorrt", "tflite")]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("null", "gguf", "rpi")]


@pytest.mark.parametrize("name", [*SLOW, *HAND])
def test_our_own_targets_hold(name: str) -> None:
    report = conform(name)
    assert report.missing is None
    assert not report.failed, report.failed
