"""Which operations of MIL the interpreter covers, asked of coremltools and of the interpreter's own registry.

    python examples/mil_operators.py [--write docs/coreml-operators.md]

"From PyTorch" are those that coremltools' converter from PyTorch, or a pass of it, makes: names after ``mb.`` in its
sources.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edgeattn.core import tools
from edgeattn.core.quiet import quiet
from edgeattn.targets.coreml.mil import ops
from edgeattn.targets.coreml.mil.package import VERSIONS
from edgeattn.targets.coreml.mil.registry import OPS

with quiet():
    import coremltools
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

#: Made by the interpreter's reader, or never written to a package.
NOT_OPERATIONS = ("const", "_const_symbolic")
#: Where coremltools keeps what makes operations of a torch model.
MAKERS = ("frontend/torch", "frontend", "mil/passes/defs", "backend/mil")
#: Written to packages under other names than those that the builder has.
WRITTEN = ("write_state",)


def _changes(definitions: Mapping[int, type]) -> list[tuple[int, type]]:
    """The definitions that are not those of the version before; systems older than ML programs left out."""
    found: list[tuple[int, type]] = []
    for version, definition in sorted(definitions.items()):
        if not found or found[-1][1] is not definition:
            found.append((max(int(version), min(VERSIONS)), definition))
    return found


def known() -> dict[str, list[str]]:
    """Every operation that a package can hold, with the systems from which on it has another definition."""
    names = {
        name: list(dict.fromkeys(VERSIONS[version] for version, _ in _changes(definitions)))
        for name, definitions in SSAOpRegistry.core_ops.items()
        if name not in NOT_OPERATIONS
    }
    return names | {name: ["iOS18"] for name in WRITTEN}


def from_pytorch() -> set[str]:
    """Operations that the converter from PyTorch and the passes after it make."""
    root = Path(coremltools.__file__).parent / "converters" / "mil"
    files = [path for maker in MAKERS for path in sorted((root / maker).glob("**/*.py")) if "test" not in path.parts]
    made = {name for path in files for name in re.findall(r"\bmb\.(\w+)", path.read_text())}
    return (made & set(known())) | set(WRITTEN)


def table() -> str:
    """The page in Markdown."""
    every, made = known(), from_pytorch()
    covered = [name for name in every if name in OPS]
    left = [name for name in every if name not in OPS]
    lines = [
        "# Operations of the MIL interpreter",
        "",
        f"{len(covered)} of the {len(every)} operations that coremltools {tools.version('coremltools')} can write are "
        f"covered, {sum(name in OPS for name in made)} of the {len(made)} that it makes of PyTorch models.",
        "Made by `python examples/mil_operators.py --write docs/coreml-operators.md`.",
        "",
        f"Not covered: {', '.join(f'`{name}`' for name in left) or 'none'}.",
        "A model with one of them is refused, and the module that made it is named.",
        "",
        "| operation | defined from, and anew from | from PyTorch | implemented in |",
        "|---|---|---|---|",
    ]
    for name in sorted(every):
        place = OPS[name].function.__module__.rpartition(".")[2] if name in OPS else "**not covered**"
        lines.append(f"| {name} | {', '.join(every[name])} | {'yes' if name in made else ''} | {place} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    assert ops.__name__  # importing it fills the registry
    if options.write:
        options.write.write_text(table())
    else:
        print(table())


if __name__ == "__main__":
    main()
