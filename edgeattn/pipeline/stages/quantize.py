"""Quantize: what the ranges of activations are measured on, and the program made ready for small numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeattn import targets
from edgeattn.capture import Program
from edgeattn.core.errors import UsageError, closest
from edgeattn.core.numerics import Array
from edgeattn.core.specs import TensorSpec
from edgeattn.lint import Finding, gate
from edgeattn.pipeline.context import Context
from edgeattn.quant.calibration import CalibrationStream
from edgeattn.quant.correct import correct
from edgeattn.quant.coverage import coverage
from edgeattn.quant.equalize import equalize
from edgeattn.quant.plan import BITS
from edgeattn.quant.simulate import weight_errors
from edgeattn.reparam.proof import PTQ_GROWTH

#: Ranges are measured on all samples; what they do inside the model is looked at on half of them, but so many at least
#: and at most.
LOOKED_AT = (16, 32)


def looked_at(samples: int) -> int:
    """How many of so many samples."""
    least, most = LOOKED_AT
    return min(most, max(least, samples // 2))


@dataclass(frozen=True)
class Quantized:
    """The program with its ranges evened out, and calibration samples that can be gone through again and again."""

    program: Program
    samples: Iterable[Mapping[str, Array]]


def _stream(context: Context, limit: int | None = None) -> tuple[CalibrationStream, list[str]]:
    """The recipe's calibration samples, or for want of them the golden ones; and what the user should know of them.

    Args:
        limit: so many at most.
    """
    resolved, golden = context.job.resolved, [feeds for feeds, _ in context.golden()]
    # The first sample has the usual shapes; a timm model's recipe names no inputs.
    inputs = resolved.recipe.specs() or [TensorSpec(n, v.shape, str(v.dtype)) for n, v in golden[0].items()]
    spec = resolved.recipe.calibration
    if spec is not None:
        assert resolved.calibration is not None
        count = min(spec.samples, limit or spec.samples)
        spec = spec.model_copy(update={"source": resolved.calibration, "samples": count})
        return CalibrationStream.of_spec(spec, inputs, resolved.recipe.preprocess, resolved.folder), []
    data = context.results["reference"].facts["data"]
    shapes = {spec.name: spec.shape for spec in inputs}
    usual = [feeds for feeds in golden if all(value.shape == shapes[name] for name, value in feeds.items())]
    words = f"{len(usual)} golden samples ({data}), as the recipe names none: give --calibration"
    if data == "random":
        words = "random inputs, for there are no samples: ranges mean nothing for real data; give --calibration"
    return CalibrationStream.of_feeds(usual, inputs, f"golden samples ({data})"), [words]


def _outliers(proof: Mapping[str, Any]) -> list[str]:
    """What reparameterization found to be hard to quantize: a few weights that leave no resolution to the others."""
    blocks = [b for b in proof["fused"] if min(b["range_growth"] or 0, b["crest_growth"] or 0) > PTQ_GROWTH]
    if not blocks:
        return []
    blocks.sort(key=lambda b: -b["crest_growth"])
    named = ", ".join(f"{b['path']} ({b['crest_growth']:.0f} times)" for b in blocks[:4])
    return [
        f"fusing left weights that stand out more than {PTQ_GROWTH:g} times as far as before in {named}"
        f"{' …' if len(blocks) > 4 else ''}; if the numbers do not hold, --keep {blocks[0]['path']}"
    ]


def run(context: Context) -> dict[str, Any]:
    """Check the calibration samples, make the program ready; ``coverage.json`` says what data do inside the model.

    Raises:
        CheckFailed: lint found an error in the program.
        UsageError: the samples are unfit, or a module is to be kept that there is none of.
    """
    gate([Finding(**finding) for finding in context.results["lint"].facts["findings"]])
    model = context.value("reparameterize")
    names = [name for name, _ in model.named_modules() if name]
    if unused := context.job.quant.unused(names):
        near = closest(unused[0], names)
        raise UsageError(
            "the model has no such module",
            value=unused[0],
            where="modules that stay in floats",
            why=f"none of the {len(names)} modules of its deploy form fits",
            fix=f"did you mean {near!r}?" if near else "'edgeattn sensitivity' names them",
        )
    if context.job.steps:  # weights alone, whose rounding needs no samples
        context.values["quantize"] = Quantized(context.value("capture"), ())
        weights = weight_errors(model, context.job.quant)
        return {"calibration": None, "words": [], "risks": [], "entries": None, "weights": weights}
    stream, words = _stream(context)
    spec = context.job.resolved.recipe.calibration
    about = stream.describe() | ({"source": spec.source} if spec else {})  # as the recipe has it, not where it is here
    facts: dict[str, Any] = {
        "calibration": about,
        "words": [],
        "risks": _outliers(context.results["reparameterize"].facts["proof"]),
    }
    if BITS[context.job.precision][1] < 32:
        context.say("looking at the calibration samples")
        report = coverage(
            model,
            _stream(context, looked_at(about["samples"]))[0],
            context.job.quant.observer,
            used=about["samples"],
        )
        (context.out / "coverage.json").write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
        facts["coverage"] = {key: value for key, value in report.items() if key != "modules"}
        count, of = about["samples"], about["of"]
        used = f"{count} of {of}" if count < of else str(of)
        facts["words"] = [f"{used} samples of {about['source']}", *words, *report["warnings"]]
    program = _prepared(context, stream, facts)
    facts["weights"] = weight_errors(model, context.job.quant) if context.job.precision != "fp8" else []
    facts["entries"] = program.save(context.out) if program is not context.value("capture") else None
    context.values["quantize"] = Quantized(program, stream)
    return facts


def _prepared(context: Context, stream: CalibrationStream, facts: dict[str, Any]) -> Program:
    """The program with ranges evened out and biases corrected, as far as the recipe wants it and it holds."""
    job, program = context.job, context.value("capture")
    recipe, quant = job.resolved.recipe, job.resolved.recipe.quant
    assert isinstance(program, Program)
    if quant.equalize:
        context.say("evening out the ranges of channels")
        program, facts["equalized"] = equalize(program, stream)
    # At 8 bits the mean error of rounding is next to nothing, and random inputs have no means to go by.
    corrects = BITS[job.precision][0] == 4 and targets.get(job.target).rounds_as_planned
    if quant.correct and corrects and recipe.calibration:
        context.say("correcting biases")
        program, facts["corrected"] = correct(program, job.quant, stream)
    return program


def revive(context: Context) -> Quantized:
    """The program again, and the stream opened anew."""
    result = context.results["quantize"]
    entries = result.facts["entries"]
    program = Program.load(result.folder, entries) if entries else context.value("capture")
    if context.job.steps:
        return Quantized(program, ())
    return Quantized(program, _stream(context)[0])
