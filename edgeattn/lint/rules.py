"""What a rule is, as TOML has it, and the books that hold rules: shared ones, a target's, a user's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from edgeattn.core import schema, tools
from edgeattn.core.errors import CheckFailed, ConversionFailed, UsageError
from edgeattn.lint.pattern import Pattern

Severity = Literal["error", "warning", "note"]

#: The rule of operations that a converter has no form for.
UNSUPPORTED = "unsupported-operator"

_BOUND = re.compile(r"(>=|<=|==|!=|>|<)(\d+(?:\.\d+)*)")


class Rule(schema.Strict):
    """What is known of a pattern.

    Attributes:
        severity: an error ends the export before any conversion.
        what: what the pattern is, in one sentence.
        evidence: the measurement or document that it rests on.
        mend: what to do.
        targets: that it holds for; none in a target's own file, which is for that target.
        versions: of distributions that it was measured with, as in ``coremltools = ">=9.0,<10"``. Where another one is
            installed the rule is still looked for, but it is a note then, and says so.
        pattern: how it is found; a rule without one is found by code.
        fix: the safe mend of ``edgeattn lint --fix``, if there is one.
    """

    severity: Severity
    what: str
    evidence: str
    mend: str
    targets: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    pattern: Pattern | None = None
    fix: str = ""

    @model_validator(mode="after")
    def _versions(self) -> Rule:
        for name, wanted in self.versions.items():
            for part in wanted.split(","):
                if not _BOUND.fullmatch(part.strip()):
                    raise ValueError(f"versions.{name}: {part.strip()!r} is no bound such as >=9.0 or <10")
        return self

    def other_version(self) -> str:
        """Which installed distribution is of a version that the rule was not measured with; "" if none is."""
        for name, wanted in self.versions.items():
            installed = tools.version(name)
            if installed is not None and not within(installed, wanted):
                return f"measured with {name} {wanted}, {installed} is installed"
        return ""


def within(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ``>=9.0,<10``; of a version only its leading numbers count."""
    found = re.match(r"\d+(\.\d+)*", version)
    own = _numbers(found[0] if found else "0")
    for part in bounds.split(","):
        matched = _BOUND.fullmatch(part.strip())
        assert matched is not None, "checked when the file was read"
        other = _numbers(matched[2])
        size = max(len(own), len(other))
        a, b = (numbers + (0,) * (size - len(numbers)) for numbers in (own, other))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, ">": a > b, "<": a < b}[matched[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


class Rules(schema.Strict):
    """A file of rules."""

    rules: dict[str, Rule] = Field(min_length=1)


@dataclass(frozen=True)
class Finding:
    """A rule's pattern, found.

    Attributes:
        module: path of the torch module, "" for the whole model.
        detail: what was found there: an operation, a count, versions.
        evidence: see ``Rule``. file, line: of the model's source; "" and 0 where they are not known.
    """

    rule: str
    severity: Severity
    module: str
    what: str
    detail: str
    mend: str
    evidence: str = ""
    file: str = ""
    line: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class RuleBook:
    """The rules of one file; makes findings of them.

    Args:
        own: the target whose file it is; "" of a file whose rules name their targets.
        users: whether a user wrote it: every rule is found by its pattern then.

    Raises:
        UsageError: the file is not a valid one.
    """

    def __init__(self, path: Path, own: str = "", users: bool = False) -> None:
        self.path = path
        self.own = own
        self.rules: Mapping[str, Rule] = schema.validate(Rules, schema.read_toml(path), str(path)).rules
        for name, rule in self.rules.items() if users else ():
            if rule.pattern is None or rule.fix:
                raise UsageError(
                    "a rule of your own needs a pattern, and has no fix",
                    value=name,
                    where=str(path),
                    why="there is no code that would find it" if rule.pattern is None else f"fix = {rule.fix!r}",
                    fix="docs/lint.md says how a pattern is written",
                )

    def of(self, target: str) -> dict[str, Rule]:
        """Rules that hold for a target; a user's that names none holds for all."""
        if self.own:
            return dict(self.rules) if self.own == target else {}
        return {name: rule for name, rule in self.rules.items() if not rule.targets or target in rule.targets}

    def targets_of(self, name: str) -> tuple[str, ...]:
        """Targets that a rule holds for; none where it holds for all."""
        return (self.own,) if self.own else tuple(self.rules[name].targets)

    def finding(self, rule: str, module: str, detail: str, severity: Severity | None = None) -> Finding:
        """A finding of ``rule``; ``severity`` where it differs from the rule's own. Raises KeyError: no such rule."""
        known = self.rules[rule]
        found = Finding(rule, severity or known.severity, module, known.what, detail, known.mend, known.evidence)
        other = known.other_version()
        return replace(found, severity="note", detail=f"{detail}; {other}") if other else found


def gate(findings: Iterable[Finding], converting: bool = False) -> None:
    """Stop at errors.

    Args:
        converting: an export is at its conversion, which operations without a form would make fail.

    Raises:
        CheckFailed: lists every finding of severity error. ConversionFailed: the same, where ``converting`` and the
            first of them is an operation that the converter has no form for.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        first = errors[0]
        kind = ConversionFailed if converting and first.rule == UNSUPPORTED else CheckFailed
        raise kind(
            f"lint: {first.what}",
            value=first.detail,
            where=f"module {first.module or '(model)'}, rule {first.rule}",
            fix=first.mend,
            details=[f"{e.rule} in module {e.module or '(model)'}: {e.detail}" for e in errors[1:]],
        )
