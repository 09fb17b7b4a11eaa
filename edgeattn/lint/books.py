"""Where rules come from: the shared file, the targets' own, a user's folder, installed packages, the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from edgeattn.core import schema
from edgeattn.core.errors import UsageError
from edgeattn.lint.rules import Rule, RuleBook

#: Entry points of packages with rules: ``NAME = "PACKAGE.MODULE"``, beside which ``lint.toml`` lies.
GROUP = "edgeattn.lint_rules"
#: A target's own file, in the folder of its package.
FILE = "lint.toml"


@cache
def shared() -> RuleBook:
    """Rules that hold for several targets."""
    return RuleBook(Path(__file__).with_name("rules.toml"))


@cache
def own(folder: Path, target: str) -> RuleBook:
    """The rules in a target's folder."""
    return RuleBook(folder / FILE, target)


def user_files() -> list[Path]:
    """A user's own files: ``lint/*.toml`` beside the recipes of their own, and those of installed packages.

    Raises:
        UsageError: an entry point that leads nowhere.
    """
    return [*sorted(schema.folders("lint")[0].glob("*.toml")), *_installed()]


def _installed() -> list[Path]:
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            spec = importlib.util.find_spec(point.value)
        except (ImportError, ValueError):
            spec = None
        # A package is its folder; of a module it is the one that it lies in. Nothing of it is executed.
        path = Path(spec.origin).with_name(FILE) if spec and spec.origin else None
        if path is None or not path.is_file():
            raise UsageError(
                "rules of an installed package cannot be found",
                value=f"{point.name} = {point.value}",
                where=f"entry points {GROUP}",
                why=f"no {FILE} lies beside the module",
                fix=f"name the module that {FILE} lies beside, or uninstall the package",
            )
        found.append(path)
    return found


def user_books(files: Sequence[Path] = ()) -> list[RuleBook]:
    """The user's rules.

    Args:
        files: further ones, from the command line.

    Raises:
        UsageError: a file that is not valid, or a rule of a name that there is already.
    """
    books: list[RuleBook] = []
    places = dict.fromkeys(shared().rules, "edgeattn")
    for path in [*user_files(), *files]:
        book = RuleBook(path, users=True)
        for name in book.rules:
            if name in places:
                raise UsageError(
                    "two rules have one name",
                    value=name,
                    where=str(path),
                    why=f"{places[name]} has one of that name already",
                    fix="rename it",
                )
            places[name] = str(path)
        books.append(book)
    return books


def every(targets: Iterable[str], others: Sequence[RuleBook] = ()) -> Iterator[tuple[str, str, tuple[str, ...], Rule]]:
    """All rules: where each comes from, its name, the targets that it holds for (none for all), and the rule.

    Args:
        targets: names of those that may have a file of their own. others: the user's books.
    """
    folder = Path(__file__).resolve().parents[1] / "targets"
    own_ones = [own(folder / name, name) for name in targets if (folder / name / FILE).is_file()]
    for book in [shared(), *own_ones, *others]:
        source = str(book.path) if book in others else "edgeattn"
        for name, rule in book.rules.items():
            yield source, name, book.targets_of(name), rule
