"""The runner's part that measures: a warm-up until times are stable, then timed runs, alone or in blocks on demand.

Standard library, NumPy and the runtime; Python 3.9 and newer. Beside run.py in a bundle as run_profile.py.

With ``--paced`` the process says when it is warm, and measures a block for every line that it reads: EdgeAttn lets the
blocks of several bundles take turns in that way. A line is JSON: ``{"seconds": s, "least": n}`` is a block,
``{"state": true}`` asks for the machine's, ``{"count": n}`` for the instructions of each of n runs, where ``uncounted``
is "" among what it says when it is warm; the end of the input asks for the result.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from edgeattn.bundle import runner as run
else:
    import run  # run.py, beside this file

Data = run.Data

#: Writes a line of an answer while blocks are asked for; None where nobody asks.
_SAY: list[Callable[[Data], None]] = []

#: Of ``open_counter``, where blocks are asked for.
_COUNTER: list[tuple[int, str]] = []

#: A warm-up has windows of at least so long and so many runs; it is over when two in a row agree, or at the limits.
WINDOW_S, WINDOW_RUNS = 0.05, 5
STEADY, WARM_S, WARM_RUNS = 0.03, 10.0, 5000


def profile(manifest: Data, part: Data, options: argparse.Namespace, threads: int, answers: Any) -> Data:
    """Time the entry on a golden input, which must come out right."""
    if options.paced:
        _SAY.append(lambda data: (answers.write(json.dumps(data) + "\n"), answers.flush())[0])
    if part["backend"] in run.PARTS:
        found: Data = run.own(part["backend"]).profile(manifest, part, options)
        return found
    if options.paced:  # before the runtime is there: the threads that it starts count as well
        _COUNTER.append(open_counter())
    run.check_first_use(manifest, part, threads)
    state = run.own("state").machine_state
    before = state()
    feeds = feeds_of(manifest, part, options)
    start = time.perf_counter()
    execute, runtime = run.open_entry(part, options.entry, threads)
    load_ms = (time.perf_counter() - start) * 1e3
    about = {
        "backend": part["backend"],
        "runtime": runtime,
        "threads": threads,
        "batch": options.batch or 1,
        "unit": "ms",
        "timed": timed_words(options.entry),
        "load_ms": load_ms,
        "before": before,
    }
    measured = timings(execute, feeds, options.runs, options.warmup, about=about)
    operations = each_operation(part, options, threads, feeds) if options.ops is not None else {}
    return {**about, **measured, **operations, "after": state(), "holds": True}


def timed_words(entry: str) -> str:
    """What a timed run includes."""
    return f"one run of {entry}, from inputs in host memory to outputs in host memory; loading and warm-up apart"


def feeds_of(manifest: Data, part: Data, options: argparse.Namespace) -> Data:
    """Inputs of a golden sample, as many of it as ``--batch`` asks for.

    Of a decoder's samples the last one has the most in its cache.
    """
    import numpy as np

    entry, batch = options.entry, options.batch
    sample = run.golden_samples(manifest, entry)[-1 if "decoder" in manifest else 0][0]
    feeds = run.fitted(part, entry, run.golden_data(sample)[0])
    if batch is None:
        return feeds
    for spec in part["entries"][entry]["inputs"]:
        value, shape = feeds[spec["name"]], spec["shape"]
        ends = next((ends for axis, *ends in spec.get("dynamic", []) if axis == 0), None)
        step = ends[3] if ends and len(ends) > 3 else 1
        fits = batch in range(ends[0], ends[2] + 1, step) if ends else bool(shape) and shape[0] == batch
        if not fits:
            takes = f"{ends[0]} to {ends[2]}" if ends else f"{shape[0] if shape else 'no batch'} alone"
            raise run.Problem(
                2,
                f"input {spec['name']} takes no batch of {batch}: it takes {takes}",
                f"export one for it, with --input {spec['name']}={'x'.join(map(str, (batch, *shape[1:])))}; "
                f"for target tensorrt a batch may vary: 1..{batch}",
            )
        feeds[spec["name"]] = np.concatenate([value] * batch)[:batch]
    return feeds


def timings(
    execute: run.Run, feeds: Data, runs: int | None, warmup: int | None, least: int = 5, about: Data | None = None
) -> Data:
    """Latencies in ms: the first, and others after a warm-up; and the memory that this process came to take.

    Args:
        about: what a paced process says of itself when it is ready.
    """

    def timed() -> float:
        begun = time.perf_counter()
        execute(feeds)
        return (time.perf_counter() - begun) * 1e3

    first_ms = timed()
    warm, steady = warmed(timed, warmup)
    ready = {"first_ms": first_ms, "warmup": warm, "warm": steady, "clock_ms": clock_ms()}
    times: list[float] = []
    begun = time.perf_counter()
    if _SAY:
        place = {"python": sys.version.split()[0], "machine": platform.machine(), **run.own("state").about()}
        place.update({"uncounted": _COUNTER[0][1]} if _COUNTER else {})
        times = _on_demand(timed, {**(about or {}), **ready, "warm_ms": timed(), **place})
    else:
        while not _enough(len(times), time.perf_counter() - begun, runs, least):
            times.append(timed())
    return {**ready, **(spread(times) if times else {}), "latencies": times, "peak_rss_mb": run.peak_rss_mb()}


def _on_demand(timed: Callable[[], float], ready: Data) -> list[float]:
    """Blocks of runs as they are asked for, until the input ends."""
    say, times = _SAY[0], []
    say({"ready": ready})
    for line in sys.stdin:
        asked = json.loads(line)
        if "state" in asked:
            say({"state": run.own("state").machine_state(gpu=ready.get("backend") == "tensorrt")})
            continue
        if "count" in asked:
            say({"counted": [counted(_COUNTER[0][0], timed) for _ in range(asked["count"])]})
            continue
        block: list[float] = []
        begun = time.perf_counter()
        while len(block) < asked["least"] or time.perf_counter() - begun < asked["seconds"]:
            block.append(timed())
        times += block
        say({"times": block})
    return times


#: Linux's number of perf_event_open(2) by machine, and the event of instructions: its type, and which of that.
COUNTER_CALL = {"x86_64": 298, "i686": 336, "aarch64": 241, "armv7l": 364, "armv6l": 364, "riscv64": 241}
INSTRUCTIONS = (0, 1)


def open_counter(event: tuple[int, int] = INSTRUCTIONS) -> tuple[int, str]:
    """A counter of what this process and the threads that it starts from now on do, outside of the kernel.

    Returns its file, -1 where there is none, and why there is none, "" where there is.
    """
    machine = platform.machine()
    if machine == "aarch64" and sys.maxsize < 2**32:
        machine = "armv7l"  # a 32-bit Python under a 64-bit kernel calls it by the number of the former
    if not sys.platform.startswith("linux") or machine not in COUNTER_CALL:
        return -1, f"no counter is known on {platform.system()}, {machine}"
    # struct perf_event_attr in its first version, 64 bytes: type, size, config, period, samples, what is read (1 + 2:
    # for how long it was wanted and was counting), flags (1 + 2 + 32 + 64: begin disabled, threads too, neither kernel
    # nor hypervisor).
    about = struct.pack("=IIQQQQQIIQ", event[0], 64, event[1], 0, 0, 1 + 2, 1 + 2 + 32 + 64, 0, 0, 0)
    system = ctypes.CDLL(None, use_errno=True)
    # Of this process on any core, in no group; closed where another program takes its place.
    numbers = [ctypes.c_long(number) for number in (0, -1, -1, 8)]
    file = system.syscall(ctypes.c_long(COUNTER_CALL[machine]), ctypes.create_string_buffer(about, 64), *numbers)
    if file >= 0:
        return file, ""
    why = {
        errno.ENOENT: "the processor shows no such counter, as in many virtual machines",
        errno.EACCES: "the system forbids it: see kernel.perf_event_paranoid",
        errno.EPERM: "the system forbids it, as in many containers",
    }
    return -1, why.get(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def counted(file: int, timed: Callable[[], float]) -> int | None:
    """What a counter counts of one run; None where it was not there all the time, as others wanted it."""
    import fcntl

    def read() -> tuple[int, ...]:
        return struct.unpack("=QQQ", os.read(file, 24))

    before = read()
    fcntl.ioctl(file, 0x2400, 0)  # PERF_EVENT_IOC_ENABLE
    timed()
    fcntl.ioctl(file, 0x2401, 0)  # PERF_EVENT_IOC_DISABLE
    count, wanted, ran = (after - was for after, was in zip(read(), before))  # noqa: B905 (Python 3.9)
    return count if ran >= wanted else None


def warmed(timed: Callable[[], float], warmup: int | None) -> tuple[int, bool]:
    """Run until two windows in a row have medians within 3 %, or as often as was asked for.

    Returns the number of runs, and whether they became stable within the limits (True where a number was asked for).
    """
    if warmup is not None:
        for _ in range(warmup):
            timed()
        return warmup, True
    count, medians = 0, []
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_S and count < WARM_RUNS:
        window: list[float] = []
        while len(window) < WINDOW_RUNS or sum(window) < WINDOW_S * 1e3:
            window.append(timed())
        count += len(window)
        medians.append(sorted(window)[len(window) // 2])
        if len(medians) > 1 and abs(medians[-1] - medians[-2]) <= STEADY * medians[-2]:
            return count, True
    return count, False


def clock_ms() -> float:
    """What timing an empty run takes: it is a part of every time."""
    times = []
    for _ in range(101):
        begun = time.perf_counter()
        _nothing({})
        times.append((time.perf_counter() - begun) * 1e3)
    return sorted(times)[50]


def _nothing(feeds: Data) -> None:
    """A run that does nothing."""


def spread(times: list[float]) -> Data:
    """How many they are, and how they are spread."""
    import numpy as np

    about = {"runs": len(times), "mean": float(np.mean(times)), "std": float(np.std(times)), "min": min(times)}
    return {**about, **{f"p{percent}": float(np.percentile(times, percent)) for percent in (50, 90, 95, 99)}}


def _enough(count: int, seconds: float, runs: int | None, least: int) -> bool:
    """As many as were asked for; else at least 30 and for 2 s, but 1000 at most, and 30 s once there are ``least``."""
    if runs is not None:
        return count >= runs
    return count >= 1000 or (count >= max(30, least) and seconds >= 2) or (count >= least and seconds >= 30)


def each_operation(part: Data, options: argparse.Namespace, threads: int, feeds: Data) -> Data:
    """The mean time of each operation in ms, as ``operations``: [name, kind, provider, ms].

    ONNX Runtime profiles itself, in a session of its own, which is slower for it. The wheel of LiteRT has no profiler:
    ``--ops FILE`` is a program with a signature for each operation, which EdgeAttn makes of the artifact.
    """
    if run.runtime_name(part) == "onnxruntime":
        return _onnx_operations(part, options.entry, threads, feeds)
    if part["backend"] == "tflite" and options.ops:
        return _tflite_operations(part, options.ops, threads)
    return {}


#: Seconds that operations are profiled for, and runs at least and at most.
OPS_S, OPS_LEAST, OPS_MOST = 1.0, 5, 500


def _onnx_operations(part: Data, entry: str, threads: int, feeds: Data) -> Data:
    import tempfile

    import onnxruntime

    names = [output["name"] for output in part["entries"][entry]["outputs"]]
    with tempfile.TemporaryDirectory() as folder:
        options = run.session_options(part, threads)
        options.enable_profiling, options.profile_file_prefix = True, os.path.join(folder, "ops")
        path = run.place(part["entries"][entry]["file"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        begun, runs = time.perf_counter(), 0
        while runs < OPS_LEAST or (time.perf_counter() - begun < OPS_S and runs < OPS_MOST):
            session.run(names, feeds)
            runs += 1
        with open(session.end_profiling(), encoding="utf-8") as handle:
            events = json.load(handle)
    found: dict[str, list[Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            about = event["args"]
            name = event["name"][: -len("_kernel_time")]
            row = found.setdefault(name, [name, about.get("op_name", ""), about.get("provider", ""), []])
            row[3].append(event["dur"] / 1e3)
    # Of an operation in a loop there are several a run; one in a branch need not be in each.
    rows = [[*row[:3], sorted(times)[len(times) // 2] * max(1, len(times) // runs)] for *row, times in found.values()]
    return {"operations": rows, "operations_by": f"ONNX Runtime's profiler, {runs} runs"}


def _tflite_operations(part: Data, file: str, threads: int) -> Data:
    import importlib

    import numpy as np

    module = importlib.import_module(f"{run.MODULES['tflite'][run.runtime_name(part)]}.interpreter")
    interpreter = module.Interpreter(model_path=os.path.join(run.HERE, file), num_threads=threads)
    signatures = interpreter.get_signature_list()
    rows, each_s = [], OPS_S / max(1, len(signatures))
    random = np.random.default_rng(0)
    for name in signatures:
        runner = interpreter.get_signature_runner(name)
        feeds = {}
        for key, spec in runner.get_input_details().items():
            kind = np.dtype(spec["dtype"])
            drawn = random.random(spec["shape"]) if kind.kind == "f" else np.zeros(spec["shape"])
            feeds[key] = drawn.astype(kind)
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < OPS_LEAST or (time.perf_counter() - begun < each_s and len(times) < OPS_MOST):
            start = time.perf_counter()
            runner(**feeds)
            times.append((time.perf_counter() - start) * 1e3)
        rows.append([name, "", "", sorted(times)[len(times) // 2]])
    # A call copies its inputs and outputs: what the cheapest operation takes is taken off all.
    call = min((ms for *_, ms in rows), default=0.0)
    words = f"each operation in a program of its own, less the {call * 1e3:.1f} us of the cheapest call"
    return {"operations": [[*row[:3], row[3] - call] for row in rows], "operations_by": words}
