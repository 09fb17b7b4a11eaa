"""A target on the bench: its models, lowered once and watched meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import device as devices
from edgeattn.conformance.result import Skipped
from edgeattn.core import schema
from edgeattn.core.errors import CheckFailed, ConversionFailed, EdgeAttnError, UsageError
from edgeattn.core.hashing import sha256_bytes, sha256_file
from edgeattn.quant.plan import QuantPlan
from edgeattn.targets.base import Artifact, Availability, LowerPlan, Target

if TYPE_CHECKING:
    from edgeattn.conformance.models import Case

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Events of the interpreter that change the file system, and the place of the path among their arguments.
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.link": 1}
_noted: list[str] | None = None
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Cannot be taken off again, so it asks whether somebody wants to know."""
    if _noted is None:
        return
    path: Any = None
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
        path = arguments[0]
    elif event in _CHANGES and arguments[-1] in (None, -1):  # else beside an open folder, as rmtree does
        path = arguments[_CHANGES[event]]
    if isinstance(path, str | bytes | os.PathLike):
        _noted.append(os.path.realpath(os.fsdecode(path)))


@contextlib.contextmanager
def watched(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """An empty folder to write into, and a list that at the end has whatever was written elsewhere.

    Temporary files go to a folder of their own meanwhile, and the working folder is an empty one. What libraries write
    that are not Python is seen where it lies beside the folder, or in the working folder.
    """
    global _noted, _watching
    if not _watching:
        sys.addaudithook(_hook)
        _watching = True
    root = root.resolve()
    out, cwd, temporary = root / "around" / "out", root / "cwd", root / "tmp"
    for folder in (out, cwd, temporary):
        folder.mkdir(parents=True)
    strays: list[str] = []
    before = os.getcwd(), os.environ.get("TMPDIR"), tempfile.tempdir
    os.chdir(cwd)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    _noted = []
    try:
        yield out, strays
    finally:
        noted, _noted = _noted, None
        os.chdir(before[0])
        os.environ.pop("TMPDIR")
        os.environ |= {"TMPDIR": before[1]} if before[1] is not None else {}
        tempfile.tempdir = before[2]
    left = [str(path) for folder in (out.parent, cwd) for path in folder.iterdir() if path != out]
    fine = (str(out), str(temporary), "/dev", "/proc")
    far = [path for path in noted if "__pycache__" not in path and not path.startswith(fine)]
    strays += dict.fromkeys((*left, *far))
    shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Lowered:
    """A model that was lowered, or was not.

    Attributes:
        refused: why the target does not take it; None where it does. error: any other exception.
        strays: files written outside of the folder. changed: the program was not left as it was.
    """

    case: Case
    precision: str
    artifact: Artifact | None
    refused: EdgeAttnError | None
    error: Exception | None
    strays: tuple[str, ...]
    changed: bool


def digest_of(case: Case) -> str:
    """Of a case's graphs and weights."""
    texts = []
    for name, entry in case.program.entries.items():
        weights = [sha256_bytes(v.detach().cpu().numpy().tobytes()) for v in entry.graph.state_dict.values()]
        texts.append(f"{name} {entry.graph.graph} {weights}")
    return sha256_bytes("\n".join(texts).encode())


def plan_of(target: Target, case: Case, precision: str) -> LowerPlan:
    """As the pipeline would make it for a model without a recipe.

    Raises:
        UsageError: no such decoder.
    """
    settled = target.settle({}, None, precision)
    if case.program.decoder is not None:
        settled = target.settle_decoder(settled, {}, None, precision)
    metadata = {"edgeattn": "0", "recipe": case.name, "recipe_sha256": "0" * 64, "weights": "random"}
    return LowerPlan(
        precision,
        case.samples,
        metadata,
        options=settled,
        quant=QuantPlan(precision),
        calibration=case.samples,
        by_entry={case.entry: case.samples} if case.program.decoder is not None else {},
    )


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below, by its name from there."""
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def places_of(target: Target) -> list[devices.Device]:
    """The devices that run the target; a user's own file that is not valid is none."""
    found = []
    for path in schema.find("devices").values():
        with contextlib.suppress(UsageError):
            place = devices.load(path)
            found += [place] if target.name in place.targets else []
    return found


@dataclass
class Kit:
    """A target, and what is known of it so far.

    Attributes:
        name: that it is registered under, "" where it is not. place: ``package.module:Class``.
        folder: scratch. model: for the whole export, or None for the kit's own.
        probed: what a fresh process said of it, see ``promises``.
    """

    target: Target
    name: str
    place: str
    folder: Path
    model: str | None = None
    availability: Availability | None = None
    probed: tuple[list[Any], list[str]] | None = None
    _lowered: dict[tuple[str, str, int], Lowered] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The target's first."""
        return self.target.precisions(None)[0]

    def need_alone(self) -> None:
        """Raises Skipped where others lower for this target."""
        if self.target.parts:
            raise Skipped(f"it stands for {' and '.join(self.target.parts)}, which are tested by themselves")

    def lowered(self, case: Case, precision: str, again: int = 0) -> Lowered:
        """A model lowered in a precision, once for all checks; ``again`` counts further times."""
        key = (case.name, precision, again)
        if key not in self._lowered:
            before = digest_of(case)
            artifact: Artifact | None = None
            refused: EdgeAttnError | None = None
            error: Exception | None = None
            root = self.folder / "-".join(map(str, key))
            with watched(root) as (out, strays):
                try:
                    artifact = self.target.lower(case.program, plan_of(self.target, case, precision), out)
                except (ConversionFailed, CheckFailed) as reason:
                    refused = reason
                except UsageError as reason:  # of a decoder, by ``settle_decoder``
                    refused, error = (reason, None) if case.program.decoder is not None else (None, reason)
                except Exception as reason:
                    error = reason
            changed = digest_of(case) != before
            self._lowered[key] = Lowered(case, precision, artifact, refused, error, tuple(strays), changed)
        return self._lowered[key]

    def all(self) -> list[Lowered]:
        """Every model in the target's first precision."""
        self.need_alone()
        from edgeattn.conformance.models import cases

        return [self.lowered(case, self.precision) for case in cases(self.target)]

    def taken(self) -> list[tuple[Case, Artifact]]:
        """Those that the target took.

        Raises:
            Skipped: none.
        """
        found = [(one.case, one.artifact) for one in self.all() if isinstance(one.artifact, Artifact)]
        if not found:
            raise Skipped("no model was lowered")
        return found
