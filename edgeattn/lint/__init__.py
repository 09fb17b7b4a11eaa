"""Lint: what is known to go wrong or slow on a target. Rules are data.

Shared ones are in ``rules.toml`` beside this file, each target's in its own ``lint.toml``, and a user's in theirs.
"""

from edgeattn.lint.rules import Finding, Rule, RuleBook, Severity, gate

__all__ = ["Finding", "Rule", "RuleBook", "Severity", "gate"]
