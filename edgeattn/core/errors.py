"""The errors a user sees, one class for each documented exit code.

An error says what failed, the value, where (file and key, or module path), why, and what to do. The command line
prints exactly these parts and ends with ``exit_code``; the Python API raises the same objects.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgeAttnError(Exception):
    """Base of every error that EdgeAttn raises on purpose.

    Args:
        what: what failed, in one sentence.
        value: the offending value, if there is one.
        where: file and key, or the module path in the model.
        why: the cause.
        fix: what the user can do now.
        details: further lines (lists of names, the tail of a log).
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        value: object | None = None,
        where: str | None = None,
        why: str | None = None,
        fix: str | None = None,
        details: Iterable[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.value = value
        self.where = where
        self.why = why
        self.fix = fix
        self.details = list(details)
        #: Traceback of the process that raised it, for ``--debug``.
        self.traceback_text: str | None = None

    def parts(self) -> list[tuple[str, str]]:
        """The labelled parts after ``what``, in the order in which they are shown."""
        named = [
            ("value", None if self.value is None else str(self.value)),
            ("where", self.where),
            ("why", self.why),
            ("fix", self.fix),
        ]
        return [(label, text) for label, text in named if text]

    def __str__(self) -> str:
        lines = [self.what, *(f"  {label}: {text}" for label, text in self.parts())]
        return "\n".join([*lines, *(f"    {line}" for line in self.details)])


class CheckFailed(EdgeAttnError):
    """Exit code 1: a check did not hold (numbers, a proof, a hash)."""

    exit_code = 1


class UsageError(EdgeAttnError):
    """Exit code 2: an argument, a recipe, a checkpoint or a path that cannot be used."""

    exit_code = 2


def unknown(
    kind: str, name: str, known: Iterable[str], *, where: str | None = None, fix: str = "", like: str | None = None
) -> UsageError:
    """The error for a name that is none of ``known``, with the closest of them.

    Args:
        kind: what the name should have been, as in "recipe".
        fix: added to the closest name, or standing alone where nothing is near.
        like: the spelling to compare, where it is not that of ``name``.
    """
    names = list(known)
    near = closest(name if like is None else like, names)
    hints = [f"did you mean {near!r}?" if near else "", fix]
    return UsageError(
        f"unknown {kind}",
        value=name,
        where=where,
        why=f"known are {', '.join(names)}",
        fix=" ".join(hint for hint in hints if hint) or "choose one of them",
    )


class ToolchainMissing(EdgeAttnError):
    """Exit code 3: a toolchain that is needed is not installed; ``fix`` holds the install line."""

    exit_code = 3


class ConversionFailed(EdgeAttnError):
    """Exit code 4: capture or a converter could not take the model."""

    exit_code = 4


class Crashed(ConversionFailed):
    """Exit code 4: the process that did it was ended from outside or crashed; the same may do another time."""


class DeviceUnreachable(EdgeAttnError):
    """Exit code 5: the device did not answer."""

    exit_code = 5


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest in spelling to ``name``, or None if nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
