"""The exact line of trtexec for an engine, by the rules of each TensorRT version, and the ``build.sh`` that runs it.

For a machine without our Python. Each version has its own table of flags; ``parse`` reads a line back by that table,
and so proves each line that is made.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from edgeattn.core.errors import UsageError, closest, unknown

Shape = tuple[int, ...]

#: The tools by our name for them, with their own.
TOOLS = {"10": "trtexec of TensorRT 10", "11": "trtexec of TensorRT 11", "rtx": "tensorrt_rtx of TensorRT-RTX 1"}

PRECISIONS = ("fp32", "fp16", "w8a8", "w8", "w4", "fp8")

#: trtexec reads each dimension with std::stoi (stringToValue in sampleOptions.cpp of 10 and 11).
LARGEST_INT = 2**31 - 1
#: "integers from 0 to the maximum optimization level, which is currently 5" (help of 10 and 11).
LARGEST_LEVEL = 5


class Form(Enum):
    """What stands after ``=``."""

    NONE = "no argument"
    PATH = "a file name"
    INT = "a whole number"
    TEXT = "a word"
    SHAPES = "name:1x3x224x224[,name:...]"
    POOLS = "pool:size[,pool:size]"


# Where each version's flags are written down. Nothing here was run: no machine of ours has these tools.
#: A copy of NVIDIA's parser of 10 (samples/common/sampleOptions.cpp) and the printed help of a 10.x, which agree; the
#: minor version of neither is known.
SOURCE_10 = "sampleOptions.cpp and --help of 10.x"
#: The same file in NVIDIA/TensorRT at d5883286 (of 11: no precision flags, strong typing by default; which 11.x is not
#: known), and deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html of the documentation.
SOURCE_11 = "sampleOptions.cpp at d5883286 and the migration page of 11.4.1"
#: deeplearning/tensorrt-rtx/latest/performance/optimization.html: a build line with profiles.
SOURCE_RTX = "documentation of TensorRT-RTX, performance/optimization"
#: deeplearning/tensorrt-rtx/latest/inference-library/weight-streaming.html.
SOURCE_RTX_STREAMING = "documentation of TensorRT-RTX, inference-library/weight-streaming"
#: deeplearning/tensorrt-rtx/latest/architecture/how-trt-rtx-works.html names both flags.
SOURCE_RTX_STRIP = "documentation of TensorRT-RTX, architecture/how-trt-rtx-works"
#: No page on the executable's TF32 flag was found. The builder has the flag kTF32, on by default, so that without
#: --noTF32 the numbers could be TF32 in silence; a tool that lacks the flag stops and says so, which is better.
INFERRED_RTX = "inferred: the builder's kTF32 is documented, the executable's flag is not"


@dataclass(frozen=True)
class Flag:
    """A flag of these tools.

    Args:
        sources: by tool, where it is written down; a tool that is missing does not have it (or nobody says so).
        why_not: why a tool is missing.
    """

    form: Form
    sources: Mapping[str, str]
    why_not: str = ""


_BOTH = {"10": SOURCE_10, "11": SOURCE_11}
_ALL = {**_BOTH, "rtx": SOURCE_RTX}
_ONLY_10 = {"10": SOURCE_10}
# Of --memPoolSize and --builderOptimizationLevel nothing was found for tensorrt_rtx: not used there.
_SILENT_RTX = "the documentation of TensorRT-RTX does not name it"
_WEAK = "TensorRT 11 and TensorRT-RTX are strongly typed only: the precision stands in the ONNX file"

FLAGS: dict[str, Flag] = {
    "--onnx": Flag(Form.PATH, _ALL),
    "--saveEngine": Flag(Form.PATH, _ALL),
    "--skipInference": Flag(Form.NONE, _ALL),
    "--minShapes": Flag(Form.SHAPES, _ALL),
    "--optShapes": Flag(Form.SHAPES, _ALL),
    "--maxShapes": Flag(Form.SHAPES, _ALL),
    # Off by default in 10. In 11 "[Deprecated] Strongly typed network is now enabled by default. This flag is a
    # no-op": still accepted there, and never written by us. TensorRT-RTX networks are always strongly typed.
    "--stronglyTyped": Flag(Form.NONE, _BOTH, "TensorRT-RTX is always strongly typed"),
    "--noTF32": Flag(Form.NONE, {**_BOTH, "rtx": INFERRED_RTX}),
    # Suffixes B, K, M and G are base 2; without one the number is MiB. We write none: valid in every 10.x.
    "--memPoolSize": Flag(Form.POOLS, _BOTH, _SILENT_RTX),
    # RTX: "using a timing cache forces the AOT step to query your system for a GPU" and has no effect on the engine
    # (release notes 1.3).
    "--timingCacheFile": Flag(Form.PATH, _BOTH, "a timing cache has no effect on an engine of TensorRT-RTX"),
    "--builderOptimizationLevel": Flag(Form.INT, _BOTH, _SILENT_RTX),
    "--allowWeightStreaming": Flag(Form.NONE, {**_BOTH, "rtx": SOURCE_RTX_STREAMING}),
    "--stripWeights": Flag(Form.NONE, {**_BOTH, "rtx": SOURCE_RTX_STRIP}),
    "--stripAllWeights": Flag(Form.NONE, {**_BOTH, "rtx": SOURCE_RTX_STRIP}),
    "--refit": Flag(Form.NONE, _BOTH, _SILENT_RTX),
    # What 11 dropped (absent from its parser; the migration page names the precisions, --best and --calib).
    **{f"--{name}": Flag(Form.NONE, _ONLY_10, _WEAK) for name in ("fp16", "bf16", "int8", "fp8", "int4", "best")},
    "--calib": Flag(Form.PATH, _ONLY_10, _WEAK),
    "--precisionConstraints": Flag(Form.TEXT, _ONLY_10, _WEAK),
    "--layerPrecisions": Flag(Form.TEXT, _ONLY_10, _WEAK),
    "--layerOutputTypes": Flag(Form.TEXT, _ONLY_10, _WEAK),
    **{f"--{end}ShapesCalib": Flag(Form.SHAPES, _ONLY_10, _WEAK) for end in ("min", "opt", "max")},
    "--weightless": Flag(Form.NONE, _ONLY_10, "TensorRT 11 has --stripWeights for it"),
    "--restricted": Flag(Form.NONE, _ONLY_10, "TensorRT 11's parser does not have it"),
}

#: Flags that trtexec had in 10 and has no more in 11.
DROPPED_BY_11 = tuple(name for name, flag in FLAGS.items() if set(flag.sources) == {"10"})

_POOLS = ("workspace", "dlaSRAM", "dlaLocalDRAM", "dlaGlobalDRAM", "tacticSharedMem")
_UNITS = {"B": 2.0**-20, "K": 2.0**-10, "M": 1.0, "G": 2.0**10}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([BKMGbkmg]?)")


@dataclass(frozen=True)
class Build:
    """One engine.

    Args:
        onnx: file name of the model, whose graph holds the precision.
        engine: file name of the engine to write.
        profiles: by input, the smallest, usual and largest shape; empty where all shapes are fixed.
        workspace_mb: limit of the builder's workspace in MiB; None leaves it to TensorRT.
        weight_streaming: whether weights may stay in host memory.
        strip: leave the weights out of the engine: it is refitted with the same weights on the device.
        timing_cache: file name, or "" for none.
        level: builder optimization level, or None for TensorRT's own.

    Raises:
        UsageError: where trtexec could not be told, or would take it for something else.
    """

    onnx: str
    engine: str
    precision: str = "fp32"
    profiles: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    workspace_mb: int | None = None
    weight_streaming: bool = False
    strip: bool = False
    timing_cache: str = ""
    level: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS, where=self.engine)
        for what, path in (("ONNX file", self.onnx), ("engine", self.engine)):
            if not path:
                raise UsageError(f"an engine needs the name of its {what}", where=self.engine or self.onnx)
        for path in (self.onnx, self.engine, self.timing_cache):
            _check_path(path)
        if len({self.onnx, self.engine, self.timing_cache}) != 3:
            raise UsageError("one file name stands for two files of a build", value=self.engine)
        for name, shapes in self.profiles.items():
            _check_profile(name, shapes)
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= LARGEST_INT:
            raise UsageError("a workspace needs at least 1 MiB", value=self.workspace_mb, where=self.engine)
        if self.level is not None and not 0 <= self.level <= LARGEST_LEVEL:
            raise UsageError(f"optimization levels are 0 to {LARGEST_LEVEL}", value=self.level, where=self.engine)


def line(build: Build, tool: str) -> list[str]:
    """The arguments (without the program) that build an engine.

    Raises:
        UsageError: where the build needs a flag that the tool does not have.
    """
    words = [_word(tool, "--onnx", build.onnx), _word(tool, "--saveEngine", build.engine)]
    words.append(_word(tool, "--skipInference"))
    if tool == "10":
        # Without it TensorRT 10 takes the graph's types as hints, and a Q/DQ graph needs --int8 or --fp8 too.
        words.append(_word(tool, "--stronglyTyped"))
    if build.precision == "fp32":
        # TF32, the default from Ampere on, keeps 10 bits of the mantissa: far from 1e-5.
        words.append(_word(tool, "--noTF32"))
    if build.profiles:
        for index, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            words.append(_word(tool, flag, _shapes({name: ends[index] for name, ends in build.profiles.items()})))
    if build.workspace_mb is not None:
        words.append(_word(tool, "--memPoolSize", f"workspace:{build.workspace_mb}"))
    if build.timing_cache:
        words.append(_word(tool, "--timingCacheFile", build.timing_cache))
    if build.level is not None:
        words.append(_word(tool, "--builderOptimizationLevel", str(build.level)))
    if build.weight_streaming:
        words.append(_word(tool, "--allowWeightStreaming"))
    if build.strip:
        # --stripWeights alone means "refit with identical weights": 11.3 documents wrong numbers with a full refit and
        # none with this one. TensorRT-RTX documents its weightless engines with a full refit: --stripAllWeights.
        words.append(_word(tool, "--stripAllWeights" if tool == "rtx" else "--stripWeights"))
    return words


def parse(words: Sequence[str], tool: str) -> dict[str, Any]:
    """Read arguments by the rules of one tool.

    Stricter than trtexec where it would look away: it drops an argument of a flag that takes none, and what follows
    the digits of a number.

    Returns:
        By flag, without the dashes: True, a text, a number, shapes by input, or MiB by pool.

    Raises:
        UsageError: a flag that the tool does not have or got twice, or an argument that is missing, unwanted or wrong.
    """
    found: dict[str, Any] = {}
    for word in words:
        # trtexec splits at the first "=" (argsToArgumentsMap).
        name, equals, text = word.partition("=")
        flag = _flag(name, tool)
        if name[2:] in found:
            # What trtexec has not consumed in the end is an "Unknown option" to it: so is a second copy.
            raise UsageError(f"{name} stands twice", where=TOOLS[tool])
        if flag.form is Form.NONE:
            if equals:
                raise UsageError(f"{name} takes no argument", value=word, where=TOOLS[tool])
            found[name[2:]] = True
            continue
        if not text:
            raise UsageError(f"{name} needs {flag.form.value} after '='", value=word, where=TOOLS[tool])
        found[name[2:]] = _READERS[flag.form](text, name)
    _check_together(found, tool)
    return found


def script(builds: Mapping[str, Build]) -> str:
    """The text of ``build.sh``: POSIX sh that builds the engine of each entry with the trtexec that it finds.

    It ends with 0, 2 (a file of the bundle is missing, or WORKSPACE_MB is no number), 3 (no trtexec, or of a version
    that it does not know) or 4 (a build failed).

    Raises:
        UsageError: no entry, or a file that one entry writes and another reads or writes too.
    """
    if not builds:
        raise UsageError("build.sh needs an engine to build")
    # The script removes an engine before it builds it: that must not be another entry's model. A timing cache may serve
    # several.
    engines = [name for build in builds.values() for name in (build.engine, build.engine + PART)]
    others = {name for build in builds.values() for name in (build.onnx, build.timing_cache)}
    written = [posixpath.normpath(name) for name in engines]
    if len(set(written)) != len(written) or set(written) & {posixpath.normpath(name) for name in others}:
        raise UsageError("build.sh needs an engine of its own for each entry", value=", ".join(engines[::2]))
    for entry in builds:
        _check_path(entry)
    cases = []
    for tool in ("10", "11"):
        calls = "\n".join(_call(entry, build, tool) for entry, build in builds.items())
        cases.append(f"{tool})\n{calls}\n    ;;")
    return _SCRIPT.replace("@PART@", PART).replace("@CASES@", "\n".join(cases))


def _call(entry: str, build: Build, tool: str) -> str:
    """The call that builds one engine: under a name that does not look finished, with the workspace left open."""
    words = line(replace(build, engine=build.engine + PART), tool)
    parse(words, tool)
    prefix = "--memPoolSize="
    quoted = [shlex.quote(word) for word in words if not word.startswith(prefix)]
    if build.workspace_mb is not None:
        quoted.append(f'{prefix}workspace:"${{WORKSPACE_MB:-{build.workspace_mb}}}"')
    else:
        quoted.append(f'${{WORKSPACE_MB:+"{prefix}workspace:$WORKSPACE_MB"}}')
    names = " ".join(shlex.quote(name) for name in (entry, build.onnx, build.engine))
    return " \\\n".join([f"    build {names}", *(f"        {word}" for word in quoted)])


#: End of an engine's name while trtexec writes it.
PART = ".part"

# The banner is the first thing that trtexec prints, also with --help: trtexec.cpp (reportTestStart before parseHelp)
# and logs of others, as "&&&& RUNNING TensorRT.trtexec [TensorRT v101602] [b10] # trtexec --help", v110100, v110300.
# Its number is major * 10000 + minor * 100 + patch from 10 on, and was major * 1000 before: v8601 is 8.6.1.
# JetPack 6.1 is the first with TensorRT 10 (10.3); none has 11 yet (documentation of 11.4.0). pip's wheels have no
# trtexec (installing.html of 11.4.0).
# The trap takes the unfinished engine away after Ctrl-C; after SIGKILL it stays, under a name that nothing reads.
_SCRIPT = r"""#!/bin/sh
# Builds the TensorRT engines of this bundle on the machine that will run them. Needs trtexec, and no Python.
#   TRTEXEC=/path/to/trtexec  which one to use
#   WORKSPACE_MB=512          limit of the builder's workspace in MiB
# Ends with 0: built; 2: the bundle or WORKSPACE_MB is wrong; 3: no trtexec of a known version; 4: a build failed.
set -eu

say() {
    printf '%s\n' "$@" >&2
}

case ${WORKSPACE_MB:-1} in
0* | *[!0-9]*)
    say "WORKSPACE_MB must be a number of MiB, 1 or more; it is '$WORKSPACE_MB'"
    exit 2
    ;;
esac

# Before cd, so that a relative TRTEXEC means what it meant where it was typed.
trtexec=
for candidate in ${TRTEXEC:+"$TRTEXEC"} trtexec /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
    if trtexec=$(command -v "$candidate") && [ -x "$trtexec" ]; then
        break
    fi
    trtexec=
    if [ -n "${TRTEXEC:-}" ]; then
        say "TRTEXEC is '$TRTEXEC', which is no program"
        exit 3
    fi
done
if [ -z "$trtexec" ]; then
    say "no trtexec found: not on PATH, nor in /usr/src/tensorrt/bin or /opt/tensorrt/bin" \
        "  Jetson (JetPack 6.1 or newer): sudo apt install libnvinfer-bin" \
        "  server: libnvinfer-bin from NVIDIA's apt repository, or the tar file of TensorRT 10 or 11;" \
        "          pip's tensorrt has no trtexec" \
        "  elsewhere on this machine: TRTEXEC=/path/to/trtexec sh $0"
    exit 3
fi
case $trtexec in
/*) ;;
*) trtexec=$PWD/$trtexec ;;
esac

CDPATH='' cd -- "$(dirname -- "$0")"

banner=$("$trtexec" --help 2>&1) || :
version=$(printf '%s\n' "$banner" | sed -n 's/^.*\[TensorRT v\{0,1\}\([0-9][0-9.]*\)\].*$/\1/p' | sed 1q)
case $version in
10[0-9][0-9][0-9][0-9] | 10.*) major=10 ;;
11[0-9][0-9][0-9][0-9] | 11.*) major=11 ;;
'')
    say "$trtexec did not say its version; it said:" "$(printf '%s\n' "$banner" | sed 3q)" \
        "  a library that is missing: add the lib folder of TensorRT to LD_LIBRARY_PATH"
    exit 3
    ;;
*)
    say "$trtexec is of TensorRT v$version; this script knows 10.x (v10....) and 11.x (v11....)" \
        "  Jetson: JetPack 6.1 or newer brings TensorRT 10" \
        "  another trtexec on this machine: TRTEXEC=/path/to/trtexec sh $0" \
        "  a newer TensorRT: make the bundle again with a newer EdgeAttn"
    exit 3
    ;;
esac

part=
trap '[ -z "$part" ] || rm -f -- "$part"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# build ENTRY ONNX ENGINE ARGUMENT...
build() {
    entry=$1 onnx=$2 engine=$3
    shift 3
    if [ ! -f "$onnx" ]; then
        say "$entry: $onnx is missing from the bundle"
        exit 2
    fi
    part=$engine@PART@
    # Also the engine of an earlier run: TensorRT may have changed since, and a failure must not pass for a success.
    rm -f -- "$part" "$engine"
    say "$entry: building $engine with TensorRT v$version; this can take many minutes"
    status=0
    "$trtexec" "$@" || status=$?
    if [ "$status" -ne 0 ] || [ ! -s "$part" ]; then
        say "$entry: trtexec did not build $engine (exit status $status)" \
            "  look at the last lines marked [E] above" \
            "  memory (status 137, 'out of memory', 'Killed'):" \
            "    less workspace: WORKSPACE_MB=512 sh $0" \
            "    Jetson: close other programs, its GPU and CPU share one memory; then add swap, which helps the CPU" \
            "    part: sudo fallocate -l 8G /swapfile; sudo chmod 600 /swapfile; sudo mkswap /swapfile;" \
            "    sudo swapon /swapfile" \
            "  'could not find any implementation': more workspace, as WORKSPACE_MB=4096 sh $0"
        exit 4
    fi
    mv -f -- "$part" "$engine"
    part=
    printf '%s: %s, %s bytes\n' "$entry" "$engine" "$(wc -c <"$engine" | tr -d ' ')"
}

case $major in
@CASES@
esac
"""


def _flag(name: str, tool: str) -> Flag:
    """The flag of this name, if the tool has it."""
    if tool not in TOOLS:
        raise unknown("TensorRT tool", tool, TOOLS)
    flag = FLAGS.get(name)
    if flag is not None and tool in flag.sources:
        return flag
    near = closest(name, [known for known, other in FLAGS.items() if tool in other.sources])
    raise UsageError(
        f"{TOOLS[tool]} has no flag {name}",
        why=flag.why_not if flag else None,
        fix="leave it out" if flag else f"did you mean {near}?" if near else None,
    )


def _word(tool: str, name: str, text: str | None = None) -> str:
    _flag(name, tool)
    return name if text is None else f"{name}={text}"


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())


def _check_path(path: str) -> None:
    """trtexec expands "~" at the start of a model's name; no name in a bundle has control characters."""
    if path.startswith("~") or any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        raise UsageError("this file name cannot be given to trtexec", value=repr(path), fix="rename the file")


def _check_profile(name: str, shapes: tuple[Shape, Shape, Shape]) -> None:
    where = f"input {name!r}"
    # "," parts inputs, "'" quotes them and "*" stands for any text (splitNameAndValue; help of 10.x).
    if not name or any(letter in ",'*" or ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise UsageError(
            "trtexec cannot be told a shape for this input",
            value=repr(name),
            why="its name is empty or holds a comma, a quote, a star or a control character",
            fix="export the model with another name for this input",
        )
    if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
        raise UsageError("a profile is three shapes of one rank", value=shapes, where=where)
    for sizes in zip(*shapes, strict=True):
        if list(sizes) != sorted(sizes) or not 0 <= sizes[0] <= sizes[2] <= LARGEST_INT:
            raise UsageError("a profile needs 0 <= smallest <= usual <= largest", value=shapes, where=where)


def _check_together(found: Mapping[str, Any], tool: str) -> None:
    """The rules that hold between flags: AllOptions::parse, processShapes and BuildOptions::parse."""
    if "onnx" not in found:
        raise UsageError("the line names no model", fix="add --onnx=FILE", where=TOOLS[tool])
    if "best" in found and "stronglyTyped" in found:
        raise UsageError("--best and --stronglyTyped cannot both be set", where=TOOLS[tool])
    ends = [found.get(f"{end}Shapes") for end in ("min", "opt", "max")]
    given = [end for end in ends if end is not None]
    if (given and ends[1] is None) or len(given) == 2:
        raise UsageError("give --optShapes alone, or with both --minShapes and --maxShapes", where=TOOLS[tool])
    if any(set(end) != set(given[0]) for end in given):
        # trtexec goes on with an empty shape here, and TensorRT fails later.
        raise UsageError("--minShapes, --optShapes and --maxShapes name different inputs", where=TOOLS[tool])


def _read_int(text: str, name: str) -> int:
    if not re.fullmatch("[0-9]+", text) or int(text) > LARGEST_INT:
        raise UsageError(f"{name} needs {Form.INT.value}", value=text)
    if name == "--builderOptimizationLevel" and int(text) > LARGEST_LEVEL:
        raise UsageError(f"optimization levels are 0 to {LARGEST_LEVEL}", value=text)
    return int(text)


def _read_shapes(text: str, name: str) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for item in text.split(","):
        # At the last ":": an input may be called "x:0".
        tensor, colon, sizes = item.rpartition(":")
        if not colon or not tensor or tensor in shapes or not re.fullmatch("scalar|[0-9]+(x[0-9]+)*", sizes):
            raise UsageError(f"{name} needs {Form.SHAPES.value}", value=item)
        shapes[tensor] = () if sizes == "scalar" else tuple(_read_int(size, name) for size in sizes.split("x"))
    return shapes


def _read_pools(text: str, name: str) -> dict[str, float]:
    pools: dict[str, float] = {}
    for item in text.split(","):
        pool, _, size = item.rpartition(":")
        if pool not in _POOLS:
            raise unknown("memory pool", pool or item, _POOLS, where=name)
        match = _SIZE.fullmatch(size)
        if not match or pool in pools:
            raise UsageError(f"{name} needs {Form.POOLS.value}", value=item)
        pools[pool] = float(match[1]) * _UNITS[match[2].upper() or "M"]
    return pools


def _read_text(text: str, name: str) -> str:
    return text


_READERS: dict[Form, Callable[[str, str], Any]] = {
    Form.PATH: _read_text,
    Form.TEXT: _read_text,
    Form.INT: _read_int,
    Form.SHAPES: _read_shapes,
    Form.POOLS: _read_pools,
}
