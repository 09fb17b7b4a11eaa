"""A process of our own that answers on a pipe: how it is started, what it hears, and how it ends with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from edgeattn.core.errors import EdgeAttnError

_START = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
sys.path.append({root!r})
from {module} import main
main({descriptor})
"""

#: Of prctl: the signal that this process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


def start(module: str, output: IO[Any], environ: Mapping[str, str]) -> tuple[subprocess.Popen[str], int]:
    """Start ``module.main(descriptor)`` in a process of its own.

    Args:
        output: file that takes all it prints. environ: added to this process's.

    Returns:
        The process, to whose standard input requests are written, and the descriptor that its answers are read from.
    """
    root = str(Path(__file__).resolve().parents[2])
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _START.format(root=root, module=module, descriptor=write)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(write,),
            env={**os.environ, **environ},
            text=True,
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    return process, read


def ending(code: int) -> str:
    """Why a process ended that should not have, from its exit code as ``subprocess`` gives it."""
    if code >= 0:
        return f"its process ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    memory = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{memory}"


def end_with_parent() -> None:
    """Ask the system to end this process when its parent ends, where it can do so (Linux).

    A library may hold the interpreter for seconds, in which the thread that waits for the pipe to close cannot run.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def requests() -> queue.Queue[dict[str, Any]]:
    """Requests as they come; when the parent is gone its end of the pipe closes, and this process ends at once.

    Whatever else runs here finds an empty standard input: a model that asks a question must not take a request for
    the answer.
    """
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()
    pipe = os.fdopen(os.dup(0), encoding="utf-8")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (for the life of the process)

    def read() -> None:
        for line in pipe:
            waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return waiting


def answering(descriptor: int) -> Callable[[dict[str, Any]], None]:
    """Writes answers, one JSON object a line, from any thread."""
    out = os.fdopen(descriptor, "w", encoding="utf-8")
    lock = threading.Lock()

    def answer(data: dict[str, Any]) -> None:
        text = json.dumps(data)
        with lock:
            out.write(text + "\n")
            out.flush()

    return answer


def parts(error: EdgeAttnError) -> dict[str, Any]:
    """All that an error says, as plain data: the arguments that make it again."""
    found = {name: getattr(error, name) for name in ("what", "value", "where", "why", "fix", "details")}
    found["value"] = None if found["value"] is None else str(found["value"])
    return found


def as_data(error: EdgeAttnError) -> dict[str, Any]:
    """An error for those who do not make it again: its parts, its ``kind`` (the class) and its ``exit_code``."""
    return {"kind": type(error).__name__, "exit_code": error.exit_code, **parts(error)}


def main(answers: int) -> None:
    """Do one task of ``pipeline.executor``: a request ``{"call", "argument"}``, then words, then what came of it.

    Args:
        answers: file descriptor that answers are written to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    end_with_parent()
    waiting = requests()
    answer = answering(answers)
    request = waiting.get()
    answer(_outcome(request, lambda text: answer({"event": "said", "text": text})) | {"peak_mb": _peak_mb()})
    os._exit(0)


def _outcome(request: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    try:
        module, _, name = request["call"].partition(":")
        result = getattr(importlib.import_module(module), name)(request["argument"], say)
        json.dumps(result)
    except EdgeAttnError as error:
        return {"event": "failed", "error": as_data(error)}
    except (Exception, SystemExit) as error:
        lines = traceback.format_exc().splitlines()[-12:]
        why = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"[:2000]
        return {"event": "failed", "error": None, "why": why, "details": lines}
    return {"event": "done", "result": result}


def _peak_mb() -> float:
    """Resident memory in MB: the peak of this process, and the largest of those that it waited for."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(sum(resource.getrusage(who).ru_maxrss for who in both) * unit / 1e6, 1)
