"""``edgeattn debug``: two programs of one model, found by what the user calls them, and where they part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeattn import targets
from edgeattn.bundle import Bundle
from edgeattn.core.errors import CheckFailed, UsageError, unknown
from edgeattn.core.numerics import TOLERANCES, Array, Numerics, compare
from edgeattn.pipeline.causes import Cause, explain
from edgeattn.pipeline.diverge import compare_sides
from edgeattn.pipeline.meeting import Comparison, Met
from edgeattn.pipeline.sides import ArtifactSide, Side, TorchSide
from edgeattn.targets.base import NHWC, Artifact, Tensor

#: Forms of a model in PyTorch, the default first.
FORMS = ("training", "deploy")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A program that the user named.

    Attributes:
        bundle: with samples, if it is one. random: inputs of the recipe, if it is a model in PyTorch.
        notes: what is to be known of it, in sentences.
    """

    side: Side
    tolerance: float
    bundle: Bundle | None = None
    artifact: Artifact | None = None
    random: Mapping[str, Array] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extent:
    """Range and state of a tensor.

    Attributes:
        low, high: over the finite values. nonfinite: how many are not.
        ends: share of the values that are exactly at the lowest or the highest, zeros aside: saturation if it is not
            small.
    """

    low: float
    high: float
    nonfinite: int
    ends: float

    @staticmethod
    def of(value: Array) -> Extent:
        """Of any real tensor."""
        finite = value[np.isfinite(value)].astype(np.float64)
        if not finite.size:
            return Extent(math.nan, math.nan, int(value.size), 0.0)
        low, high = float(finite.min()), float(finite.max())
        counts = [int(np.count_nonzero(finite == end)) for end in {low, high} if end]
        ends = sum(count for count in counts if count > 1) / finite.size
        return Extent(low, high, int(value.size - finite.size), ends)


@dataclass
class Debugged:
    """What was found.

    Attributes:
        a, b: words for the programs. sample: which inputs were used, in words.
        outputs: distance of B's outputs from A's.
        holds: they agree within ``tolerance``.
        comparison: module by module, of a model in PyTorch with another program, where there is one.
        cause: of the first divergence. extents: the ranges of both sides there. sides: words for these two.
        notes: what else is to be known.
    """

    a: str
    b: str
    sample: str
    tolerance: float
    outputs: dict[str, Numerics]
    holds: bool
    comparison: Comparison
    cause: Cause | None = None
    extents: tuple[Extent, Extent] | None = None
    sides: tuple[str, str] = ("", "")
    notes: list[str] = field(default_factory=list)

    @property
    def first(self) -> Met | None:
        """The place at which they part, if a single one could be named."""
        return None if self.comparison.first is None else self.comparison.met[self.comparison.first]

    @property
    def others(self) -> list[str]:
        """Further modules whose operations may be to blame, as B has fused them with the one that is named."""
        named = self.comparison.culprit
        frames = self.first.frames if self.first is not None else ()
        return list(dict.fromkeys(f.path or "(model)" for f in frames if f.path != named))


def debug(
    a: str,
    b: str,
    *,
    inputs: Sequence[str] = (),
    checkpoint: str | None = None,
    args: Mapping[str, Any] | None = None,
    feeds: Mapping[str, Array] | None = None,
    tolerance: float | None = None,
    witness: str | None = None,
    say: Say = lambda text: None,
) -> Debugged:
    """Compare two programs of one model and name the first module at which they part.

    Args:
        a, b: each ``MODEL``, ``MODEL@training`` or ``MODEL@deploy`` (a recipe's name or file, package.module:factory,
            file.py:factory, timm:NAME); a bundle's folder, or ``FOLDER@BACKEND`` for one of its artifacts; a file made
            by a target (.onnx, .tflite, .mlpackage). Errors are relative to A.
        inputs, checkpoint, args: of a model from outside, as for an export.
        feeds: the model's inputs by name; else a bundle's golden samples, else random ones.
        tolerance: largest relative L2 of what is the same; that of the wider of the two precisions without it.
        witness: where neither is a model in PyTorch, the one that both were made of: it tells which of them is wrong.

    Raises:
        UsageError: a program or an input that cannot be found, or programs of different inputs or outputs.
        ToolchainMissing: a runtime is not installed.
    """
    opened = []
    for text in (a, b):
        say(f"opening {text}")
        opened.append(_open(text, inputs, checkpoint, args or {}, say))
    limit = tolerance if tolerance is not None else max(one.tolerance for one in opened)
    sides = [one.side for one in opened]
    notes = [note for one in opened for note in one.notes]
    chosen: tuple[str, dict[str, Array], dict[str, Numerics]] | None = None
    for words, given in _samples(opened, feeds):
        say(f"running both on {words}")
        outputs = _outputs(sides, given)
        if chosen is None or not all(n.holds(limit) for n in outputs.values()):
            chosen = words, given, outputs
        if not all(n.holds(limit) for n in outputs.values()):
            break
    if chosen is None:
        raise UsageError("there are no samples to run", value=f"{a}, {b}", fix="give --input-file NAME=FILE.npy")
    words, given, outputs = chosen
    say("comparing module by module")
    turned = isinstance(sides[1], TorchSide) and not isinstance(sides[0], TorchSide)
    pairs = [("", sides[1], sides[0]) if turned else ("", sides[0], sides[1])]
    if witness is not None and not any(isinstance(side, TorchSide) for side in sides):
        model = _open(witness, inputs, checkpoint, args or {}, say).side
        pairs = [(side.words, model, side) for side in reversed(sides)]
    for off, first, second in pairs:
        found = compare_sides(first, second, given, limit)
        if found.first is not None:
            notes += [f"of the two it is {off} that is not what {witness} computes"] if off else []
            break
    holds = all(n.holds(limit) for n in outputs.values())
    done = Debugged(a, b, words, limit, outputs, holds, found, notes=notes)
    if found.first is not None and (met := done.first) is not None:
        say(f"looking for the cause in {found.culprit or 'the model'}")
        done.cause = explain(met, limit)
        if met.reference is not None and met.actual is not None:
            pair = Extent.of(met.reference), Extent.of(met.actual)
            done.extents, done.sides = pair, (first.words, second.words)
    done.notes += _marked(opened, given, limit)
    return done


def _outputs(sides: Sequence[Side], feeds: Mapping[str, Array]) -> dict[str, Numerics]:
    """Distances by the name that A has for an output; where the names differ they are taken in order.

    Raises:
        UsageError: the outputs are of other numbers or shapes.
    """
    ours, theirs = (side.run(feeds) for side in sides)
    names = dict(zip(ours, ours, strict=True)) if set(ours) == set(theirs) else dict(zip(ours, theirs, strict=False))
    shapes = [", ".join(f"{k} {v.shape}" for k, v in outputs.items()) for outputs in (ours, theirs)]
    if len(ours) != len(theirs) or any(ours[k].size != theirs[n].size for k, n in names.items()):
        words = f"{sides[0].words} has {shapes[0]}"
        raise UsageError("these are not programs of one model", value=shapes[1], why=words)
    return {k: compare(ours[k], theirs[n].reshape(ours[k].shape)) for k, n in names.items()}


def _marked(opened: Sequence[Opened], feeds: Mapping[str, Array], limit: float) -> list[str]:
    """Whether looking at inner tensors changed a program's own outputs: its runtime fuses operations otherwise."""
    notes = []
    for one in opened:
        if one.artifact is None or not isinstance(one.side, ArtifactSide):
            continue
        plain = one.side.run(feeds)
        for item in one.side.values(feeds, one.side.outputs):
            if item.name in plain and item.value.shape == plain[item.name].shape:
                off = compare(plain[item.name], item.value).relative_l2
                if off > limit / 10:
                    notes.append(
                        f"{one.side.words}: looking at its tensors changed {item.name} by {off:.2g}: as it is run, "
                        "the runtime fuses operations or computes them with other kernels"
                    )
    return notes


def _open(text: str, inputs: Sequence[str], checkpoint: str | None, args: Mapping[str, Any], say: Say) -> Opened:
    """The program of that name.

    Raises:
        UsageError: there is none.
    """
    path = Path(text)
    for target in map(targets.get, targets.names()) if path.exists() else ():
        artifact = target.adopt(path)
        if artifact is not None:
            return _file(text, target.name, artifact)
    name, _, choice = text.rpartition("@") if "@" in text else (text, "", "")
    folder = Path(name)
    if folder.is_dir() and ((folder / "manifest.json").is_file() or not choice):
        return _bundle(text, Bundle.open(folder), choice)
    if choice and choice not in FORMS:
        raise unknown("form of a model", choice, FORMS, where=text)
    if path.suffix in (".onnx", ".tflite", ".mlpackage"):
        raise UsageError("there is no such file", value=text, fix="correct the path")
    return _model(text, name, choice or FORMS[0], inputs, checkpoint, args, say)


def _side(words: str, backend: str, artifact: Artifact) -> ArtifactSide:
    entry = "main" if "main" in artifact.entries else next(iter(artifact.entries))
    spec = artifact.entries[entry]
    return ArtifactSide(words, targets.get(backend).open(artifact), spec.inputs, [t.name for t in spec.outputs], entry)


def _file(text: str, backend: str, artifact: Artifact) -> Opened:
    """A file; its precision is the one that EdgeAttn noted in it, else what its operations look like."""
    side = _side(text, backend, artifact)
    precision = artifact.precision
    notes: tuple[str, ...] = ()
    if not precision:
        quantized = any("quantize" in step.op.lower() for step in side.steps)
        precision = "w8a8" if quantized else "fp32"
        notes = (f"{text}: taken for {precision}, as the file does not say it; --tolerance sets another limit",)
    return Opened(side, targets.get(backend).tolerance(precision), None, artifact, notes=notes)


def _bundle(text: str, bundle: Bundle, backend: str) -> Opened:
    artifact = bundle.artifact(backend or None)
    name = backend or bundle.manifest.backend
    notes = []
    try:
        bundle.check_files()
    except CheckFailed as error:
        notes.append(f"{text} is not as it was exported: {'; '.join(error.details[:3])}")
    target = targets.get(name)
    tolerance = target.tolerance(bundle.manifest.precision)
    return Opened(_side(text, name, artifact), tolerance, bundle, artifact, notes=tuple(notes))


def _model(
    text: str,
    name: str,
    form: str,
    inputs: Sequence[str],
    checkpoint: str | None,
    args: Mapping[str, Any],
    say: Say,
) -> Opened:
    from edgeattn import recipe
    from edgeattn.models.build import build
    from edgeattn.reparam import reparameterize

    resolved = recipe.resolve(name, inputs=inputs, checkpoint=Path(checkpoint) if checkpoint else None, args=args)
    built = build(resolved)
    model, example = built.model, built.random_inputs(resolved.recipe.seed)
    if form == "deploy":
        say(f"bringing {name} to its deploy form")
        model = reparameterize(model, tuple(example.values()), seed=resolved.recipe.seed).model
    specs = [Tensor(spec.name, spec.shape, spec.dtype) for spec in built.specs]
    notes = (f"{text}: its weights are random, no checkpoint was given",) if resolved.random_weights else ()
    side = TorchSide(text, model, specs, tuple(resolved.recipe.outputs))
    random = {name: value.numpy() for name, value in example.items()}
    return Opened(side, TOLERANCES["fp32"], random=random, notes=notes)


def _samples(opened: Sequence[Opened], feeds: Mapping[str, Array] | None) -> Iterator[tuple[str, dict[str, Array]]]:
    """Inputs of the model, and what they are in words.

    Raises:
        UsageError: the programs have other inputs than given, or than each other.
    """
    names = [{spec.name for spec in one.side.inputs} for one in opened]
    if names[0] != names[1]:
        raise UsageError(
            "the inputs of both programs have other names",
            value=", ".join(sorted(names[1])),
            why=f"{opened[0].side.words} has {', '.join(sorted(names[0]))}",
            fix="compare programs of one model; the names are those of its recipe",
        )
    if feeds is not None:
        if set(feeds) != names[0]:
            raise UsageError(
                "the inputs do not match", value=", ".join(feeds), why=f"wanted are {', '.join(sorted(names[0]))}"
            )
        yield "the given inputs", dict(feeds)
        return
    for one in opened:
        if one.bundle is not None and one.artifact is not None:
            entry = one.artifact.entries["main"]
            for file, which, given, _ in one.bundle.golden():
                if which == "main":
                    yield (
                        f"{file} of {one.bundle.path}",
                        {spec.name: _of_the_model(spec, given[spec.name]) for spec in entry.inputs},
                    )
            return
    random = next((one.random for one in opened if one.random is not None), None)
    if random is not None:
        yield "random inputs of the recipe", dict(random)
        return
    generator = np.random.Generator(np.random.PCG64(0))
    made: dict[str, Array] = {}
    for spec in opened[0].side.inputs:
        whole = np.dtype(spec.dtype).kind in "iub"
        values = generator.integers(0, 2, spec.shape) if whole else generator.standard_normal(spec.shape)
        made[spec.name] = _of_the_model(spec, values.astype(spec.dtype))
    yield "random inputs", made


def _of_the_model(spec: Tensor, value: Array) -> Array:
    """The inverse of ``targets.base.own_feeds``: what the model takes for what an artifact does."""
    if spec.pixels:
        factor, offset = (np.array(part).reshape(1, -1, 1, 1) for part in zip(*spec.pixels, strict=True))
        value = (value.astype(np.float64) * factor + offset).astype(np.float32)
    if spec.layout == NHWC:
        value = np.ascontiguousarray(value.transpose(0, 3, 1, 2))
    return value.astype(np.float32) if value.dtype == np.float16 else value
