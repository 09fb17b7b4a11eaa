"""How paths are shown: CI systems want them from the repository's root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: Where CI systems say that a repository was checked out.
_ROOTS = ("GITHUB_WORKSPACE", "CI_PROJECT_DIR")


@dataclass(frozen=True)
class Shown:
    """Files are shown from ``root`` on."""

    root: Path

    @staticmethod
    def here() -> Shown:
        """From the root that a CI system names, if this folder is in it; else from this folder."""
        here = Path.cwd()
        named = [Path(os.path.abspath(value)) for name in _ROOTS if (value := os.environ.get(name))]
        return Shown(next((root for root in named if here.is_relative_to(root)), here))

    def name(self, file: str) -> str | None:
        """Of a file as it is shown; None of one that is elsewhere, or that was installed."""
        path = Path(os.path.abspath(file))
        if not path.is_relative_to(self.root) or "site-packages" in path.parts:
            return None
        return path.relative_to(self.root).as_posix()
