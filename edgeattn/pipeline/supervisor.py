"""The parent's side of the worker process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeattn.core import errors
from edgeattn.core.errors import ConversionFailed, Crashed, EdgeAttnError
from edgeattn.core.files import remove
from edgeattn.pipeline import child
from edgeattn.pipeline.job import Job

_KEPT_LOGS = 200


class Supervisor:
    """Starts a worker when the first stage needs one, and speaks to it.

    Args:
        logs: folder for what converters print; one file a worker.
        temporary: the worker's folder for temporary files; goes with the worker, since it is killed and converters
            that clean up as their process exits never do.
    """

    def __init__(self, logs: Path, temporary: Path) -> None:
        self._logs = logs
        self._temporary = temporary
        self._process: subprocess.Popen[str] | None = None
        self._answers: Any = None
        self._log: Path | None = None

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the worker, which imports torch at once."""
        if self._process is not None:
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(self._logs.glob("*.log"))[: -_KEPT_LOGS + 1]:
            old.unlink(missing_ok=True)
        self._log = self._logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process, read = child.start("edgeattn.pipeline.worker", log, {"TMPDIR": str(self._temporary)})
        self._answers = os.fdopen(read, encoding="utf-8")

    def stop(self) -> None:
        """End the worker, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                if self._process.stdin:
                    self._process.stdin.close()
            self._answers.close()
            self._process = None
        remove(self._temporary)

    def run(
        self, stage: str, job: Job, out: Path, results: dict[str, Any], say: Callable[[str], None]
    ) -> tuple[dict[str, Any], float, float]:
        """Run one stage; returns its facts, seconds and peak memory in MB.

        Raises:
            EdgeAttnError: what the stage raised. Crashed: the worker crashed or was killed. ConversionFailed: it failed
                in a way that nobody foresaw. Both name the log.
        """
        self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"stage": stage, "job": job.to_dict(), "out": str(out), "results": results}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            for line in self._answers:
                answer = json.loads(line)
                if answer["event"] == "done":
                    return answer["facts"], answer["seconds"], answer["peak_mb"]
                if answer["event"] == "error":
                    raise self._error(stage, answer)
                say(answer["text"])
        except BrokenPipeError:
            pass
        raise self._crash(stage)

    def _error(self, stage: str, answer: dict[str, Any]) -> EdgeAttnError:
        if answer["kind"]:
            error: EdgeAttnError = getattr(errors, answer["kind"])(**answer["parts"])
        else:
            # Another time there may be more memory.
            kind = Crashed if answer["why"] == "out of memory" else ConversionFailed
            error = kind(
                f"stage {stage} failed", why=answer["why"], where=str(self._log), fix="read the log, or pass --debug"
            )
        error.traceback_text = answer["traceback"]
        return error

    def _crash(self, stage: str) -> EdgeAttnError:
        assert self._process is not None
        assert self._log is not None
        code = self._process.wait()
        log = self._log
        self.stop()
        tail: list[str] = []
        with contextlib.suppress(OSError):  # others keep the newest logs alone
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        return Crashed(f"stage {stage} crashed", why=child.ending(code), where=str(log), details=tail)
