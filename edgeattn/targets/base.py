"""What a target is: six small promises that the pipeline, ``verify`` and ``doctor`` rely on.

A target's own module must import without its toolchain and without torch; it reaches for them inside its methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgeattn.core.errors import UsageError
from edgeattn.core.numerics import Array

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device


@dataclass(frozen=True)
class Availability:
    """Whether a toolchain can be used here.

    Attributes:
        found: True when ``lower`` and ``open`` can work.
        detail: versions when found, else why it is off.
        fix: the exact install line when it is off.
    """

    found: bool
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Tensor:
    """Name, static shape and NumPy dtype of an artifact's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ArtifactEntry:
    """One runnable graph of an artifact: its file (relative to the artifact's folder), inputs and outputs."""

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Artifact:
    """What a target lowered a program to.

    Attributes:
        folder: holds the files of all entries, and nothing else.
        entries: by name.
        facts: plain data worth recording: opset, node counts, operations kept in float32 and why.
    """

    folder: Path
    precision: str
    entries: Mapping[str, ArtifactEntry]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LowerPlan:
    """How a program is to be lowered.

    Attributes:
        precision: one of the target's ``precisions``.
        samples: feeds of real or random inputs, for whatever a target must find by measuring.
        metadata: text that goes into the artifact (recipe, hashes, versions).
    """

    precision: str
    samples: Sequence[Mapping[str, Array]]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class TraceValue:
    """One tensor inside a running artifact.

    Attributes:
        name: as the artifact calls it. module: path of the torch module that it came from, "" if unknown.
        op: the operation that made it.
    """

    name: str
    module: str
    op: str
    value: Array


class Runtime(Protocol):
    """An opened artifact."""

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name."""
        ...

    def trace(self, entry: str, feeds: Mapping[str, Array]) -> Iterator[TraceValue]:
        """Every float tensor inside the artifact in execution order, each stored in the artifact's own dtype.

        The last values of the graph outputs' names are the outputs as computed with every tensor rounded, which
        ``run`` need not do: a runtime may fuse operations and keep more digits than the artifact asks for.
        """
        ...


def check_feeds(inputs: Sequence[Tensor], feeds: Mapping[str, Array]) -> None:
    """Compare feeds with an entry's inputs.

    Raises:
        UsageError: a missing or unknown name, another shape or dtype.
    """
    wanted = {spec.name: spec for spec in inputs}
    if set(wanted) != set(feeds):
        raise UsageError("the inputs do not match", value=", ".join(feeds), why=f"wanted are {', '.join(wanted)}")
    for name, spec in wanted.items():
        given = feeds[name]
        if tuple(given.shape) != tuple(spec.shape) or str(given.dtype) != spec.dtype:
            raise UsageError(
                "an input has another shape or dtype",
                value=f"{name}: {tuple(given.shape)} {given.dtype}",
                why=f"the artifact takes {tuple(spec.shape)} {spec.dtype}",
            )


def entry_of(artifact: Artifact, entry: str) -> ArtifactEntry:
    """The entry of that name.

    Raises:
        UsageError: there is none.
    """
    if entry not in artifact.entries:
        known = ", ".join(artifact.entries)
        raise UsageError("the artifact has no such entry", value=entry, why=f"it has {known}")
    return artifact.entries[entry]


class Target(ABC):
    """A place to run: lowers programs, opens artifacts, and knows what a bundle needs."""

    name: ClassVar[str]
    #: Distributions whose versions decide what ``open`` computes.
    runtime_tools: ClassVar[tuple[str, ...]]

    @abstractmethod
    def availability(self) -> Availability:
        """Whether the toolchain is here. Never raises, imports nothing heavy."""

    @abstractmethod
    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """Precisions that this target can hold on ``device`` (anywhere, when None)."""

    @abstractmethod
    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """Distributions whose versions decide what ``lower`` writes."""

    @abstractmethod
    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """Write the artifact's files into the empty folder ``out``.

        Raises:
            ConversionFailed: the converter cannot take the program; names modules. ToolchainMissing.
        """

    @abstractmethod
    def open(self, artifact: Artifact) -> Runtime:
        """A runtime on this machine. Raises ToolchainMissing."""

    def package(self) -> str:
        """The pip requirement that a bundle's ``run.py`` needs beside NumPy; "" if it cannot run without EdgeAttn."""
        return ""
