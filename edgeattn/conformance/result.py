"""What a check of the kit says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from edgeattn.conformance.kit import Kit

Verdict = Literal["held", "failed", "skipped"]


class NotHeld(Exception):
    """A demand that a target does not meet: what it should have given, what it gave, how to mend it."""

    def __init__(self, expected: str, given: object, mend: str) -> None:
        super().__init__(f"expected {expected}, given {given}")
        self.expected, self.given, self.mend = expected, str(given)[:800], mend


class Skipped(Exception):
    """A check that cannot be made, with the reason."""


@dataclass(frozen=True)
class Outcome:
    """One check, done.

    Attributes:
        check, demand: its name, and what it demands in one sentence.
        detail: what was looked at where it held, why where it was skipped.
        expected, given, mend: of a demand that was not met.
    """

    check: str
    demand: str
    verdict: Verdict
    detail: str = ""
    expected: str = ""
    given: str = ""
    mend: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """A demand and how it is looked at.

    Attributes:
        look: returns what was looked at; raises ``NotHeld`` or ``Skipped``.
        needs: ``nothing``, the ``toolchain``, or the ``registered`` target in a pipeline of its own.
    """

    name: str
    demand: str
    look: Callable[[Kit], str]
    needs: Literal["nothing", "toolchain", "registered"] = "nothing"

    def run(self, kit: Kit) -> Outcome:
        """Look; whatever else the target raises there is a demand not met."""
        held = Outcome(self.name, self.demand, "held")
        try:
            return replace(held, detail=self.look(kit))
        except Skipped as reason:
            return replace(held, verdict="skipped", detail=str(reason))
        except NotHeld as error:
            return replace(held, verdict="failed", expected=error.expected, given=error.given, mend=error.mend)
        except Exception as error:
            return replace(
                held,
                verdict="failed",
                expected="no exception",
                given=f"{type(error).__name__}: {error}"[:800],
                mend="see the traceback with --debug, or call the method with the same arguments",
            )


def demand(holds: bool, expected: str, given: object, mend: str) -> None:
    """Raises NotHeld where something does not hold."""
    if not holds:
        raise NotHeld(expected, given, mend)
