"""Write docs/coreml-lint.md, the rules of ``edgeattn lint --target coreml``: python examples/lint_table.py"""

from __future__ import annotations

from pathlib import Path

import edgeattn
from edgeattn.lint import RuleBook

RULES = Path(edgeattn.__file__).parent / "targets" / "coreml" / "lint.toml"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "coreml-lint.md"

HEAD = """# Lint rules of target coreml

    edgeattn lint MODEL --target coreml --device iphone-15-pro

`edgeattn lint` looks for these patterns in the captured program, by operations, shapes and dtypes. An error ends an
export before anything is converted. This page is written by `examples/lint_table.py` from
`edgeattn/targets/coreml/lint.toml`.
"""


def page() -> str:
    """The page: a table of all rules, then for each what it matches, why with its source, and what to do."""
    rules = RuleBook(RULES).rules
    table = ["| rule | severity | what |", "|---|---|---|"]
    table += [f"| [`{name}`](#{name}) | {rule.severity} | {rule.what} |" for name, rule in rules.items()]
    parts = [HEAD, "\n".join(table) + "\n"]
    for name, rule in rules.items():
        parts.append(f"## {name}\n\n{rule.what[0].upper()}{rule.what[1:]}.\n")
        parts.append(f"- **Why**: {rule.evidence}\n- **What to do**: {rule.mend}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
