"""Propose, prove, or roll back: from the training form of a model to its deploy form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgeattn.core.errors import UsageError, unknown
from edgeattn.reparam import conv_bn, guest, multi_branch, pre_bn, residual, softmax_scale
from edgeattn.reparam.block import Block, NotRunnable, Refused, Rule, Site, map_tensors
from edgeattn.reparam.measure import distance, fold, full_float32, prove, totals
from edgeattn.reparam.proof import MODEL_TOLERANCE, MODEL_TOLERANCE_FLOAT64, BlockProof, NotFused, Proof
from edgeattn.reparam.trace import Inputs, capture, duplicate, run

#: In the order in which they run: whole blocks, then branches, then what a batch norm follows, then what follows it.
RULES: tuple[Rule, ...] = (
    residual.RULE,
    guest.RULE,
    multi_branch.RULE,
    conv_bn.RULE,
    pre_bn.RULE,
    softmax_scale.RULE,
)


@dataclass(frozen=True)
class Reparameterized:
    """The deploy form, and the proof that it computes what the training form does."""

    model: nn.Module
    proof: Proof


def reparameterize(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    rules: Iterable[Rule | str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Reparameterized:
    """Fuse what can be fused, measure every fusion, and keep only those that hold.

    Each rule proposes blocks. Both forms of a block run on the activations that reach it when the model runs on
    ``inputs``, and on random ones of the same shape, in float64 and in float32. A block beyond the tolerances
    (``proof.FLOAT64_TOLERANCE``, ``proof.FLOAT32_TOLERANCE``) keeps its training form and is listed with its error.
    At the end the outputs of both models are compared; should they differ, everything is rolled back.

    Args:
        model: float32, in eval mode; it is not changed (the work is done on a copy).
        inputs: positional arguments of the model (one tensor, or a sequence), or keyword arguments (a mapping).
        rules: rules or their names, in the order in which they shall run; by default all of ``RULES``.
        seed: of the random activations, and of random numbers that the model itself may draw.
        progress: is told in a sentence what is being done.

    Returns:
        The deploy form (its own module, without added hooks, in eval mode) and the proof. If nothing could be fused
        the model is a copy of the argument and ``proof.fused`` is empty.

    Raises:
        UsageError: a module is in training mode, or a rule is unknown. What the model's forward raises passes through.
    """
    _refuse_training(model)
    arguments: Inputs = (
        inputs if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else (*inputs,)
    )
    chosen = [_rule(rule) for rule in (RULES if rules is None else rules)]
    say = progress or (lambda _: None)

    with full_float32():
        return _reparameterize(model, arguments, chosen, seed, say)


def _reparameterize(
    model: nn.Module, arguments: Inputs, rules: Sequence[Rule], seed: int, say: Callable[[str], None]
) -> Reparameterized:
    site = Site(duplicate(model), arguments, seed)
    for module in site.model.modules():
        module.training = False
    reference = run(site.model, arguments, seed)
    generator = torch.Generator().manual_seed(seed)
    fused: list[BlockProof] = []
    kept: dict[tuple[str, str], NotFused] = {}
    for rule in rules:
        say(f"reparameterize: {rule.name}")
        _apply(rule, site, generator, fused, kept)

    done = {path for block in fused for path in block.modules}
    not_fused = [entry for entry in kept.values() if entry.path not in done]
    proof = Proof(fused, not_fused, totals(model), totals(site.model), 0.0, None, seed)
    if not fused:
        return Reparameterized(site.model, proof)
    say("reparameterize: comparing the whole models")
    return _compare(model, site, rules, reference, proof)


def _apply(
    rule: Rule, site: Site, generator: torch.Generator, fused: list[BlockProof], kept: dict[tuple[str, str], NotFused]
) -> None:
    """Run one rule until it proposes nothing new: a rejected block may leave smaller ones inside it."""
    while True:
        blocks: list[Block] = []
        for proposal in rule.propose(site):
            if isinstance(proposal, NotFused):
                kept.setdefault((rule.name, proposal.path), proposal)
            elif (rule.name, proposal.path) not in site.rejected:
                blocks.append(proposal)
        if not blocks:
            return
        recorded = capture(site.model, site.inputs, {block.entry: block.cropped for block in blocks}, site.seed)
        pairs: list[tuple[nn.Module, nn.Module]] = []
        rejected = False
        for block in blocks:
            proof, reason = None, None
            try:
                deploy, proof = _prove(block, recorded.pop(block.entry, None), site, generator)
            except guest.Unchanged:
                reason = ""
            except Refused as refusal:
                reason = str(refusal)
            if proof is not None and proof.errors.holds:
                fused.append(proof)
                pairs += block.pairs(deploy)
                continue
            rejected = True
            site.rejected.add((rule.name, block.path))
            if proof is not None:
                reason = f"rolled back: the fused form does not hold, {proof.errors}"
            if reason:
                errors = None if proof is None else proof.errors
                kept[rule.name, block.path] = NotFused(block.path, rule.name, reason, errors)
        if pairs:
            site.exchange(pairs)
        if not rejected:
            return


def _prove(block: Block, sample: Any, site: Site, generator: torch.Generator) -> tuple[nn.Module, BlockProof]:
    """The proof on a crop; on the whole activation, recorded anew, for a block that does not run on a crop."""
    try:
        return prove(block, sample, generator)
    except NotRunnable:
        whole = capture(site.model, site.inputs, {block.entry: block.whole}, site.seed)
        return prove(block, whole.get(block.entry), generator)


def _compare(model: nn.Module, site: Site, rules: Sequence[Rule], reference: Any, proof: Proof) -> Reparameterized:
    """Compare the outputs of the whole models; roll everything back if they are not the same."""
    float32, float64 = distance(reference, run(site.model, site.inputs, site.seed)), None
    if float32 > MODEL_TOLERANCE:
        # Rounding that the model itself amplifies, or a real difference? float64 tells. It is slow, so only in doubt.
        float64 = _distance64(model, site, rules)
    if float32 <= MODEL_TOLERANCE or (float64 is not None and float64 <= MODEL_TOLERANCE_FLOAT64):
        return Reparameterized(site.model, replace(proof, float32=float32, float64=float64))
    reason = (
        f"rolled back: the block holds alone, but the outputs of the whole model differ by a relative L2 of "
        f"{float32:.1e} in float32 (at most {MODEL_TOLERANCE:.0e})"
    )
    undone = [NotFused(block.path, block.rule, reason, block.errors) for block in proof.fused]
    kept = replace(proof, fused=[], not_fused=[*undone, *proof.not_fused], after=proof.before, float32=0.0)
    return Reparameterized(duplicate(model), kept)


def _distance64(model: nn.Module, site: Site, rules: Sequence[Rule]) -> float | None:
    """The distance of the whole models when the accepted folds are made and kept in float64.

    The returned deploy form cannot be used for this: its kernels are rounded to float32. None if the model does not
    run in float64.
    """
    inputs = map_tensors(lambda x: x.double() if x.is_floating_point() else x, site.inputs)
    try:
        exact = Site(duplicate(model).double(), inputs, site.seed, site.rejected)
        reference = run(exact.model, inputs, site.seed)
        for rule in rules:
            pairs: list[tuple[nn.Module, nn.Module]] = []
            for block in rule.propose(exact):
                if isinstance(block, Block) and (rule.name, block.path) not in site.rejected:
                    pairs += block.pairs(fold(block, duplicate(block.before)))
            exact.exchange(pairs)
        return distance(reference, run(exact.model, inputs, site.seed))
    except (RuntimeError, Refused):
        return None


def _refuse_training(model: nn.Module) -> None:
    # Inside of a model a convolution or a container in training mode is passed over: it computes the same in both
    # modes, and guests' own methods leave new ones like that.
    inert = (_ConvNd, nn.Linear, nn.Identity)
    training = [
        path or "(model)"
        for path, module in model.named_modules()
        if module.training and not isinstance(module, inert) and type(module) not in (nn.Sequential, nn.ModuleList)
    ] or ["(model)"] * model.training
    if training:
        raise UsageError(
            "reparameterization needs a model in eval mode",
            value=f"{len(training)} modules are in training mode",
            where=training[0],
            why="in training mode batch norm uses the batch's statistics and dropout is active: nothing can be folded",
            fix="call model.eval() first",
        )


def _rule(rule: Rule | str) -> Rule:
    if isinstance(rule, Rule):
        return rule
    known = {known.name: known for known in RULES}
    if rule not in known:
        raise unknown("reparameterization rule", rule, known)
    return known[rule]
