"""The worker: a process of its own that runs stages, so that a crash or a full memory there is an error message here.

It reads one request a line from standard input and answers on a pipe of its own; what converters print goes to a log.
It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from edgeattn.core.errors import EdgeAttnError
from edgeattn.pipeline import child
from edgeattn.pipeline.context import Context, Result
from edgeattn.pipeline.job import Job


def _reset_peak() -> None:
    """Start the peak of resident memory anew, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def _peak_mb() -> float:
    """Peak of resident memory in MB since ``_reset_peak``, or since the start where that is not possible."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it for itself (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _error(error: BaseException) -> dict[str, Any]:
    """An error as plain data: our own with all its parts, others with their type."""
    log = traceback.format_exc()
    print(log, file=sys.stderr, flush=True)
    if isinstance(error, EdgeAttnError):
        return {"event": "error", "kind": type(error).__name__, "parts": child.parts(error), "traceback": log}
    return {"event": "error", "kind": None, "why": f"{type(error).__name__}: {error}"[:2000], "traceback": log}


def _import_torch() -> None:
    """While the parent still plans. Half of the cores: more threads than free cores slow small operations tenfold.

    Torch itself follows OMP_NUM_THREADS, which the user or an executor with several of these processes sets.

    The garbage collector is made lazier: torch and its exporters keep millions of objects that it would walk again and
    again, a fifth of their time.
    """
    gc.set_threshold(100_000, 50, 100)
    torch = importlib.import_module("torch")
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))


def main(answers: int) -> None:
    """Serve requests until standard input closes.

    Args:
        answers: file descriptor that answers are written to, one JSON object a line.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    child.end_with_parent()
    waiting = child.requests()
    answer = child.answering(answers)
    _import_torch()
    values: dict[str, Any] = {}
    while True:
        request = waiting.get()
        context = Context(
            Job.from_dict(request["job"]),
            Path(request["out"]),
            {name: Result(Path(r["folder"]), r["facts"]) for name, r in request["results"].items()},
            values,
            lambda text: answer({"event": "progress", "text": text}),
        )
        _give_back_memory()
        _reset_peak()
        start = time.perf_counter()
        try:
            facts = importlib.import_module(f"edgeattn.pipeline.stages.{request['stage']}").run(context)
        except MemoryError as error:
            answer({**_error(error), "why": "out of memory"})
        except (Exception, SystemExit) as error:
            answer(_error(error))
        else:
            answer(
                {
                    "event": "done",
                    "facts": facts,
                    "seconds": time.perf_counter() - start,
                    "peak_mb": round(_peak_mb(), 1),
                }
            )
