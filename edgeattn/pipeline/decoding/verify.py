"""Verify a decoder's artifact: its entries one by one, then a text through the cache, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edgeattn import targets
from edgeattn.bundle.decoding import session
from edgeattn.bundle.runner_generate import Session
from edgeattn.core.errors import CheckFailed
from edgeattn.core.numerics import Array, Numerics, compare
from edgeattn.core.specs import LAST, LOGITS
from edgeattn.models.decoder import as_step
from edgeattn.pipeline.context import Context
from edgeattn.pipeline.decoding.samples import Text, golden
from edgeattn.pipeline.diverge import first_divergence
from edgeattn.pipeline.stages.lower import artifact_of
from edgeattn.targets.base import Artifact, Runtime
from edgeattn.targets.feeds import own_feeds

#: Largest ratio of the artifact's perplexity on the held-out text to the reference's.
PERPLEXITY = {"fp32": 1.0005, "fp16": 1.005, "w8": 1.02, "w4": 1.10}
#: How much further off the last quarter of a long decode may be than the first.
DRIFT = 3.0
#: Every so many decoded tokens progress is shown.
SHOWN = 100
AS_RUN = "as run"
#: Random weights amplify rounding. What is more than so many times as far off as rounding alone is the target's doing.
BEYOND_ROUNDING = 2.0


@dataclass(frozen=True)
class _Bounds:
    """Largest relative L2, and largest ratio of perplexities."""

    precision: str
    l2: float
    perplexity: float


def _fail(bounds: _Bounds, value: str, where: str, why: str, fix: str = "") -> CheckFailed:
    fix = fix or ("compare with --precision fp32" if bounds.precision != "fp32" else "'edgeattn export --target null'")
    return CheckFailed("the artifact's numbers do not hold", value=value, where=where, why=why, fix=fix)


def _entries(
    context: Context, runtime: Runtime, artifact: Artifact, text: Text, bounds: _Bounds, warnings: list[str]
) -> tuple[dict[str, Any], _Bounds]:
    """Numerics by golden sample and output, and the bounds, wider where random weights amplify rounding.

    Raises:
        CheckFailed: an output is further from the reference than the tolerance.
    """
    numerics: dict[str, dict[str, Numerics]] = {}
    for sample in golden(text, context.job.steps):
        entry = artifact.entries[sample.entry]
        outputs = runtime.run(sample.entry, own_feeds(entry.inputs, sample.feeds))
        # A runtime that keeps the cache itself may give the rows that it wrote, though its entry does not.
        names = {t.name for t in entry.outputs} | set(outputs)
        numerics[sample.name] = {k: compare(v, outputs[k]) for k, v in sample.reference.items() if k in names}
    failed = _failed(numerics, bounds)
    if failed and (alone := _rounding_alone(context, text) * BEYOND_ROUNDING) > bounds.l2:
        warnings.append(
            f"the weights are random, and amplify rounding: rounding alone, in PyTorch, is "
            f"{alone / BEYOND_ROUNDING:.2g} off; the artifact was held to {BEYOND_ROUNDING:g} times that. It says "
            "nothing of a trained model"
        )
        bounds = replace(bounds, l2=alone)
        failed = _failed(numerics, bounds)
    if failed:
        # Rows of layer i come before everything of layer i + 1, and logits last: the first that is off is the first.
        order = {name: i for i, name in enumerate((*context.results["reference"].facts["outputs"][1:], LOGITS))}
        name, output, worst = min(failed, key=lambda f: order[f[1]])
        context.say("the numbers do not hold; looking for the module at which they diverge first")
        sample = next(s for s in golden(text, context.job.steps) if s.name == name)
        inputs = artifact.entries[sample.entry].inputs
        form = partial(as_step, with_last=LAST in sample.feeds)
        raise _fail(
            bounds,
            f"{output} of {name}: relative L2 {worst.relative_l2:.3g}, {worst.nonfinite} values not finite",
            first_divergence(context, runtime, inputs, sample.feeds, sample.entry, form),
            f"tolerance is a relative L2 of {bounds.l2:g} for {bounds.precision}",
        )
    plain = {f"{name} {AS_RUN}": {k: n.as_dict() for k, n in found.items()} for name, found in numerics.items()}
    return plain, bounds


def _failed(numerics: Mapping[str, Mapping[str, Numerics]], bounds: _Bounds) -> list[tuple[str, str, Numerics]]:
    """Sample, output and figures of what is beyond the tolerance."""
    items = [(sample, name, n) for sample, found in numerics.items() for name, n in found.items()]
    return [item for item in items if not item[2].holds(bounds.l2)]


def _rounding_alone(context: Context, text: Text) -> float:
    """Of a quantized model of random weights, see ``simulate.rounding_alone``; 0 for all others."""
    job = context.job
    if not (job.resolved.random_weights and job.quant.quantizes):
        return 0.0
    from edgeattn.pipeline.decoding.simulate import rounding_alone

    context.say("the weights are random: rounding them in PyTorch, to see what that alone does")
    return rounding_alone(context.value("reparameterize"), job.quant, text)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _over_text(context: Context, text: Text, one: Session, prefilled: int, bounds: _Bounds) -> tuple[Array, Array]:
    """Teacher-forced: positions (M,) after the prefill, and the artifact's logits (M, V) there.

    Raises:
        CheckFailed: logits of any position are not finite.
    """
    wanted, found = {int(i) for i in text.at if i >= prefilled - 1}, {}
    logits = one.feed(text.ids[:prefilled])
    for position in range(prefilled - 1, len(text.ids)):
        if position >= prefilled:
            logits = one.feed(text.ids[position : position + 1])
        if wrong := int(np.count_nonzero(~np.isfinite(logits))):
            raise _fail(
                bounds,
                f"{wrong} of {logits.size} logits are not finite",
                f"held-out text, decoded with the cache, position {position}",
                "no token can be chosen from them",
            )
        if position in wanted:
            found[position] = logits
        if position % SHOWN == 0:
            context.say(f"decoding the text, token {position} of {len(text.ids)}")
    return np.array(sorted(found)), np.stack([found[i] for i in sorted(found)])


def text_measures(text: Text, at: Array, logits: Array) -> dict[str, Any]:
    """KL, top-1 agreement and perplexities of logits (M, V) at positions (M,), as a whole and by eighths of the text.

    KL is KL(reference || artifact) in nats. Perplexities are over the positions whose next token the text has.
    """
    rows = np.searchsorted(text.at, at)
    reference = text.logits[rows]
    ours, theirs = _log_softmax(logits), _log_softmax(reference)
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    same = reference.argmax(-1) == logits.argmax(-1)
    off = np.linalg.norm((logits - reference).astype(np.float64), axis=-1) / np.linalg.norm(reference, axis=-1)
    has_next = at + 1 < len(text.ids)
    nexts = text.ids[at[has_next] + 1]
    each = [-lp[has_next][np.arange(len(nexts)), nexts].mean() for lp in (theirs, ours)]
    parts = [
        {
            "from": int(at[part[0]]),
            "to": int(at[part[-1]]),
            "kl": float(kl[part].mean()),
            "top1_agreement": float(same[part].mean()),
            "relative_l2": float(np.sqrt(np.square(off[part]).mean())),
        }
        for part in np.array_split(np.arange(len(at)), min(8, len(at)))
    ]
    return {
        "positions": len(at),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float(same.mean()),
        "relative_l2": float(np.sqrt(np.square(off).mean())),
        "perplexity_reference": float(np.exp(each[0])),
        "perplexity": float(np.exp(each[1])),
        "perplexity_ratio": float(np.exp(each[1] - each[0])),
        "by_position": parts,
    }


def _check_text(measured: Mapping[str, Any], bounds: _Bounds) -> None:
    if measured["perplexity_ratio"] > bounds.perplexity:
        raise _fail(
            bounds,
            f"perplexity {measured['perplexity']:.4g}, the reference's is {measured['perplexity_reference']:.4g}",
            "held-out text, decoded with the cache",
            f"the ratio {measured['perplexity_ratio']:.4f} is more than {bounds.perplexity:g} for {bounds.precision}",
        )
    if measured["relative_l2"] > bounds.l2:
        raise _fail(
            bounds,
            f"logits over the text: relative L2 {measured['relative_l2']:.3g}",
            "held-out text, decoded with the cache",
            f"tolerance is {bounds.l2:g} for {bounds.precision}",
        )
    quarters = [part["relative_l2"] for part in measured["by_position"]]
    first, last = np.mean(quarters[: max(1, len(quarters) // 4)]), np.mean(quarters[-max(1, len(quarters) // 4) :])
    if last > max(DRIFT * first, bounds.l2 / 10):
        raise _fail(
            bounds,
            f"relative L2 {last:.3g} in the last quarter, {first:.3g} in the first",
            "held-out text, decoded with the cache",
            "errors grow from step to step: what is written to the cache is not what is read from it",
        )


def _check_prefill(text: Text, one: Session, prefilled: int, at: Array, logits: Array, bounds: _Bounds) -> float:
    """Relative L2 between a prefill with tokens decoded after it, and all of them prefilled."""
    behind = np.flatnonzero(at >= prefilled)
    near = behind[at[behind] < 2 * prefilled]
    after = near[-1] if len(near) else behind[0]  # of a large vocabulary there may be none so soon
    one.reset()
    whole = one.feed(text.ids[: at[after] + 1])
    found = compare(logits[after], whole)
    if not found.holds(bounds.l2):
        raise _fail(
            bounds,
            f"relative L2 {found.relative_l2:.3g}, {found.nonfinite} values not finite, at position {at[after]}",
            "prefill and decode",
            f"{prefilled} tokens prefilled and the others decoded must give what a longer prefill gives, within "
            f"{bounds.l2:g}",
        )
    return found.relative_l2


def _check_greedy(text: Text, one: Session, bounds: _Bounds) -> int:
    """How many tokens of the reference's greedy continuation the artifact gives before another one."""
    one.reset()
    logits, same = one.feed(text.prompt), 0
    for wanted in text.greedy:
        if int(logits.argmax()) != int(wanted):
            break
        same += 1
        if same < len(text.greedy):
            logits = one.feed(np.array([wanted]))
    if bounds.precision == "fp32" and same < len(text.greedy):
        raise _fail(
            bounds,
            f"{same} of {len(text.greedy)} tokens",
            "greedy continuation",
            "in float32 all of them must be the reference's",
        )
    return same


def run(context: Context) -> dict[str, Any]:
    """Facts: tolerance, numerics by sample, and what the text showed.

    Raises:
        CheckFailed: an entry, the perplexity, the drift over the steps, prefill against decode, or the greedy
            continuation does not hold.
    """
    job = context.job
    target = targets.get(job.target)
    artifact = artifact_of(context.results["lower"], job.precision)
    runtime, facts = target.open(artifact), context.results["reference"].facts
    text = Text.load(context.results["reference"].folder)
    tolerance = target.tolerance(job.precision) if job.tolerance is None else job.tolerance
    bounds = _Bounds(job.precision, tolerance, PERPLEXITY[job.precision])
    warnings: list[str] = []
    numerics, bounds = _entries(context, runtime, artifact, text, bounds, warnings)
    spec = job.resolved.recipe.decoder
    assert spec is not None
    one = session(runtime, artifact, facts["decoder"])
    prefilled = min(spec.prefill[-1], spec.context // 2)
    at, logits = _over_text(context, text, one, prefilled, bounds)
    measured = text_measures(text, at, logits)
    _check_text(measured, bounds)
    measured["data"], measured["steps"] = facts["data"], len(text.ids) - prefilled
    measured["prefill_against_decode"] = _check_prefill(text, one, prefilled, at, logits, bounds)
    measured["greedy"] = {"same": _check_greedy(text, one, bounds), "of": len(text.greedy)}
    measured["cache_bytes"] = one.cache_bytes
    measured["bound"] = bounds.perplexity
    return {
        "tolerance": bounds.l2,
        "numerics": numerics,
        "task": None,
        "warnings": warnings,
        "decoder": measured,
    }
