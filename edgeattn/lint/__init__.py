"""Lint: what is known to go wrong or slow on a target. Rules are data, each target's in its own ``lint.toml``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from edgeattn.core import schema
from edgeattn.core.errors import CheckFailed

Severity = Literal["error", "warning", "note"]


class Rule(schema.Strict):
    """What is known of a pattern.

    Attributes:
        severity: an error ends the export before any conversion.
        what: what the pattern is, in one sentence.
        evidence: the measurement or document that it rests on.
        mend: what to do.
    """

    severity: Severity
    what: str
    evidence: str
    mend: str


class _Rules(schema.Strict):
    rules: dict[str, Rule] = Field(min_length=1)


@dataclass(frozen=True)
class Finding:
    """A rule's pattern, found.

    Attributes:
        module: path of the torch module, "" for the whole model.
        detail: what was found there: an operation, a count, versions.
    """

    rule: str
    severity: Severity
    module: str
    what: str
    detail: str
    mend: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class RuleBook:
    """The rules of one file; makes findings of them.

    Raises:
        UsageError: the file is not a valid one.
    """

    def __init__(self, path: Path) -> None:
        self.rules = schema.validate(_Rules, schema.read_toml(path), str(path)).rules

    def finding(self, rule: str, module: str, detail: str, severity: Severity | None = None) -> Finding:
        """A finding of ``rule``; ``severity`` where it differs from the rule's own. Raises KeyError: no such rule."""
        known = self.rules[rule]
        return Finding(rule, severity or known.severity, module, known.what, detail, known.mend)


def gate(findings: list[Finding]) -> None:
    """Stop at errors.

    Raises:
        CheckFailed: lists every finding of severity error.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        first = errors[0]
        raise CheckFailed(
            f"lint: {first.what}",
            value=first.detail,
            where=f"module {first.module or '(model)'}, rule {first.rule}",
            fix=first.mend,
            details=[f"{e.rule} in module {e.module or '(model)'}: {e.detail}" for e in errors[1:]],
        )
