"""Toolchains in environments of their own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeattn import toolchains
from edgeattn.bundle import Bundle
from edgeattn.core.errors import ConversionFailed, ToolchainMissing, UsageError
from edgeattn.toolchains import KNOWN, environment
from tests.conftest import ROOT
from tests.toolchains import tiny


def quiet(_: str) -> None:
    """Nobody looks."""


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny.prepare(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An added toolchain that the tests of this file call."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.prepare(tmp_path_factory.mktemp("made"), patch)
        yield toolchains.add("tiny", quiet).folder


def left(tmp_path: Path) -> list[str]:
    """What stands in the folder of toolchains, without locks."""
    return [p.name for p in (tmp_path / "own" / "toolchains").glob("*") if not p.name.endswith(".lock")]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_toolchain_is_pinned_exactly(name: str) -> None:
    known = KNOWN[name]
    assert known.name == name
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", requirement) for requirement in known.requirements)
    assert known.python[0] <= known.python[1]
    assert len(known.purpose) < 60


def test_an_unknown_name_is_refused_with_the_closest() -> None:
    for asked in (toolchains.get, toolchains.installed, toolchains.folder, toolchains.remove):
        with pytest.raises(UsageError, match="did you mean 'modelopt'"):
            asked("model-opt")


def test_what_is_not_added_is_missing_with_its_line(wheels: Path, tmp_path: Path) -> None:
    assert toolchains.installed("tiny").state == "not added"
    with pytest.raises(ToolchainMissing) as caught:
        toolchains.call("tiny", tmp_path / "any.py", {}, tmp_path / "work", 5)
    assert caught.value.fix == "edgeattn toolchain add tiny"
    assert not (tmp_path / "own").exists()


def test_it_is_added_found_and_removed(wheels: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = toolchains.add("tiny", said.append)
    assert made == toolchains.installed("tiny")
    assert made.state == "installed"
    assert made.folder == tmp_path / "own" / "toolchains" / "tiny"
    assert made.versions == {"edgeattn-tiny": "1.0"}
    assert toolchains.packages("tiny") == made.versions
    assert any("unpacking 1 packages" in line for line in said)
    assert 1_000 < toolchains.size("tiny") < 5_000_000
    assert importlib.util.find_spec("tiny_tool") is None

    said.clear()
    assert toolchains.add("tiny", said.append) == made
    assert not said

    assert toolchains.remove("tiny") == made.folder
    assert left(tmp_path) == []
    assert toolchains.remove("tiny") is None
    assert toolchains.installed("tiny").state == "not added"


def test_a_failing_pip_is_shown_and_leaves_nothing(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", tiny.toolchain(requirements=("edgeattn-tiny==9.9",)))
    with pytest.raises(ToolchainMissing, match="pip install of toolchain tiny failed") as caught:
        toolchains.add("tiny", quiet)
    assert any("No matching distribution found for edgeattn-tiny==9.9" in line for line in caught.value.details)
    assert left(tmp_path) == []


def test_what_does_not_load_is_not_installed(wheels: Path, tmp_path: Path) -> None:
    tiny.wheel(wheels, code="raise ImportError('libtiny.so is not there')")
    with pytest.raises(ToolchainMissing, match="loading tiny_tool failed") as caught:
        toolchains.add("tiny", quiet)
    assert caught.value.details[-1] == "ImportError: libtiny.so is not there"
    assert left(tmp_path) == []


def test_packages_of_ours_do_not_pass_for_the_toolchains(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it on PYTHONPATH, pip would find the requirement already satisfied and install nothing."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", f"--target={tmp_path / 'ours'}", "edgeattn-tiny==1.0"],
        check=True,
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ours"))
    assert toolchains.add("tiny", quiet).versions == {"edgeattn-tiny": "1.0"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"python": ((3, 2), (3, 4))}, "wheels for Python 3.2 to 3.4"),
        ({"machines": ("vax",)}, "wheels for vax"),
        ({"size_mb": 10**9}, "takes about 1000000000 MB"),
    ],
    ids=["python", "machine", "disk"],
)
def test_what_cannot_be_added_here_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, why: str
) -> None:
    tiny.prepare(tmp_path, monkeypatch, **changes)
    with pytest.raises(ToolchainMissing, match=why):
        toolchains.add("tiny", quiet)
    assert not (tmp_path / "own").exists()


def test_a_folder_that_cannot_be_made_is_a_usage_error(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("a file")
    with pytest.raises(UsageError, match="EDGEATTN_HOME"):
        toolchains.add("tiny", quiet)


def test_an_incomplete_one_is_not_installed_and_made_anew(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "own" / "toolchains" / "tiny" / "bin").mkdir(parents=True)
    found = toolchains.installed("tiny")
    assert (found.state, found.usable) == ("incomplete", False)
    with pytest.raises(ToolchainMissing, match="cut off"):
        toolchains.call("tiny", tmp_path / "any.py", {}, tmp_path / "work", 5)
    assert toolchains.add("tiny", quiet).usable


def test_other_pins_or_a_changed_environment_make_it_outdated(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = toolchains.add("tiny", quiet).folder
    python = toolchains.python("tiny")
    target = os.readlink(python)
    python.unlink()
    assert "Python" in toolchains.installed("tiny").why
    python.symlink_to(target)

    metadata = next(place.glob("lib/python*/site-packages/*.dist-info/METADATA"))
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    assert toolchains.installed("tiny").why == "edgeattn-tiny in it is 1.1, not 1.0"
    metadata.unlink()
    assert toolchains.installed("tiny").why == "edgeattn-tiny is not in it"

    tiny.wheel(wheels, "2.0")
    monkeypatch.setitem(KNOWN, "tiny", tiny.toolchain(requirements=("edgeattn-tiny==2.0",)))
    found = toolchains.installed("tiny")
    assert (found.state, found.why) == ("outdated", "it was made for another version of EdgeAttn")
    assert toolchains.add("tiny", quiet).versions == {"edgeattn-tiny": "2.0"}


def test_a_local_part_of_a_version_is_free() -> None:
    wanted = tiny.toolchain(requirements=("torch==2.13.0",))
    assert environment.mismatches(wanted, {"torch": "2.13.0+cpu"}) == []
    assert environment.mismatches(wanted, {"torch": "2.13.1"}) == ["torch in it is 2.13.1, not 2.13.0"]


ADD = """
import json, sys
from edgeattn.toolchains import KNOWN, Toolchain, add
fields = json.loads(sys.argv[1])
KNOWN["tiny"] = Toolchain(**{**fields, "python": tuple(map(tuple, fields["python"]))})
add("tiny", lambda text: None)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_an_add_that_is_killed_leaves_nothing_that_looks_installed(
    how: signal.Signals, wheels: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # an index that never answers
        server.settimeout(60)
        stalled = {
            **{name: value for name, value in os.environ.items() if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")},
            "PIP_INDEX_URL": f"http://127.0.0.1:{server.getsockname()[1]}/simple",
            "PIP_RETRIES": "0",
            "NO_PROXY": "127.0.0.1",
        }
        child = subprocess.Popen(
            [sys.executable, "-c", ADD, json.dumps(vars(KNOWN["tiny"]))], env=stalled, cwd=ROOT, stderr=subprocess.PIPE
        )
        connection, _ = server.accept()  # pip is in the midst of it
        assert left(tmp_path) == ["tiny"]
        with pytest.raises(ToolchainMissing, match="busy"):
            toolchains.add("tiny", quiet)
        child.send_signal(how)
        child.communicate(timeout=30)
        if how == signal.SIGINT:  # ended in order: pip with it, and nothing is left
            assert left(tmp_path) == []
            connection.settimeout(10)
            while connection.recv(4096):
                pass
        else:
            # pip does not know yet that it is alone; until it ends nobody may begin anew beneath it
            assert toolchains.installed("tiny").state == "incomplete"
            with pytest.raises(ToolchainMissing, match="busy"):
                toolchains.add("tiny", quiet)
        connection.close()
    for _ in range(300):
        try:
            assert toolchains.add("tiny", quiet).usable
            break
        except ToolchainMissing as error:
            assert "busy" in error.what  # noqa: PT017 (until it is free)
            time.sleep(0.1)
    assert toolchains.installed("tiny").usable


def run(text: str, folder: Path, timeout: float = 30, **request: object) -> dict:
    path = folder / "script.py"
    path.write_text(text)
    return toolchains.call("tiny", path, request, folder / "work", timeout)


ANSWER = """
import json, os, sys, tiny_tool
from pathlib import Path
folder = Path(sys.argv[1])
request = json.loads((folder / "request.json").read_text())
print("a word of its own")
found = {}
for name in ("pydantic", "edgeattn", "leak"):
    try:
        __import__(name)
        found[name] = True
    except ImportError:
        found[name] = False
result = {"sum": sum(request["numbers"]), "version": tiny_tool.VERSION, "found": found, "cwd": os.getcwd()}
(folder / "result.json").write_text(json.dumps(result))
"""


def test_a_request_goes_in_and_a_result_comes_out(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "leak.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run(ANSWER, tmp_path, numbers=[1, 2, 39])
    assert result["sum"] == 42
    assert result["version"] == "1.0"
    assert result["cwd"] == str((tmp_path / "work").resolve())
    assert not any(result["found"].values())  # nothing of ours is seen there
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "work" / "log.txt").read_text() == "a word of its own\n"


@pytest.mark.parametrize(
    ("text", "why", "shown"),
    [
        ("raise ValueError('a shape of three')", "ended with code 1", "ValueError: a shape of three"),
        ("import sys; sys.exit('in words')", "ended with code 1", "in words"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "when memory runs out", ""),
        ("print('nothing to say')", "ended without a result.json", "nothing to say"),
        ("open('result.json', 'w').write('{')", "result.json cannot be read", ""),
        ("open('result.json', 'w').write('[1]')", "result.json is no object", ""),
    ],
    ids=["raises", "exits", "crash", "memory", "no-result", "half-a-result", "a-list"],
)
def test_a_script_that_fails_is_said_in_words(made: Path, tmp_path: Path, text: str, why: str, shown: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "result.json").write_text('{"of": "an earlier call"}')
    with pytest.raises(ConversionFailed, match="script of toolchain tiny failed") as caught:
        run(text, tmp_path)
    assert why in str(caught.value.why)
    assert caught.value.where == str(tmp_path / "work" / "log.txt")
    assert shown in "\n".join(caught.value.details)


def test_a_script_that_takes_too_long_is_killed_with_its_children(made: Path, tmp_path: Path) -> None:
    text = (
        "import subprocess, sys, time\n"
        "code = \"import time; open('child', 'w').close(); time.sleep(3); open('late', 'w').close()\"\n"
        "subprocess.Popen([sys.executable, '-c', code])\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    with pytest.raises(ConversionFailed, match="did not end within 2 s"):
        run(text, tmp_path, timeout=2)
    assert time.monotonic() - start < 10
    assert (tmp_path / "work" / "child").exists()
    time.sleep(3)
    assert not (tmp_path / "work" / "late").exists()


def test_it_is_used_by_many_at_once_and_changed_by_one_alone(made: Path, tmp_path: Path) -> None:
    with environment.hold("tiny", alone=False):
        assert run(ANSWER, tmp_path, numbers=[1])["sum"] == 1
        with pytest.raises(ToolchainMissing, match="busy"):
            toolchains.remove("tiny")
    with environment.hold("tiny", alone=True), pytest.raises(ToolchainMissing, match="busy"):
        run(ANSWER, tmp_path, numbers=[1])
    assert toolchains.installed("tiny").usable


def test_scripts_import_nothing_of_edgeattn() -> None:
    paths = sorted(toolchains.script("any").parent.glob("*.py"))
    assert toolchains.script("modelopt_quantize") in paths
    for path in paths:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
        assert not [name for name in names if name.startswith("edgeattn")]


#: Preprocessing of the digits recipe.
MEAN, STD = np.float32(0.3054), np.float32(0.3237)


@pytest.mark.slow
def test_modelopt_is_added_and_quantizes(digits: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: 1.3 GB and a minute and a half; pip must reach an index, with a CPU build of torch."""
    import onnx
    import onnx_ir as ir
    import onnxruntime

    monkeypatch.setenv("EDGEATTN_HOME", str(tmp_path / "own"))
    made = toolchains.add("modelopt", quiet)
    assert made.versions["onnx"] == "1.21.0"
    with np.load(ROOT / "recipes" / "data" / "digits-heldout.npz") as data:
        images, labels = (data["x"][:, None] / np.float32(255) - MEAN) / STD, data["y"]
    np.savez(tmp_path / "calibration.npz", x=images[:64])
    source = digits.path / "model.onnx"
    before = source.stat().st_mtime_ns
    for mode in ("int8", "fp8"):
        out = tmp_path / f"{mode}.onnx"
        request = {"onnx": str(source), "calibration": str(tmp_path / "calibration.npz"), "mode": mode, "out": str(out)}
        script = toolchains.script("modelopt_quantize")
        result = toolchains.call("modelopt", script, request, tmp_path / mode, 300)
        assert result["out"] == str(out)
        assert result["versions"]["nvidia-modelopt"] == "0.47.0"
        count = Counter(node.op_type for node in onnx.load(out).graph.node)
        assert count["QuantizeLinear"] == count["DequantizeLinear"] >= 40
    assert source.stat().st_mtime_ns == before  # ModelOpt would write over its input
    # As float operations around Q/DQ: the kernels for int8 of a CPU without VNNI saturate.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    right = sum(int(session.run(None, {"x": x})[0].argmax() == y) for x, y in zip(images, labels, strict=True))
    assert right >= 0.95 * len(labels)

    from edgeattn.targets.base import LowerPlan
    from edgeattn.targets.tensorrt.modelopt import quantize

    model = ir.load(source)
    quantized, note = quantize(model, LowerPlan("w8a8", [{"x": image[None]} for image in images[:8]], {}))
    assert note["by"] == "ModelOpt 0.47.0"
    assert len(note["operations"]) >= 40
    assert any(operation["module"].startswith("stages.") for operation in note["operations"])
    assert sum(node.op_type == "QuantizeLinear" for node in quantized.graph) >= 40
