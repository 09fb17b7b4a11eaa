"""What a target is: six small promises that the pipeline, ``verify`` and ``doctor`` rely on.

A target's own module must import without its toolchain and without torch; it reaches for them inside its methods.
``edgeattn targets test NAME`` looks at every promise (``edgeattn.conformance``); docs/plugins.md says how to write one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from edgeattn.core.errors import CheckFailed, UsageError, unknown
from edgeattn.core.numerics import TOGETHER, TOLERANCES, Array
from edgeattn.core.specs import Ranges, step_of
from edgeattn.quant.plan import QuantPlan

if TYPE_CHECKING:
    from edgeattn.capture import Program
    from edgeattn.device import Device
    from edgeattn.lint import Finding
    from edgeattn.recipe import Preprocess


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


#: Layouts of image inputs: channels first as in PyTorch, or last.
NCHW, NHWC = "nchw", "nhwc"
#: Layout of a tensor of raw pixels whose first channel is blue.
BGR = "bgr"


@dataclass(frozen=True)
class Tensor:
    """Name, shape and NumPy dtype of an artifact's input or output.

    Attributes:
        layout: ``nhwc`` where an image has its channels last, unlike the model's input of that name; ``bgr`` where the
            channels of its pixels are those of a picture turned round; else "".
        pixels: where the artifact takes raw pixels, factor and offset of each channel: the model's input is
            ``factor * pixel + offset``; else empty.
        dynamic: (axis, min, opt, max), and a step if it is not 1, of the dimensions that may vary; ``shape`` has their
            opt.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""
    pixels: tuple[tuple[float, float], ...] = ()
    dynamic: Ranges = ()

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether an array of that shape fits: every dimension within its range, or as it is."""
        sizes = [range(n, n + 1) for n in self.shape]
        for axis, *ends in self.dynamic:
            sizes[axis] = range(ends[0], ends[2] + 1, step_of(ends))
        return len(shape) == len(sizes) and all(n in fits for n, fits in zip(shape, sizes, strict=True))


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
        findings: what lint found in the artifact itself.
    """

    folder: Path
    precision: str
    entries: Mapping[str, ArtifactEntry]
    facts: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


@dataclass(frozen=True)
class LowerPlan:
    """How a program is to be lowered.

    Attributes:
        precision: one of the target's ``precisions``.
        samples: feeds of real or random inputs, for whatever a target must find by measuring.
        metadata: text that goes into the artifact (recipe, hashes, versions).
        runtime: the distribution that will run it, where a target has several; "" for the target's own.
        layout: one of the target's ``layouts``, for image inputs.
        options: all of the target's options, see ``Target.settle``.
        preprocess: the recipe's, for artifacts that take raw pixels. labels: the recipe's names of the classes.
        strict: refuse to keep operations in a wider precision than the one asked for.
        quant: which module is stored in how many bits.
        calibration: feeds that ranges of activations are measured on; may be gone through again and again, and is
            never held in memory as a whole. Empty where nothing is measured.
        by_entry: samples of a decoder's entries, in place of ``samples``.
        tokenizer: folder of a language model's tokenizer, for formats that hold it.
        device: that it is for, if one was named.
    """

    precision: str
    samples: Sequence[Mapping[str, Array]]
    metadata: Mapping[str, str]
    runtime: str = ""
    layout: str = NCHW
    options: Mapping[str, str] = field(default_factory=dict)
    preprocess: Preprocess | None = None
    labels: Sequence[str] = ()
    strict: bool = False
    quant: QuantPlan = field(default_factory=lambda: QuantPlan("fp32"))
    calibration: Iterable[Mapping[str, Array]] = ()
    by_entry: Mapping[str, Sequence[Mapping[str, Array]]] = field(default_factory=dict)
    tokenizer: Path | None = None
    device: Device | None = None

    def samples_of(self, entry: str) -> Sequence[Mapping[str, Array]]:
        """The samples of one entry."""
        return self.by_entry.get(entry, self.samples)

    def allow(self, kept: Sequence[Mapping[str, str]]) -> None:
        """Whether these operations may stay in a wider precision.

        Args:
            kept: ``module``, ``op`` and ``why`` of each.

        Raises:
            CheckFailed: none may, and there are some; names their modules.
        """
        if self.strict and kept:
            raise CheckFailed(
                f"the model does not hold in {self.precision} alone",
                value=f"{len(kept)} operations need float32",
                where=f"module {kept[0]['module'] or '(model)'} is the first",
                why=kept[0]["why"],
                fix="leave --strict away to keep these operations in float32, or bring their numbers down in the model",
                details=[f"{k['op']} in module {k['module'] or '(model)'}: {k['why']}" for k in kept],
            )


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


@dataclass(frozen=True)
class Step:
    """One operation of an artifact's graph, constants aside.

    Attributes:
        outputs, inputs: names of the tensors that it gives and reads; inputs without the constants.
        module: path of the torch module that it came from, "" if unknown. op: its kind, as in ``TraceValue``.
        fused: further modules that are part of it.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    module: str
    op: str
    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpCost:
    """One operation of an artifact's graph, and what it computes and moves; constants and padding are not counted.

    Attributes:
        name: as the artifact's own runtime calls it, so that its profiles can be joined by it.
        module: path of the torch module that it came from, "" if unknown. op: its kind, as in ``TraceValue``.
        macs: multiply-accumulates of convolutions and matrix products, both of an attention; 0 of all else.
        bytes_in, bytes_weights, bytes_out: of data, constants and results, as wide as the artifact stores them. None of
            views (a reshape); of lookups and slices what is taken.
        dtype: what it computes with: "fp32", "fp16", "w8a8" where products are of 8-bit integers, "fp8"; "int" of
            integers that stand for no floats.
        channels: numbers of each place that a result is summed over: of a convolution the input channels of its group,
            so that 1 is a depthwise one, of a matrix product its inner length. 0 where nothing is multiplied.
        fan: results that a number of the data goes into at each place: of a convolution the output channels of its
            group, of a matrix product its columns. 0 where nothing is multiplied, or where that has no meaning.
        taps: places of a convolution's kernel.
        inputs, outputs: names of the tensors that it reads, constants aside, and gives.
    """

    name: str
    module: str
    op: str
    macs: int
    bytes_in: int
    bytes_weights: int
    bytes_out: int
    dtype: str
    channels: int = 0
    fan: int = 0
    taps: int = 1
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """All that it moves."""
        return self.bytes_in + self.bytes_weights + self.bytes_out


class Runtime(Protocol):
    """An opened artifact."""

    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name."""
        ...

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """Every float tensor inside the artifact in execution order, each stored in the artifact's own dtype.

        The last values of the graph outputs' names are the outputs as computed with every tensor rounded, which
        ``run`` need not do: a runtime may fuse operations and keep more digits than the artifact asks for.

        Args:
            wanted: names of the only tensors to look at, which alone are held in memory then; all if None.
        """
        ...

    def steps(self, entry: str) -> list[Step]:
        """The operations of the graph in execution order; none where the runtime shows nothing of what is inside."""
        ...


class OneStep(ABC):
    """A runtime that shows an entry as one operation, its outputs and nothing of what is inside."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    @abstractmethod
    def run(self, entry: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Runtime``."""

    def trace(
        self, entry: str, feeds: Mapping[str, Array], wanted: Collection[str] | None = None
    ) -> Iterator[TraceValue]:
        """The outputs alone."""
        for name, value in self.run(entry, feeds).items():
            if wanted is None or name in wanted:
                yield TraceValue(name, "", "output", value)

    def steps(self, entry: str) -> list[Step]:
        """One for the whole entry."""
        spec = entry_of(self._artifact, entry)
        return [Step(tuple(t.name for t in spec.outputs), tuple(t.name for t in spec.inputs), "", "program")]


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
    #: Distributions whose versions decide what ``open`` computes, the runtime itself first.
    runtime_tools: ClassVar[tuple[str, ...]]
    #: Distributions that can run its artifacts on a device.
    device_runtimes: ClassVar[tuple[str, ...]] = ()
    #: The targets whose artifacts make up this one's bundle; empty for a target of its own.
    parts: ClassVar[tuple[str, ...]] = ()
    #: How image inputs can be laid out in an artifact, the default first.
    layouts: ClassVar[tuple[str, ...]] = (NCHW,)
    #: What can be asked of it beside precision and layout: names and their choices, the default first.
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: What the numbers were not proven with, where that is not the runtime of the device; a sentence for the user.
    unproven: ClassVar[str] = ""
    #: Largest relative L2 by precision, where that is not the one of ``core.numerics.TOLERANCES``.
    tolerances: ClassVar[Mapping[str, float]] = {}
    #: Whether operations that need it are kept in a wider precision than the one asked for, and can be refused.
    keeps_wider: ClassVar[bool] = False
    #: Whether 4-bit weights are rounded as ``quant.rounding`` does, so that biases can be corrected for it.
    rounds_as_planned: ClassVar[bool] = False
    #: Whether 8-bit data has zero points, and results are rounded too; else what weighted operations read alone.
    asymmetric: ClassVar[bool] = False
    #: Whether an fp16 artifact stores its activations in float16, so that they have to be checked rounded.
    half_activations: ClassVar[bool] = False
    #: Names of reparameterization rules that are not for it.
    leaves: ClassVar[tuple[str, ...]] = ()
    #: Whether it can take inputs of several shapes; others are made for the recipe's own shape.
    dynamic: ClassVar[bool] = False
    #: Patterns of files that a vendor's builder writes otherwise each time; all others have the same bytes.
    varies: ClassVar[tuple[str, ...]] = ()
    #: Which of ``units`` is to take all operations.
    unit: ClassVar[str] = "cpu"
    #: Entries of a decoder: one graph for any number of rows, an entry for each length of the cache, or for the whole
    #: cache alone; "" for a target that takes none.
    cache: ClassVar[Literal["", "dynamic", "buckets", "whole"]] = ""

    def tolerance(self, precision: str) -> float:
        """The largest relative L2 between an artifact of that precision and the float32 reference."""
        return self.tolerances.get(precision, TOLERANCES[precision])

    def tolerance_together(self, precision: str) -> float:
        """The same over all samples together, which is no more."""
        return min(self.tolerance(precision), TOGETHER.get(precision, math.inf))

    def unproven_of(self, options: Mapping[str, str], decoder: bool = False) -> str:
        """``unproven`` for settled options, of a decoder with its cache or of another model."""
        return self.unproven

    @abstractmethod
    def availability(self) -> Availability:
        """Whether the toolchain is here. Never raises, imports nothing heavy."""

    @abstractmethod
    def precisions(self, device: Device | None) -> tuple[str, ...]:
        """Precisions that this target can hold on ``device`` (anywhere, when None)."""

    def settle(self, options: Mapping[str, str], device: Device | None, precision: str = "") -> dict[str, str]:
        """All options with a choice for each: what was asked for, what device and precision imply, else the default.

        Args:
            precision: the one that is wanted; "" where it does not matter yet.

        Raises:
            UsageError: an option or a choice that there is none of, or that the precision cannot do with.
        """
        for name, choice in options.items():
            where = f"target {self.name}"
            if name not in self.options:
                raise unknown("option", name, self.options, where=where, fix="" if self.options else "it has none")
            if choice not in self.options[name]:
                raise unknown(f"choice of option {name}", choice, self.options[name], where=where)
        return {name: options.get(name, choices[0]) for name, choices in self.options.items()}

    def settle_decoder(
        self, settled: Mapping[str, str], asked: Mapping[str, str], device: Device | None, precision: str
    ) -> dict[str, str]:
        """Settled options for a decoder with a cache; ``asked`` are those that were not left to the target.

        Raises:
            UsageError: a decoder cannot have one of them, or the precision.
        """
        return dict(settled)

    def of_device(self, device: Device | None) -> dict[str, Any]:
        """What of a device decides how an artifact is written, beside the options; plain data."""
        return {}

    @abstractmethod
    def lower_tools(self, precision: str) -> tuple[str, ...]:
        """Distributions whose versions decide what ``lower`` writes."""

    @abstractmethod
    def lower(self, program: Program, plan: LowerPlan, out: Path) -> Artifact:
        """Write the artifact's files into the empty folder ``out``, and nothing elsewhere; the program stays as it is.

        The same program and plan give the same bytes.

        Raises:
            ConversionFailed: the converter cannot take the program; names modules. ToolchainMissing.
        """

    @abstractmethod
    def open(self, artifact: Artifact) -> Runtime:
        """A runtime on this machine. Raises ToolchainMissing."""

    def others(self, artifact: Artifact) -> Mapping[str, Runtime]:
        """Further runtimes that this machine has for the artifact, by name; ``verify`` asks them as well."""
        return {}

    def operations(self, artifact: Artifact, entry: str) -> list[OpCost]:
        """The operations of an entry's graph in execution order, constants aside; none where there is no such graph.

        Dimensions that vary are as large as the entry's inputs have them. No toolchain computes anything for it.

        Raises:
            UsageError: unknown entry, or a file that cannot be read.
        """
        return []

    def alone(self, artifact: Artifact, entry: str) -> bytes | None:
        """A program with a signature for each of ``operations``, to be timed one by one; None if the runtime profiles.

        Raises:
            UsageError: as ``operations``.
        """
        return None

    def units(self, artifact: Artifact, entry: str) -> dict[str, str]:
        """Which unit of the runtime takes each of ``operations``, by name, the wanted one as ``unit``; none if all do.

        Raises:
            UsageError: as ``operations``.
        """
        return {}

    def adopt(self, path: Path) -> Artifact | None:
        """An artifact made elsewhere, to be run as it is; None if the file is not of this target's kind.

        Raises:
            UsageError: it is of this kind, and cannot be read.
        """
        return None

    def lint(self, program: Program, device: Device | None) -> list[Finding]:
        """What in a program is known to go wrong or slow on this target; found before any conversion."""
        return []

    def package(self) -> str:
        """The pip requirement that a bundle's ``run.py`` needs beside NumPy; "" if it cannot run without EdgeAttn."""
        return ""
