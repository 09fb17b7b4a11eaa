"""The conformance kit: what every target promises, looked at one promise after the other.

A check that cannot fail shows nothing, so ``tests/test_conformance.py`` has a broken target for each of them.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn import targets
from edgeattn.conformance import promises
from edgeattn.conformance.kit import Kit
from edgeattn.conformance.result import Check, NotHeld, Outcome
from edgeattn.core.errors import UsageError, unknown
from edgeattn.core.quiet import quiet
from edgeattn.targets.base import Target


def _late(module: str, name: str) -> Callable[[Kit], str]:
    """A check whose module imports torch; it is imported when the check is made."""

    def look(kit: Kit) -> str:
        found: Callable[[Kit], str] = getattr(importlib.import_module(f"edgeattn.conformance.{module}"), name)
        return found(kit)

    return look


_DEMANDS: tuple[tuple[str, str, str, str, str], ...] = (
    ("lower", "lowers a model or refuses it with ConversionFailed and the module", "lowering", "lower", "toolchain"),
    ("files", "writes into its folder alone", "lowering", "files", "toolchain"),
    ("program", "leaves the program as it was", "lowering", "program", "toolchain"),
    ("bytes", "the same program gives the same bytes", "lowering", "same_bytes", "toolchain"),
    ("process", "so it does in another process, which runs the artifact", "lowering", "other_process", "toolchain"),
    ("outputs", "inputs and outputs are the recipe's, as the artifact says", "lowering", "outputs", "toolchain"),
    ("numbers", "the numbers hold", "lowering", "numbers", "toolchain"),
    ("more-precisions", "so they do in every further precision", "lowering", "other_precisions", "toolchain"),
    ("runs", "run keeps no state and leaves arrays alone", "lowering", "runs", "toolchain"),
    ("feeds", "wrong feeds are a UsageError", "lowering", "feeds", "toolchain"),
    ("steps", "steps are in execution order", "inside", "steps", "toolchain"),
    ("trace", "the trace ends at the outputs", "inside", "trace", "toolchain"),
    ("operations", "operations are counted, or none is", "inside", "operations", "toolchain"),
    ("adopt", "files of its kind are known, others left", "inside", "adopt", "toolchain"),
    ("others", "further runtimes run too", "inside", "others", "toolchain"),
    ("lint", "lint gives findings and never raises", "inside", "lint", "nothing"),
    ("export", "a whole export proves itself, also in a fresh process", "whole", "export", "registered"),
)

#: In the order in which they are made.
CHECKS: tuple[Check, ...] = (
    Check("names", "a subclass of Target, called as its entry point", promises.names),
    Check("attributes", "class attributes of the right types", promises.attributes),
    Check("imports", "looking at it imports nothing heavy", promises.imports),
    Check("availability", "availability never raises, and has an install line", promises.availability),
    Check("precisions", "known precisions, at least one", promises.precisions),
    Check("options", "options are settled, unknown ones refused", promises.options),
    Check("packages", "tools are named as pip knows them", promises.packages),
    Check("requirement", "what run.py needs is what it can run", promises.requirement),
    *(
        Check(name, words, _late(module, function), needs)  # type: ignore[arg-type]
        for name, words, module, function, needs in _DEMANDS
    ),
)


@dataclass(frozen=True)
class Report:
    """What the kit found of a target.

    Attributes:
        target: as it was named. outcomes: in the order of ``CHECKS``.
        missing: why its toolchain cannot be used here, and the line that installs it; None where it can.
    """

    target: str
    outcomes: tuple[Outcome, ...]
    missing: tuple[str, str] | None

    @property
    def failed(self) -> list[Outcome]:
        """Demands that are not met."""
        return [outcome for outcome in self.outcomes if outcome.verdict == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "target": self.target,
            "holds": not self.failed and self.missing is None,
            "missing": self.missing and {"why": self.missing[0], "fix": self.missing[1]},
            "checks": [outcome.as_dict() for outcome in self.outcomes],
        }


def _load(name: str) -> tuple[Target, str, str]:
    """The target, the name that it is registered under ("" if by its class), and ``package.module:Class``.

    Raises:
        UsageError: there is none, or it cannot be loaded.
    """
    if ":" not in name:
        return targets.load(name), name, targets.place_of(name)
    module, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does: a target that is being written lies here
    try:
        found: Target = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError("the target cannot be loaded", value=name, why=why, fix="package.module:Class") from error
    return found, "", name


def conform(
    name: str,
    only: Sequence[str] = (),
    model: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Look at every promise of a target.

    Args:
        name: a registered target, or ``package.module:Class``. only: names of checks, all without.
        model: for the whole export, in place of the kit's own.
        say: is told what is looked at now.

    Raises:
        UsageError: no such target, or no such check.
    """
    known = [check.name for check in CHECKS]
    for asked in only:
        if asked not in known:
            raise unknown("check", asked, known)
    target, registered, place = _load(name)
    outcomes: list[Outcome] = []
    missing: tuple[str, str] | None = None
    with tempfile.TemporaryDirectory() as folder:
        kit = Kit(target, registered, place, Path(folder).resolve(), model)
        try:
            kit.availability = target.availability()
            if not kit.availability.found:
                missing = (kit.availability.detail, kit.availability.fix or "")
        except Exception:  # what 'availability' is there to say
            kit.availability = None
        for check in CHECKS:
            if only and check.name not in only:
                continue
            say(check.name)
            with quiet():  # vendors' converters print what would spoil --json
                outcomes.append(_made(check, kit, outcomes))
    return Report(name, tuple(outcomes), missing)


def _made(check: Check, kit: Kit, before: Sequence[Outcome]) -> Outcome:
    """The outcome of one check; what stands on what has failed is not looked at."""
    failed = [outcome.check for outcome in before if outcome.verdict == "failed"]
    why = ""
    if check.needs != "nothing" and kit.availability is None:
        why = "whether the toolchain is here is not known"
    elif check.needs != "nothing" and kit.availability is not None and not kit.availability.found:
        why = f"toolchain missing: {kit.availability.detail}"
    elif check.needs == "registered" and failed:
        why = f"mend {', '.join(failed)} first"
    return Outcome(check.name, check.demand, "skipped", why) if why else check.run(kit)


__all__ = ["CHECKS", "Check", "NotHeld", "Outcome", "Report", "conform"]
