"""Rules with a pattern are looked for at every node of a captured program; a module's findings are put together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

from edgeattn.capture import Program
from edgeattn.lint.graph import parts_of, path_of
from edgeattn.lint.match import detail, holds
from edgeattn.lint.rules import Finding, RuleBook, Severity

#: Rule, what was found, and the severity where it is not the rule's own.
Hit = tuple[str, str, Severity | None]

#: Different details shown of a module.
_SHOWN = 6


class Findings:
    """One finding for each rule and module."""

    def __init__(self, book: RuleBook) -> None:
        self._book = book
        self._details: dict[tuple[str, str, Severity | None], Counter[str]] = defaultdict(Counter)

    def add(self, module: str, hit: Hit) -> None:
        """Note that a rule was met in a module."""
        rule, detail, severity = hit
        self._details[rule, module, severity][detail] += 1

    def list(self) -> list[Finding]:
        """All of them, in the order of the rules."""
        order = list(self._book.rules)
        found = []
        for key in sorted(self._details, key=lambda key: order.index(key[0])):
            (rule, module, severity), details = key, self._details[key]
            shown = [f"{count} x {text}" if count > 1 else text for text, count in list(details.items())[:_SHOWN]]
            rest = [f"{len(details) - _SHOWN} others"] if len(details) > _SHOWN else []
            found.append(self._book.finding(rule, module, "; ".join([*shown, *rest]), severity))
        return found


def by_pattern(program: Program, book: RuleBook, target: str, without: Collection[str] = ()) -> list[Finding]:
    """Findings of the rules of a book that have a pattern and hold for a target.

    Args:
        without: rules to leave out.
    """
    patterns = {n: rule.pattern for n, rule in book.of(target).items() if rule.pattern and n not in without}
    found = Findings(book)
    seen: set[int] = set()
    for entry in program.entries.values():
        if not patterns or id(entry.graph) in seen:  # a decoder's entries may be one graph
            continue
        seen.add(id(entry.graph))
        for part in parts_of(entry):
            for node in part.nodes():
                for name, pattern in patterns.items():
                    if holds(pattern, node, part):
                        found.add(path_of(node) or part.place, (name, detail(pattern, node), None))
    return found.list()


def all_of(program: Program, books: Iterable[RuleBook], target: str) -> list[Finding]:
    """``by_pattern`` of several books, in order."""
    return [finding for book in books for finding in by_pattern(program, book, target)]
