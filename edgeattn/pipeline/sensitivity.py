"""Sensitivity of a job's model: which module loses the accuracy when it is quantized, and what to keep in floats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeattn.core.errors import UsageError
from edgeattn.core.hashing import sha256_data, sha256_sources
from edgeattn.pipeline.cache import Cache, Record
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.run import Progress, run_plan
from edgeattn.pipeline.stages import PACKAGE
from edgeattn.pipeline.supervisor import Supervisor
from edgeattn.quant.plan import BITS
from edgeattn.quant.sensitivity import Error

#: What can be rounded: the weights of modules and the data that they multiply; or the data of all other operations.
WHAT = ("modules", "operations")
#: Samples that errors are measured on, unless more are asked for.
ON = 32
#: A channel that is so many times as loud as the median is named in the advice.
_LOUD = 8.0


@dataclass(frozen=True)
class Sensitivity:
    """What was found.

    Attributes:
        title: of the recipe. random: its weights are, and the ranking means nothing for trained ones.
        rows: plain data of ``quant.sensitivity.Row``, the worst first.
        kept: for counts of the worst that stay in floats, what is left of the error and whether it ``holds``.
        tolerance: largest relative L2 that holds. samples, judged: what rows and ``kept`` were measured on, in words.
        known: rows that an earlier run had measured. evened: tensors that evening out ranges and correcting biases
            changed before ``kept`` was measured, as in an export. loud: by module, how many times as loud as the
            median the loudest channel that it makes is.
    """

    title: str
    random: bool
    target: str
    precision: str
    what: str
    rows: list[dict[str, Any]]
    kept: list[dict[str, Any]]
    tolerance: float
    samples: str
    judged: str
    known: int
    evened: int
    loud: Mapping[str, float]

    @property
    def keep(self) -> list[str]:
        """The modules that have to stay in floats so that the rest holds, as measured."""
        return [row["name"] for row in self.rows[: self.kept[-1]["count"]]] if self.kept else []

    def why(self) -> str:
        """What speaks for ``keep``, in a sentence for the recipe."""
        before, after = self.kept[0]["error"], self.kept[-1]["error"]
        words = (
            f"edgeattn sensitivity: relative L2 {_figure(before)} with all quantized, {_figure(after)} without these"
        )
        if before["samples"]:
            gains = [Error.from_dict(error).gain for error in (before, after)]
            words += f"; top-1 {gains[0]:+.1%} and {gains[1]:+.1%}"
        loud = [
            f"{name} makes a channel {self.loud[name]:.0f} times as loud as the median"
            for name in self.keep
            if self.loud.get(name, 1.0) > _LOUD
        ]
        return "; ".join([words, *loud[:2]])

    def toml(self) -> str:
        """``keep`` as an entry of a recipe, to be pasted; "" where nothing has to be kept."""
        if not self.keep:
            return ""
        lines = [
            "[[quant.keep]]",
            f"modules = {json.dumps(self.keep)}",
            f"precisions = {json.dumps([self.precision])}",
            f"targets = {json.dumps([self.target])}",
            f"why = {json.dumps(self.why())}",
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return vars(self) | {"loud": dict(self.loud), "keep": self.keep, "toml": self.toml()}


def _figure(error: Mapping[str, Any]) -> str:
    if error["nonfinite"] or error["relative_l2"] is None:
        return "not finite"
    return f"{error['relative_l2']:.2g}"


def _loud(quantize: Record) -> dict[str, float]:
    """Of the modules, where data are quantized too and hence were looked at."""
    if "coverage.json" not in quantize.files:
        return {}
    report = json.loads((quantize.folder / "coverage.json").read_text(encoding="utf-8"))
    return {facts["module"]: facts["channel_ratio"] for facts in report["modules"]}


def find_sensitivity(job: Job, progress: Progress, what: str = WHAT[0], on: int = ON) -> Sensitivity:
    """Measure each module of a job's model quantized alone, and all but it, by simulation in torch.

    Each finished row is kept in the cache: a run that was killed goes on where it stopped.

    Args:
        job: of a precision that quantizes; of a target that makes several artifacts, the first one counts.
        what: one of ``WHAT``. on: samples that errors are measured on.

    Raises:
        UsageError: nothing is quantized, or the model is exported with a cache.
        CheckFailed: the plan leaves nothing to quantize.
        ConversionFailed: the model cannot be built or captured.
    """
    if not job.quant.quantizes:
        raise UsageError(
            "nothing is quantized",
            value=job.precision,
            where="--precision",
            why="sensitivity is to quantization",
            fix=f"--precision {', '.join(BITS)}",
        )
    if job.resolved.recipe.decoder is not None:
        raise UsageError(
            "the modules of a decoder with a cache are not ranked",
            value=job.resolved.recipe.name,
            where="decoder",
            why="errors are measured on one forward, and a decoder's are of a text",
            fix="rank it as one forward: a copy of the recipe without [decoder]",
        )
    job, cache = job.parts[0], Cache.default()
    done = run_plan(job, cache, progress, upto="quantize")
    quantize = done.records["quantize"]
    key = sha256_data(
        {
            "quantize": quantize.key,
            "target": job.target,
            "samples": quantize.facts["calibration"]["sha256"],
            "code": sha256_sources(PACKAGE, ("core", "quant", "reparam", "pipeline/stages/sensitivity.py")),
            "on": on,
            "what": what,
        }
    )
    journal = cache.root / "sensitivity" / f"{key}.jsonl"
    results = {name: {"folder": str(r.folder), "facts": r.facts} for name, r in done.records.items()}
    results["asked"] = {"folder": str(cache.root), "facts": {"on": on, "what": what, "journal": str(journal)}}
    progress.start("sensitivity")
    with Supervisor(cache.root / "logs", cache.scratch()) as supervisor:
        scratch = cache.scratch()
        try:
            facts, seconds, peak = supervisor.run("sensitivity", job, scratch, results, progress.say)
        finally:
            cache.discard(scratch)
    progress.done("sensitivity", seconds, peak, False)
    resolved = job.resolved
    about = (resolved.title, resolved.random_weights, job.target, job.precision, what)
    return Sensitivity(*about, **facts, loud=_loud(quantize))
