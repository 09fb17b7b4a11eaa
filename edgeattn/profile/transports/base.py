"""What a transport is: a way to run a bundle's ``run.py`` on a device and bring its JSON back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.core.errors import CheckFailed, EdgeAttnError, ToolchainMissing, UsageError

#: Shows a line of progress.
Say = Callable[[str], None]


def silent(text: str) -> None:
    """A ``Say`` that shows nothing."""


@dataclass(frozen=True)
class Found:
    """One thing that a device has or lacks.

    Attributes:
        name: "python", "numpy", a runtime's distribution, "disk", "memory".
        present: True when it is there and fit.
        detail: version or amount when present, else the reason.
        fix: the line that installs it on the device, when it is missing.
    """

    name: str
    present: bool
    detail: str
    fix: str | None = None


class Transport(ABC):
    """A way to a device.

    Attributes:
        url: ``local``, ``ssh://user@host:port`` or ``qemu://cortex-a76``.
        emulated: True where numbers can be verified but times mean nothing.
    """

    url: str
    emulated: bool = False

    @abstractmethod
    def run(self, bundle: Path, arguments: Sequence[str], say: Say = silent) -> dict[str, Any]:
        """Run ``run.py *arguments --json`` of ``bundle`` on the device, in a process of its own; returns its JSON.

        The bundle's files are compared with the manifest's hashes on the far side. Nothing stays there.

        Raises:
            DeviceUnreachable: the link cannot be made, or died. ToolchainMissing: Python, NumPy or the runtime is
                missing there; holds the install line. CheckFailed: the files or the numbers do not hold there.
                UsageError: the bundle has no runner, or cannot be stored there.
        """

    @abstractmethod
    def check(self) -> list[Found]:
        """What the device has and lacks. Raises DeviceUnreachable."""


#: The runner's exit codes, as errors.
_ERRORS: dict[int, type[EdgeAttnError]] = {1: CheckFailed, 2: UsageError, 3: ToolchainMissing}


def result_of(answer: dict[str, Any], where: str) -> dict[str, Any]:
    """The runner's JSON when its numbers hold.

    Args:
        where: the device, for the error.

    Raises:
        EdgeAttnError: of the runner's own exit code.
    """
    if "error" in answer:
        kind = _ERRORS.get(int(answer.get("exit_code", 1)), CheckFailed)
        raise kind(str(answer["error"]), where=where, fix=answer.get("fix"), value=answer.get("value"))
    if not answer.get("holds", False):
        raise CheckFailed(
            "the numbers do not hold on the device",
            value=f"worst relative L2 {answer.get('worst_relative_l2')}",
            where=where,
            why=f"tolerance is {answer.get('tolerance')} under {answer.get('runtime')}",
        )
    return answer
