"""What tasks of the tests do, called by an executor in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeattn.core.errors import CheckFailed

Say = Callable[[str], None]


def add(argument: dict[str, Any], say: Say) -> dict[str, Any]:
    say("adding")
    print("on standard output, which is no answer")
    return {"sum": argument["a"] + argument["b"], "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}


def fail(argument: dict[str, Any], say: Say) -> dict[str, Any]:
    if argument.get("foreseen"):
        raise CheckFailed("it does not hold", value=3, where="here", details=["one", "two"])
    raise RuntimeError("nobody foresaw this")


def no_data(argument: dict[str, Any], say: Say) -> dict[str, Any]:
    return {"a": object()}


def meet(argument: dict[str, Any], say: Say) -> dict[str, Any]:
    """Returns once as many processes as expected are in the folder; fails if they never are there together."""
    folder = Path(argument["folder"])
    (folder / argument["name"]).touch()
    end = time.monotonic() + 20
    while len(list(folder.iterdir())) < argument["expected"]:
        if time.monotonic() > end:
            raise CheckFailed("the others did not come")
        time.sleep(0.01)
    return {}


def die(argument: dict[str, Any], say: Say) -> dict[str, Any]:
    """Kills itself the first ``times`` times; notes each start in a file."""
    notes = Path(argument["notes"])
    with notes.open("a") as file:
        file.write("x")
    say("about to die")
    if len(notes.read_text()) <= argument["times"]:
        os.kill(os.getpid(), argument.get("signal", signal.SIGKILL))
        time.sleep(60)
    return {"starts": len(notes.read_text())}


def linger(argument: dict[str, Any], say: Say) -> dict[str, Any]:
    """Sleeps for long beside a child of its own that sleeps too; both pids are in the folder."""
    code = "import time\nfrom edgeattn.pipeline.child import end_with_parent\nend_with_parent()\nprint(flush=True)\n"
    child = subprocess.Popen([sys.executable, "-c", code + "time.sleep(120)"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # from here on it ends with this process
    folder = Path(argument["folder"])
    (folder / f"{os.getpid()}-{child.pid}").touch()
    say("lingering")
    time.sleep(120)
    return {}
