"""The Core ML part of ``run.py``, against a stand-in for coremltools that replays ``coreml_transcript.json``.

What stays unproven: nothing of this ran on Apple hardware. The transcript was composed by hand after coremltools 9.0's
documentation and issue tracker; that the stand-in has the real package's names and parameters is tested below, with the
package as it can be imported here. What Core ML computes, how long it takes, where it places an operation, in which
words it refuses, and whether a state made by one function serves another, is not known from these tests.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeattn.bundle import Bundle, runner
from edgeattn.bundle.bundle import RUNNER
from edgeattn.cli import cli
from edgeattn.core.errors import CheckFailed
from edgeattn.profile.record import parse
from tests.bundle import coreml_stand_in
from tests.bundle.mac import TRANSCRIPT, Mac, make_bundle, make_decoder_bundle, make_mac, transcript

UNITS = ["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"]
ALIVE = {"CPU_AND_NE": {"killed_at": None}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def run(bundle: Bundle, mac: Mac | None, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle.path / "run.py"), *words]
    environ = {**os.environ, **(mac.environ if mac else {})}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, capture_output=True, text=True, env=environ, cwd=cwd, timeout=120, check=False)


def answer(bundle: Bundle, mac: Mac | None, *words: str, code: int = 0, cwd: Path | None = None) -> dict[str, Any]:
    done = run(bundle, mac, *words, "--json", cwd=cwd)
    assert done.returncode == code, done
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def units_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {unit["compute_unit"]: unit for unit in result["compute_units"]}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# The profile.


@pytest.fixture(scope="module")
def home(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Mac:
    return make_mac(tmp_path_factory.mktemp("mac"))


@pytest.fixture(scope="module")
def measured(bundle: Bundle, home: Mac) -> dict[str, Any]:
    """A profile as the transcript has it."""
    before = files(bundle.path)
    result = answer(bundle, home, "--profile")
    assert files(bundle.path) == before
    assert files(home.folder / "cache") == ["edgeattn"]  # nothing that was compiled
    return result


def test_every_unit_is_measured_and_one_that_is_killed_is_reported(measured: dict[str, Any]) -> None:
    result = measured
    assert (result["backend"], result["runtime"], result["system"]) == ("coreml", "coremltools 9.0", "macOS 15.5")
    assert (result["cpu"], result["machine"], result["unit"]) == ("Apple M3", "arm64", "ms")
    assert result["compile_ms"] > 0
    units = units_of(result)
    assert list(units) == UNITS
    killed = units.pop("CPU_AND_NE")
    assert not killed["holds"]
    assert "SIGKILL" in killed["why"]
    assert not {"p50", "latencies", "load_ms"} & set(killed)
    assert killed["ops"]["NE"] == 2  # its plan is still told
    for name, unit in units.items():
        said = TRANSCRIPT["units"][name]
        assert unit["holds"]
        assert unit["runs"] == len(unit["latencies"]) >= 100
        assert 0 < unit["min"] <= unit["p50"] <= unit["p90"] <= unit["p95"] <= unit["p99"] <= max(unit["latencies"])
        assert unit["warmup"] >= 10
        assert unit["first_ms"] > 0
        assert unit["load_first_ms"] >= said["load_ms"][0] > unit["load_ms"] >= said["load_ms"][1]
        assert unit["golden"] == 2
    assert units["CPU_ONLY"]["runs"] == 100  # slow: for others some 80 would do
    assert units["CPU_ONLY"]["min"] >= 25
    for name, unit in units.items():
        assert unit["worst_relative_l2"] == pytest.approx(TRANSCRIPT["units"][name]["error"], rel=0.2)


def test_every_step_has_a_process_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    mac = make_mac(tmp_path, transcript(ALIVE))
    units = units_of(answer(bundle, mac, "--profile", "--runs", "7", "--warmup", "3"))
    assert all(unit["holds"] and (unit["runs"], unit["warmup"]) == (7, 3) for unit in units.values())
    steps: dict[int, list[str]] = {}
    for call in mac.calls():
        steps.setdefault(call["process"], []).append(f"{call['call']} {call['unit']}".strip())
    assert [one[0] for one in steps.values()] == ["compile", *(f"{do} {u}" for u in UNITS for do in ("load", "plan"))]
    for measured in list(steps.values())[1::2]:
        unit = measured[0].split()[1]
        # Two loads; two golden samples, whose first is the first run; then one, three to warm up and seven timed.
        assert measured == [f"load {unit}"] * 2 + [f"predict {unit}"] * (2 + 1 + 3 + 7)


def test_fallback_is_a_number(measured: dict[str, Any]) -> None:
    units = units_of(measured)
    shares = {name: (u["fallback_ops_percent"], u["fallback_cost_percent"]) for name, u in units.items()}
    # Six operations have a device: conv 1/2 of the cost, softmax 1/4, linear 1/8, two gathers 1/16 each, cond none.
    assert shares == {
        "CPU_ONLY": (0.0, 0.0),
        "CPU_AND_GPU": (pytest.approx(100 * 2 / 6), 6.25),
        "CPU_AND_NE": (pytest.approx(100 * 4 / 6), 37.5),
        "ALL": (pytest.approx(100 * 4 / 6), 37.5),
    }
    assert units["ALL"]["ops"] == {"CPU": 3, "GPU": 1, "NE": 2, "unplaced": 1}
    assert units["CPU_AND_NE"]["ops"] == {"CPU": 4, "GPU": 0, "NE": 2, "unplaced": 1}
    assert units["ALL"]["fallback"] == {"ios18.gather": 2, "ios18.softmax": 1, "cond": 1}
    assert units["CPU_ONLY"]["fallback"] == {}
    assert {unit["plan_why"] for unit in units.values()} == {None}


def test_a_unit_with_wrong_numbers_has_no_latency(bundle: Bundle, tmp_path: Path) -> None:
    errors = {"CPU_AND_GPU": {"error": 0.5}, "ALL": {"error": float("nan")}}
    units = units_of(answer(bundle, make_mac(tmp_path, transcript(errors)), "--profile", "--runs", "2"))
    assert units["CPU_AND_GPU"]["why"].startswith("wrong numbers: relative L2 0.5 on y of golden/main-00")
    assert units["CPU_AND_GPU"]["worst_relative_l2"] == pytest.approx(0.5, rel=1e-3)
    assert units["ALL"]["why"].startswith("wrong numbers: relative L2 not finite on y")
    assert units["ALL"]["worst_relative_l2"] is None
    for name in errors:
        wrong = units[name]
        assert not wrong["holds"]
        assert wrong["why"].endswith("allowed 0.01")
        assert not {"p50", "mean", "min", "latencies", "first_ms"} & set(wrong)
        assert wrong["load_first_ms"] > wrong["load_ms"] > 0
    assert units["CPU_ONLY"]["holds"]


def test_what_core_ml_says_is_passed_on(bundle: Bundle, tmp_path: Path) -> None:
    said = {
        "ALL": {"refused_at": "load", "refusal": "Error in declaring network."},
        "CPU_AND_GPU": {"refused_at": "predict", "refusal": "Failed to evaluate model 0 in pipeline."},
    }
    units = units_of(answer(bundle, make_mac(tmp_path, transcript(said)), "--profile", "--runs", "1"))
    for name, one in said.items():
        assert not units[name]["holds"]
        assert one["refusal"] in units[name]["why"]
    assert units["CPU_ONLY"]["holds"]


def test_a_profile_of_nothing_is_an_error(bundle: Bundle, tmp_path: Path) -> None:
    dead = {name: {"killed_at": "load", "signal": "SIGSEGV"} for name in UNITS}
    result = answer(bundle, make_mac(tmp_path, transcript(dead)), "--profile", code=1)
    assert "no compute unit could be measured" in result["error"]
    assert result["error"].count("SIGSEGV") == 4


def test_without_a_plan_there_is_a_latency_and_a_reason(bundle: Bundle, tmp_path: Path) -> None:
    units = {"CPU_ONLY": {"refused_at": "plan", "refusal": "needs macOS 14.4"}}
    units["ALL"] = {"killed_at": "plan", "signal": "SIGABRT"}
    silent = [{"name": "ios16.conv", "cost": None, "on": {}}] * 3
    found = units_of(
        answer(bundle, make_mac(tmp_path, transcript(units, operations=silent)), "--profile", "--runs", "1")
    )
    reasons = {"CPU_ONLY": "needs macOS 14.4", "ALL": "SIGABRT", "CPU_AND_GPU": "no device for any of the 3 operations"}
    for name, why in reasons.items():
        unit = found[name]
        assert unit["p50"] > 0
        assert why in unit["plan_why"]
        assert (unit["ops"], unit["fallback"]) == (None, None)
        assert (unit["fallback_ops_percent"], unit["fallback_cost_percent"]) == (None, None)


def test_a_plan_without_costs_has_the_operations(bundle: Bundle, tmp_path: Path) -> None:
    said = transcript(operations=[{"name": "ios16.conv", "cost": None, "on": {"ALL": "CPU"}}])
    (tmp_path / "main.mlmodelc").mkdir()
    (tmp_path / "main.mlmodelc" / "coremldata.bin").touch()
    job = {"do": "plan", "unit": "ALL", "compiled": str(tmp_path / "main.mlmodelc")}
    plan = answer(bundle, make_mac(tmp_path / "mac", said), "--step", json.dumps(["coreml", job]))
    assert (plan["fallback_ops_percent"], plan["fallback_cost_percent"]) == (100.0, None)
    assert plan["plan_why"] == "the plan has no costs"


def test_slow_models_are_timed_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "run", runner)  # as it is called in a bundle
    enough = importlib.import_module("edgeattn.bundle.runner_profile")._enough
    assert not enough(99, 600.0, None, 100)
    assert enough(100, 600.0, None, 100)
    assert not enough(100, 1.9, None, 100)
    assert enough(5, 30.0, None, 5)  # other runtimes are not
    assert enough(7, 0.0, 7, 100)


def test_threads_are_not_for_core_ml(bundle: Bundle, tmp_path: Path) -> None:
    assert "threads" in answer(bundle, make_mac(tmp_path), "--profile", "--threads", "2", code=2)["error"]


def test_an_unknown_entry(bundle: Bundle, tmp_path: Path) -> None:
    assert "there are main" in answer(bundle, make_mac(tmp_path), "--profile", "--entry", "x", code=2)["error"]


def test_the_profile_for_a_person(bundle: Bundle, tmp_path: Path) -> None:
    done = run(bundle, make_mac(tmp_path), "--profile", "--runs", "5")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert lines[0] == "double.coreml.fp16: coremltools 9.0, macOS 15.5, Apple M3"
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:6]}
    assert list(rows) == UNITS
    assert rows["CPU_AND_NE"] == [*"-" * 6, "66.7", "%", "37.5", "%"]
    assert float(rows["ALL"][5]) >= 100
    assert any(line.startswith("CPU_AND_NE: ") and "SIGKILL" in line for line in lines)
    assert "ALL: not on the NE: ios18.gather 2, ios18.softmax 1, cond 1" in lines
    assert lines[-1].startswith("5 to 5 runs; one predict")


# Through EdgeAttn.


def test_edgeattn_profile_shows_a_row_for_each_unit(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = transcript({"CPU_AND_GPU": {"error": 0.5}, "ALL": {"killed_at": "plan", "signal": "SIGABRT"}})
    for name, value in make_mac(tmp_path, said).environ.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(cli, ["profile", str(bundle.path), "--runs", "5"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert any(line.startswith("double.coreml.fp16, CPU_ONLY ") for line in lines)
    assert any(line.startswith("double.coreml.fp16, ALL ") for line in lines)
    text = "\n".join(lines)
    assert "off cpu: nothing" in text  # CPU_ONLY
    assert "by Core ML's plan: estimated shares of the cost, not times" in text
    assert any(
        line.startswith("double.coreml.fp16, CPU_AND_NE: not measured: ") and "SIGKILL" in line for line in lines
    )
    assert "CPU_AND_GPU: not measured: wrong numbers: relative L2 0.5" in text
    assert any("ALL: its plan cannot be told" in line and "SIGABRT" in line for line in lines)
    assert "Apple M3, coremltools 9.0" in text
    found = CliRunner().invoke(cli, ["profile", str(bundle.path), "--runs", "5", "--json", "--no-history"])
    records = {record.settings.unit: record for record in parse(json.loads(found.output), "stdout")}
    assert list(records) == ["CPU_ONLY", "ALL"]
    assert records["CPU_ONLY"].breakdown.fallback == {}
    assert records["ALL"].latency.load_first_ms >= 100 > records["ALL"].latency.load_ms[0]
    assert records["ALL"].latency.runs == 5


# Numbers and data.


def test_it_verifies_on_two_units(bundle: Bundle, tmp_path: Path) -> None:
    mac = make_mac(tmp_path)
    result = answer(bundle, mac)
    assert result["holds"]
    assert [(part["compute_unit"], part["runtime"]) for part in result["parts"]] == [
        ("ALL", "coremltools 9.0 on ALL"),
        ("CPU_ONLY", "coremltools 9.0 on CPU_ONLY"),
    ]
    assert {part["proven"] for part in result["parts"]} == {False}
    assert result["worst_relative_l2"] == pytest.approx(3e-4, rel=1e-2)
    assert len({call["process"] for call in mac.calls()}) == 2
    shown = run(bundle, mac).stdout
    assert "double.coreml.fp16: holds under coremltools 9.0 on ALL" in shown
    assert "under coremltools 9.0 on CPU_ONLY, which is not among those that the numbers were proven with" in shown


@pytest.mark.parametrize("unit", ["ALL", "CPU_ONLY"])
def test_wrong_numbers_on_one_of_them_do_not_hold(bundle: Bundle, tmp_path: Path, unit: str) -> None:
    result = answer(bundle, make_mac(tmp_path, transcript({unit: {"error": 0.5}})), "--verify", code=1)
    assert not result["holds"]
    assert [part["compute_unit"] for part in result["parts"] if not part["holds"]] == [unit]


def test_a_unit_that_is_killed_does_not_verify(bundle: Bundle, tmp_path: Path) -> None:
    dead = transcript({"ALL": {"killed_at": "predict", "signal": "SIGKILL"}})
    assert "on ALL: it crashed (SIGKILL)" in answer(bundle, make_mac(tmp_path, dead), code=1)["error"]


def test_it_runs_ones_own_data(bundle: Bundle, tmp_path: Path) -> None:
    x = np.array([[1, -2, 0, 3, 4, 5]], np.float32)
    np.save(tmp_path / "x.npy", x)
    mac = make_mac(tmp_path / "mac")
    result = answer(bundle, mac, "--input", f"x={tmp_path / 'x.npy'}", cwd=tmp_path)
    assert result["outputs"]["y"]["shape"] == [1, 6]
    np.testing.assert_allclose(np.load(tmp_path / "output.y.npy"), 2 * x, rtol=1e-3)
    assert {call["unit"] for call in mac.calls()} == {"ALL"}
    wrong = make_mac(tmp_path / "wrong", transcript({"ALL": {"error": 0.5}}))
    assert answer(bundle, wrong, "--input", f"x={tmp_path / 'x.npy'}", code=1)["error"].startswith("refused")


@pytest.mark.parametrize("image", ["rgb", "bgr", "gray"])
def test_images(tmp_path: Path, image: str) -> None:
    bundle = make_bundle(tmp_path, image=image)
    mac = make_mac(tmp_path / "mac", transcript(image=image))
    assert answer(bundle, mac)["worst_relative_l2"] <= 1e-3
    if image == "bgr":
        assert units_of(answer(bundle, mac, "--profile", "--runs", "1"))["ALL"]["holds"]


def test_images_without_pillow(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, image="rgb")
    mac = make_mac(tmp_path / "mac", transcript(image="rgb"), hidden=("PIL",))
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4, 5), np.uint8))
    for words in (["--verify"], ["--profile"], ["--input", f"x={tmp_path / 'x.npy'}"]):
        result = answer(bundle, mac, *words, code=3)
        assert "Pillow is not installed" in result["error"]
        assert result["fix"] == "python3 -m pip install pillow"


def test_a_classifier_gives_a_row_in_the_order_of_the_labels(tmp_path: Path) -> None:
    labels = ("cat", "dog", "eel")
    bundle = make_bundle(tmp_path, labels=labels)
    assert answer(bundle, make_mac(tmp_path / "mac", transcript(labels=labels)))["worst_relative_l2"] <= 1e-3


def test_a_state_begins_anew_at_every_run(bundle: Bundle, tmp_path: Path) -> None:
    mac = make_mac(tmp_path, transcript(state=["cache"]))
    assert answer(bundle, mac)["holds"]
    assert units_of(answer(bundle, mac, "--profile", "--runs", "3"))["ALL"]["holds"]


# Decoders.

DECODER = {"state": [coreml_stand_in.ROWS], "functions": ["decode", "prefill_4"]}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_decoder_bundle(tmp_path_factory.mktemp("decoder"))


def test_functions_of_a_package_go_on_with_one_state(decoder: Bundle, tmp_path: Path) -> None:
    mac = make_mac(tmp_path, transcript(**DECODER))
    prompt = [3, 1, 4, 1, 5, 6]
    ids = ",".join(map(str, prompt))
    # Four at once, then one by one: each token that is decoded sees all of them.
    made = answer(decoder, mac, "--ids", ids, "--max-tokens", "8")
    wanted = list(prompt)
    for _ in range(8):
        wanted.append(sum(wanted) % coreml_stand_in.VOCABULARY)
    assert made["ids"] == wanted[len(prompt) :]
    assert made["cache_bytes"] is None  # Core ML has it
    process = [call["call"] for call in mac.calls() if call["process"] == mac.calls()[-1]["process"]]
    assert process.count("load") == 2
    assert process.count("make_state") == 1


def test_the_golden_cache_is_put_into_the_state_and_its_rows_are_compared(decoder: Bundle, tmp_path: Path) -> None:
    result = answer(decoder, make_mac(tmp_path, transcript(**DECODER)))
    assert result["holds"]
    assert [part["golden"] for part in result["parts"]] == [4, 4]
    wrong = transcript({"CPU_ONLY": {"error": 0.5}}, **DECODER)
    result = answer(decoder, make_mac(tmp_path / "wrong", wrong), code=1)
    assert [part["holds"] for part in result["parts"]] == [True, False]


@pytest.mark.parametrize("entry", ["decode", "prefill_4"])
def test_a_decoders_entry_is_measured_with_its_own_function(decoder: Bundle, tmp_path: Path, entry: str) -> None:
    mac = make_mac(tmp_path, transcript(ALIVE, **DECODER))
    result = answer(decoder, mac, "--profile", "--entry", entry, "--runs", "3")
    assert all(unit["holds"] and unit["runs"] == 3 and unit["ops"] for unit in result["compute_units"])


# Where it cannot run.


@pytest.mark.parametrize("words", [["--verify"], ["--profile"], ["--input", "x={x}"]], ids=lambda words: words[0])
def test_elsewhere_than_on_macos(bundle: Bundle, tmp_path: Path, words: list[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 6), np.float32))
    result = answer(bundle, None, *(word.format(x=tmp_path / "x.npy") for word in words), code=3)
    assert result["error"] == "Core ML runs on macOS only; this system is Linux"
    assert "edgeattn verify BUNDLE" in result["fix"]


def test_an_artifact_of_several_that_runs_elsewhere(make_bundle: Any, tmp_path: Path) -> None:
    other = {
        "backend": "coreml",
        "requirement": "coremltools",
        "entries": {},
        "runtimes": (),
        "tools": {},
        "numerics": {},
    }
    both = make_bundle(tmp_path, alternatives=(other,))
    assert (both.path / "run_coreml.py").is_file()
    result = answer(both, None)
    assert result["holds"]
    (missing,) = [part for part in result["parts"] if "missing" in part]
    assert (missing["backend"], missing["fix"][:22]) == ("coreml", "edgeattn verify BUNDLE")


def test_without_coremltools(bundle: Bundle, tmp_path: Path) -> None:
    mac = make_mac(tmp_path, hidden=("coremltools",))
    for words in (["--verify"], ["--profile"]):
        assert answer(bundle, mac, *words, code=3)["fix"] == "python3 -m pip install numpy coremltools"


# The files.


def test_the_part_travels_only_where_it_is_needed(bundle: Bundle, tiny: Bundle, tmp_path: Path) -> None:
    assert {"run.py", "run_coreml.py"} <= set(bundle.manifest.files)
    assert not (tiny.path / "run_coreml.py").exists()
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    with (copy / "run_coreml.py").open("a") as file:
        file.write("# more\n")
    with pytest.raises(CheckFailed) as caught:
        Bundle.open(copy).check_files()
    assert "run_coreml.py" in caught.value.details[0]
    assert "run_coreml.py was changed" in answer(Bundle.open(copy), make_mac(tmp_path / "mac"), code=1)["error"]
    (copy / "run_coreml.py").unlink()
    for words in (["--verify"], ["--profile"]):
        assert "run_coreml.py is missing" in answer(Bundle.open(copy), None, *words, code=1)["error"]


def test_it_is_python_3_9_and_imports_the_standard_library_at_the_top() -> None:
    source = RUNNER.with_name("runner_coreml.py")
    tree = ast.parse(source.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names | {"__future__"}
    assert any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)  # for ``X | Y``
    assert not any(isinstance(n, ast.Match) for n in ast.walk(tree))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not any(
        k.arg == "strict" for c in calls if isinstance(c.func, ast.Name) and c.func.id == "zip" for k in c.keywords
    )


# The stand-in.


@pytest.mark.parametrize("module", coreml_stand_in.MODULES)
def test_the_stand_in_has_the_real_names_and_parameters(module: str) -> None:
    real = importlib.import_module(module)
    for name in coreml_stand_in.MODULES[module]:
        if name == "models":
            assert hasattr(real, name)
            continue
        ours, theirs = getattr(coreml_stand_in, name), getattr(real, name)
        if dataclasses.is_dataclass(ours):
            fields = [f.name for f in dataclasses.fields(ours) if f.name != "said"]
            assert fields == [f.name for f in dataclasses.fields(theirs) if f.name != "__proxy__"]
        elif inspect.isclass(ours) and issubclass(ours, coreml_stand_in.enum.Enum):
            assert {one.name: one.value for one in ours} == {one.name: one.value for one in theirs}
        elif inspect.isclass(ours):
            methods = {n for n in dir(ours) if callable(getattr(ours, n)) and not n.startswith("_")}
            methods |= {"__init__"} & set(vars(ours))
            for method in methods:
                assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method)), (name, method)
        else:
            assert parameters(ours) == parameters(theirs), name


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
