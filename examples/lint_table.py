"""Write the rules of ``edgeattn lint`` into docs/lint.md: python examples/lint_table.py"""

from __future__ import annotations

from pathlib import Path

from edgeattn import targets
from edgeattn.lint import Rule
from edgeattn.lint.books import every, shared

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lint.md"

#: What stands above is written by hand.
MARK = "## All rules\n"

HEAD = """
This part is written by `examples/lint_table.py` from `edgeattn/lint/rules.toml` and the targets' own `lint.toml`. Every
rule has a model that it is met by and one that it is not, in `tests/lint/test_rules.py`.
"""


def anchor(name: str, held: tuple[str, ...]) -> str:
    """Of a rule's part of the page: two targets may call theirs alike."""
    return name if name in shared().rules else f"{held[0]}-{name}"


def part(name: str, held: tuple[str, ...], rule: Rule) -> str:
    """What a rule matches, why with its source, and what to do."""
    versions = ", ".join(f"{tool} {bounds}" for tool, bounds in rule.versions.items())
    lines = [f"### {anchor(name, held)}", "", f"{rule.what[0].upper()}{rule.what[1:]}.", ""]
    lines += [f"- **Why**: {rule.evidence}", f"- **What to do**: {rule.mend}"]
    lines += [f"- **Measured with**: {versions}"] if versions else []
    lines += [f"- **--fix**: `{rule.fix}`"] if rule.fix else []
    return "\n".join([*lines, ""])


def page() -> str:
    """The page: what it has above the mark, a table of all rules, then each of them."""
    above, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    rules = [(name, held, rule) for _, name, held, rule in every(targets.names())]
    table = ["| rule | severity | targets | what |", "|---|---|---|---|"]
    for name, held, rule in rules:
        what = rule.what.replace("|", "\\|")
        table.append(f"| [`{name}`](#{anchor(name, held)}) | {rule.severity} | {', '.join(held)} | {what} |")
    return above + mark + "\n".join([HEAD, "\n".join(table) + "\n", *(part(*one) for one in rules)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
