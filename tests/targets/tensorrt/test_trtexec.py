"""The lines of trtexec, and a build.sh that is really run against a trtexec of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.core.errors import UsageError
from edgeattn.targets.tensorrt import trtexec
from edgeattn.targets.tensorrt.trtexec import (
    DROPPED_BY_11,
    FLAGS,
    PART,
    PRECISIONS,
    TOOLS,
    Build,
    Form,
    line,
    parse,
    script,
)

ROOT = Path(__file__).parents[3]
_FOUND = {os.path.realpath(path): path for path in map(shutil.which, ("dash", "bash", "sh")) if path}
#: One for each shell: sh is often dash, or bash.
SHELLS = [os.path.basename(path) for path in _FOUND.values()]

_letters = st.characters(exclude_categories=("C",))
_files = st.text(_letters, min_size=1, max_size=12).filter(lambda text: not text.startswith("~"))
_inputs = st.text(st.characters(exclude_categories=("C",), exclude_characters=",'*"), min_size=1, max_size=8)


@st.composite
def _profile(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    sizes = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3).map(sorted)
    ends = draw(st.lists(sizes, max_size=5))
    return tuple(tuple(size[index] for size in ends) for index in range(3))


@st.composite
def _builds(draw: st.DrawFn) -> Build:
    onnx, engine, cache = draw(st.lists(_files, min_size=3, max_size=3, unique=True))
    return Build(
        onnx=onnx,
        engine=engine,
        precision=draw(st.sampled_from(PRECISIONS)),
        profiles=draw(st.dictionaries(_inputs, _profile(), max_size=3)),
        workspace_mb=draw(st.none() | st.integers(1, 2**31 - 1)),
        weight_streaming=draw(st.booleans()),
        strip=draw(st.booleans()),
        timing_cache=draw(st.sampled_from(["", cache])),
        level=draw(st.none() | st.integers(0, 5)),
    )


def _for_tool(build: Build, tool: str) -> Build:
    """Without what TensorRT-RTX lacks."""
    return replace(build, workspace_mb=None, timing_cache="", level=None) if tool == "rtx" else build


@pytest.mark.parametrize("tool", TOOLS)
@given(build=_builds())
def test_each_line_reads_back_to_its_build(tool: str, build: Build) -> None:
    build = _for_tool(build, tool)
    read = parse(line(build, tool), tool)
    ends = [read.pop(f"{end}Shapes", {}) for end in ("min", "opt", "max")]
    assert {name: tuple(end[name] for end in ends) for name in ends[0]} == dict(build.profiles)
    assert read.pop("skipInference")
    # Every precision of 10 is a matter of the graph too, so that 10 must be told to hold to it.
    assert read.pop("stronglyTyped", False) == (tool == "10")
    assert read.pop("noTF32", False) == (build.precision == "fp32")
    assert read.pop("stripAllWeights" if tool == "rtx" else "stripWeights", False) == build.strip
    assert read.pop("memPoolSize", {}) == ({} if build.workspace_mb is None else {"workspace": build.workspace_mb})
    assert read.pop("onnx") == build.onnx
    assert read.pop("saveEngine") == build.engine
    assert read.pop("timingCacheFile", "") == build.timing_cache
    assert read.pop("builderOptimizationLevel", None) == build.level
    assert read.pop("allowWeightStreaming", False) == build.weight_streaming
    assert not read


@given(build=_builds())
def test_10_and_11_differ_in_strong_typing_only(build: Build) -> None:
    assert [word for word in line(build, "10") if word != "--stronglyTyped"] == line(build, "11")


@given(build=_builds())
def test_11_is_never_given_what_it_dropped(build: Build) -> None:
    names = {word.partition("=")[0] for word in line(build, "11")}
    assert not names & {*DROPPED_BY_11, "--stronglyTyped"}


def test_one_line_in_full() -> None:
    build = Build("net.onnx", "net.engine", "w8a8", {"x": ((1, 3, 8), (2, 3, 8), (4, 3, 8)), "n": ((), (), ())}, 512)
    assert line(build, "10") == [
        "--onnx=net.onnx",
        "--saveEngine=net.engine",
        "--skipInference",
        "--stronglyTyped",
        "--minShapes=x:1x3x8,n:scalar",
        "--optShapes=x:2x3x8,n:scalar",
        "--maxShapes=x:4x3x8,n:scalar",
        "--memPoolSize=workspace:512",
    ]


_ARGUMENTS = {Form.NONE: "", Form.PATH: "=f", Form.TEXT: "=obey", Form.INT: "=1", Form.SHAPES: "=x:1", Form.POOLS: "="}


def test_the_dropped_flags() -> None:
    assert {"--fp16", "--bf16", "--int8", "--fp8", "--int4", "--best", "--calib"} <= set(DROPPED_BY_11)


@pytest.mark.parametrize("name", DROPPED_BY_11)
def test_11_and_rtx_refuse_what_10_takes(name: str) -> None:
    word = name + _ARGUMENTS[FLAGS[name].form]
    assert parse(["--onnx=m", word], "10")[name[2:]]
    for tool in ("11", "rtx"):
        with pytest.raises(UsageError, match=f"{TOOLS[tool]} has no flag {name}"):
            parse(["--onnx=m", word], tool)


def test_11_still_takes_strong_typing_which_it_ignores() -> None:
    assert parse(["--onnx=m", "--stronglyTyped"], "11")["stronglyTyped"]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"workspace_mb": 1}, "--memPoolSize"),
        ({"timing_cache": "t"}, "--timingCacheFile"),
        ({"level": 0}, "--builderOptimizationLevel"),
    ],
)
def test_rtx_refuses_what_it_lacks(change: dict[str, object], flag: str) -> None:
    with pytest.raises(UsageError, match=f"tensorrt_rtx of TensorRT-RTX 1 has no flag {flag}"):
        line(replace(Build("m", "e"), **change), "rtx")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--saveEngine=e"],
        ["--onnx"],
        ["--onnx="],
        ["--onnx=m", "--onnx=m"],
        ["--onnx=m", "stray"],
        ["--onnx=m", "--wrong"],
        ["--onnx=m", "--noTF32=1"],
        ["--onnx=m", "--best", "--stronglyTyped"],
        ["--onnx=m", "--builderOptimizationLevel=6"],
        ["--onnx=m", "--builderOptimizationLevel=3x"],
        ["--onnx=m", "--builderOptimizationLevel=-1"],
        ["--onnx=m", "--optShapes=x"],
        ["--onnx=m", "--optShapes=x:1x"],
        ["--onnx=m", "--optShapes=x:-1"],
        ["--onnx=m", "--optShapes=:1"],
        ["--onnx=m", "--optShapes=x:1,x:2"],
        ["--onnx=m", "--optShapes=x:2147483648"],
        ["--onnx=m", "--minShapes=x:1"],
        ["--onnx=m", "--minShapes=x:1", "--maxShapes=x:1"],
        ["--onnx=m", "--minShapes=x:1", "--optShapes=x:1"],
        ["--onnx=m", "--minShapes=x:1", "--optShapes=y:1", "--maxShapes=x:1"],
        ["--onnx=m", "--memPoolSize=512"],
        ["--onnx=m", "--memPoolSize=workspace"],
        ["--onnx=m", "--memPoolSize=work:1"],
        ["--onnx=m", "--memPoolSize=workspace:1T"],
        ["--onnx=m", "--memPoolSize=workspace:1,workspace:2"],
    ],
)
def test_wrong_lines_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse(words, "10")


def test_an_unknown_tool_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown TensorRT tool"):
        line(Build("m", "e"), "8")


def test_sizes_of_pools_are_mebibytes_without_a_unit() -> None:
    read = parse(["--onnx=m", "--memPoolSize=workspace:2,dlaSRAM:0.5M,dlaLocalDRAM:1g,tacticSharedMem:512K"], "11")
    assert read["memPoolSize"] == {"workspace": 2, "dlaSRAM": 0.5, "dlaLocalDRAM": 1024, "tacticSharedMem": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int8"},
        {"onnx": ""},
        {"engine": ""},
        {"onnx": "~/m.onnx"},
        {"engine": "e\n"},
        {"engine": "m"},
        {"timing_cache": "e"},
        {"workspace_mb": 0},
        {"level": 6},
        {"profiles": {"a,b": ((1,), (1,), (1,))}},
        {"profiles": {"": ((1,), (1,), (1,))}},
        {"profiles": {"x*": ((1,), (1,), (1,))}},
        {"profiles": {"x": ((1,), (1,), (1, 2))}},
        {"profiles": {"x": ((2,), (1,), (3,))}},
        {"profiles": {"x": ((-1,), (1,), (3,))}},
        {"profiles": {"x": ((1,), (1,), (2**31,))}},
    ],
)
def test_builds_that_trtexec_could_not_be_told(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(Build("m", "e"), **change)


# A trtexec that prints the banner of a version, checks its arguments by that version's rules, keeps them in a file, and
# then builds, fails after half of its work, or takes the script down with it.
_FAKE = """
import importlib.util, json, os, signal, sys
sys.path.insert(0, {root!r})
from edgeattn.core.errors import UsageError
# By its file: the package around it imports far more.
spec = importlib.util.spec_from_file_location("rules", {rules!r})
rules = sys.modules["rules"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)
words = sys.argv[1:]
try:
    read = rules.parse(words, {tool!r})
except UsageError as error:
    print(f"[E] {{error}}")
    sys.exit(1)
with open({record!r}, "a") as file:
    file.write(json.dumps(words) + "\\n")
if {mode!r} != "nothing":
    with open(read["saveEngine"], "w") as file:
        file.write("engine of " + open(read["onnx"]).read())
if {mode!r} == "fail":
    sys.exit(1)
if {mode!r} == "kill":
    os.kill(os.getppid(), signal.SIGKILL)
if {mode!r} == "interrupt":
    os.kill(os.getppid(), signal.SIGTERM)
"""


class Machine:
    """A bundle and a trtexec, in folders whose names need quoting."""

    def __init__(self, folder: Path, builds: dict[str, Build]) -> None:
        self.bundle = folder / "my 'new' bundle"
        self.tools = folder / "tools of $HOME"
        self.record = folder / "record"
        self.bundle.mkdir()
        self.tools.mkdir()
        for build in builds.values():
            (self.bundle / build.onnx).write_text(build.onnx)
        (self.bundle / "build.sh").write_text(script(builds))

    def install(self, version: str, tool: str = "10", mode: str = "build", name: str = "trtexec") -> Path:
        code = self.tools / f"{name}.py"
        rules = {"root": str(ROOT), "rules": trtexec.__file__, "tool": tool}
        code.write_text(_FAKE.format(**rules, record=str(self.record), mode=mode))
        program = self.tools / name
        # exec: the parent of the fake is the script.
        program.write_text(
            f"""#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT {version}] [b48] # $0 $*"
[ "$1" != --help ] || exit 0
exec "{sys.executable}" -S "$(dirname "$0")/{name}.py" "$@"
"""
        )
        program.chmod(0o755)
        return program

    def run(self, shell: str = "sh", **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.tools}:/usr/bin:/bin"
        return subprocess.run(
            [shell, str(self.bundle / "build.sh")],
            env={"PATH": path, **environment},
            cwd=self.bundle.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def lines(self) -> list[list[str]]:
        return [json.loads(text) for text in self.record.read_text().splitlines()] if self.record.exists() else []

    def files(self) -> set[str]:
        return {path.name for path in self.bundle.iterdir()}


BUILDS = {
    "predict": Build("the model.onnx", "it's; $HOME.engine", "fp32", {"x:0": ((1, 3), (2, 3), (4, 3))}, level=1),
    "decode step": Build("-decode.onnx", "-decode.engine", "fp8", workspace_mb=512, strip=True, timing_cache="t c"),
}
LEFT = {"build.sh", "the model.onnx", "-decode.onnx"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, BUILDS)


def _unfinished(build: Build, tool: str) -> list[str]:
    return line(replace(build, engine=build.engine + PART), tool)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_posix_sh(shell: str, machine: Machine) -> None:
    subprocess.run([shell, "-n", str(machine.bundle / "build.sh")], check=True)
    # No words that only bash knows.
    text = (machine.bundle / "build.sh").read_text()
    assert not any(word in text for word in ("[[", "local ", "function ", "pipefail", "$'"))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("version", "tool"), [("v101602", "10"), ("v100001", "10"), ("v110300", "11"), ("v11.1.0.106", "11")]
)
def test_each_version_gets_its_own_line(shell: str, version: str, tool: str, machine: Machine) -> None:
    machine.install(version, tool)
    done = machine.run(shell)
    assert done.returncode == 0, done.stderr
    assert [sorted(words) for words in machine.lines()] == [
        sorted(_unfinished(build, tool)) for build in BUILDS.values()
    ]
    assert machine.files() == LEFT | {build.engine for build in BUILDS.values()}
    for entry, build in BUILDS.items():
        made = machine.bundle / build.engine
        assert made.read_text() == f"engine of {build.onnx}"
        assert f"{entry}: {build.engine}, {made.stat().st_size} bytes" in done.stdout


def test_the_workspace_can_be_limited_where_it_runs(machine: Machine) -> None:
    machine.install("v101602")
    assert machine.run(WORKSPACE_MB="64").returncode == 0
    assert all("--memPoolSize=workspace:64" in words for words in machine.lines())


@pytest.mark.parametrize("value", ["0", "1G", "-1", "1 2"])
def test_a_wrong_workspace_is_said(value: str, machine: Machine) -> None:
    machine.install("v101602")
    done = machine.run(WORKSPACE_MB=value)
    assert done.returncode == 2
    assert f"it is '{value}'" in done.stderr
    assert not machine.lines()


@pytest.mark.parametrize("version", ["v8601", "v8503", "v120000", "v7103", "v100"])
def test_other_versions_are_refused(version: str, machine: Machine) -> None:
    machine.install(version)
    done = machine.run()
    assert done.returncode == 3
    assert f"TensorRT {version}; this script knows 10.x" in done.stderr
    assert "JetPack 6.1" in done.stderr
    assert not machine.lines()
    assert machine.files() == LEFT


def test_a_trtexec_that_does_not_start(machine: Machine) -> None:
    program = machine.tools / "trtexec"
    program.write_text("#!/bin/sh\necho 'libnvinfer.so.10: cannot open shared object file' >&2\nexit 127\n")
    program.chmod(0o755)
    done = machine.run()
    assert done.returncode == 3
    assert "libnvinfer.so.10" in done.stderr
    assert "LD_LIBRARY_PATH" in done.stderr


@pytest.mark.skipif(
    any(os.path.exists(f"/{folder}/bin/trtexec") for folder in ("usr/src/tensorrt", "opt/tensorrt", "usr")),
    reason="a trtexec is installed here",
)
def test_no_trtexec_at_all(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 3
    assert "sudo apt install libnvinfer-bin" in done.stderr
    assert machine.files() == LEFT


def test_trtexec_can_be_named(machine: Machine) -> None:
    machine.install("v8601")
    other = machine.install("v110300", "11", name="other trtexec")
    relative = os.path.relpath(other, machine.bundle.parent)
    for value in (str(other), relative, "other trtexec"):
        assert machine.run(TRTEXEC=value).returncode == 0
    assert len(machine.lines()) == 3 * len(BUILDS)


def test_a_named_trtexec_that_is_none(machine: Machine) -> None:
    machine.install("v101602")
    done = machine.run(TRTEXEC="/nowhere/trtexec")
    assert done.returncode == 3
    assert "/nowhere/trtexec" in done.stderr


@pytest.mark.parametrize("mode", ["fail", "nothing"])
def test_a_failed_build_leaves_nothing(mode: str, machine: Machine) -> None:
    machine.install("v101602", mode=mode)
    # An engine of an earlier run must not pass for this one's.
    (machine.bundle / BUILDS["predict"].engine).write_text("old")
    done = machine.run()
    assert done.returncode == 4
    assert machine.files() == LEFT
    assert "WORKSPACE_MB=" in done.stderr
    assert "swap" in done.stderr


def test_a_script_that_is_terminated_cleans_up(machine: Machine) -> None:
    machine.install("v101602", mode="interrupt")
    assert machine.run().returncode == 143
    assert machine.files() == LEFT


def test_a_script_that_is_killed_leaves_no_finished_name(machine: Machine) -> None:
    machine.install("v101602", mode="kill")
    assert machine.run().returncode == -9
    assert machine.files() - LEFT <= {build.engine + PART for build in BUILDS.values()}
    machine.install("v101602")
    assert machine.run().returncode == 0
    assert machine.files() == LEFT | {build.engine for build in BUILDS.values()}


def test_a_model_that_is_missing(machine: Machine) -> None:
    machine.install("v101602")
    (machine.bundle / "the model.onnx").unlink()
    done = machine.run()
    assert done.returncode == 2
    assert "the model.onnx is missing" in done.stderr


@pytest.mark.parametrize(
    "builds",
    [
        {},
        {"a": Build("a.onnx", "e"), "b": Build("b.onnx", "./e")},
        {"a": Build("a.onnx", "e"), "b": Build("b.onnx", "a.onnx")},
        {"a": Build("a.onnx", "e"), "b": Build("b.onnx", "e" + PART)},
        {"a": Build("a.onnx", "t"), "b": Build("b.onnx", "e", timing_cache="t")},
        {"a\nb": Build("a.onnx", "e")},
    ],
)
def test_builds_that_stand_in_each_other_s_way(builds: dict[str, Build]) -> None:
    with pytest.raises(UsageError):
        script(builds)
