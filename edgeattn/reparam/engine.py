"""Propose, prove, or roll back: from the training form of a model to its deploy form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgeattn.core.errors import UsageError, unknown
from edgeattn.reparam import conv_bn, guest, mla, multi_branch, pre_bn, residual, shared_conv, softmax_scale
from edgeattn.reparam.block import Block, NotRunnable, Refused, Rule, Site, map_tensors
from edgeattn.reparam.measure import distance, fold, full_float32, prove, totals
from edgeattn.reparam.proof import MODEL_TOLERANCE, MODEL_TOLERANCE_FLOAT64, BlockProof, NotFused, Proof
from edgeattn.reparam.trace import Inputs, capture, duplicate, run, watched

#: In the order in which they run: whole blocks, then branches, then what a batch norm follows, then what follows it.
RULES: tuple[Rule, ...] = (
    residual.RULE,
    guest.RULE,
    multi_branch.RULE,
    conv_bn.RULE,
    pre_bn.RULE,
    softmax_scale.RULE,
    mla.RULE,
    shared_conv.RULE,
)


#: A fused form that holds on its own: its proof, and the (old, new) modules to exchange.
_Made = tuple[BlockProof, list[tuple[nn.Module, nn.Module]]]


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
    shared: bool = False,
) -> Reparameterized:
    """Fuse what can be fused, measure every fusion, and keep only those that hold.

    Each rule proposes blocks. Both forms of a block run on the activations that reach it when the model runs on
    ``inputs``, and on random ones of the same shape, in float64 and in float32. A block beyond the tolerances
    (``proof.FLOAT64_TOLERANCE``, ``proof.FLOAT32_TOLERANCE``) keeps its training form and is listed with its error.
    The model must run with the fused blocks, and with them only; at the end the outputs of both models are compared,
    and should they differ, rules are rolled back from the last one until they agree.

    Args:
        model: float32, in eval mode; it is not changed (the work is done on a copy).
        inputs: positional arguments of the model (one tensor, or a sequence), or keyword arguments (a mapping).
        rules: rules or their names, in the order in which they shall run; by default all of ``RULES``.
        seed: of the random activations, and of random numbers that the model itself may draw.
        progress: is told in a sentence what is being done.
        shared: the deploy form has the parameters of the argument where nothing was folded into them; for a large
            model two copies do not fit in memory.

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
        return _reparameterize(model, arguments, chosen, seed, say, shared)


def _reparameterize(
    model: nn.Module, arguments: Inputs, rules: Sequence[Rule], seed: int, say: Callable[[str], None], shared: bool
) -> Reparameterized:
    # Rules fold copies of blocks and exchange modules; no parameter of the model itself is ever written to.
    site = Site(duplicate(model, shared=shared), arguments, seed, shared=shared)
    for module in site.model.modules():
        module.training = False
    reference = run(site.model, arguments, seed)
    generator = torch.Generator().manual_seed(seed)
    fused: list[BlockProof] = []
    kept: dict[tuple[str, str], NotFused] = {}
    for rule in rules:
        say(f"reparameterize: {rule.name}")
        _apply(rule, site, generator, fused, kept, last=rule is rules[-1])

    done = {path for block in fused for path in block.modules}
    not_fused = [entry for entry in kept.values() if entry.path not in done]
    proof = Proof(fused, not_fused, totals(model), totals(site.model), 0.0, None, seed)
    if not fused:
        return Reparameterized(site.model, proof)
    say("reparameterize: comparing the whole models")
    return _compare(model, site, rules, reference, proof, say)


def _apply(
    rule: Rule,
    site: Site,
    generator: torch.Generator,
    fused: list[BlockProof],
    kept: dict[tuple[str, str], NotFused],
    *,
    last: bool,
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
        made: list[_Made] = []
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
                made.append((proof, block.pairs(deploy)))
                continue
            rejected = True
            site.rejected.add((rule.name, block.path))
            if proof is not None:
                reason = f"rolled back: the fused form does not hold, {proof.errors}"
            if reason:
                errors = None if proof is None else proof.errors
                kept[rule.name, block.path] = NotFused(block.path, rule.name, reason, errors)
        for proof, reason in _install(site, made, fused, last):
            rejected = True
            site.rejected.add((rule.name, proof.path))
            kept[rule.name, proof.path] = NotFused(proof.path, rule.name, f"rolled back: {reason}", proof.errors)
        if not rejected:
            return


def _install(
    site: Site, made: Sequence[_Made], fused: list[BlockProof], last: bool
) -> Iterator[tuple[BlockProof, str]]:
    """Put the fused forms into the model, and see that it runs with them and with them only.

    A block that holds on its own may still not fit its model: the forward reads an attribute of a module that is gone
    (``bn.eps``, ``bn.weight.dtype``), or calls the old modules through a list that is not part of the module tree.

    Yields:
        What was undone, and why. The proofs of all others are appended to ``fused``.
    """
    if not made:
        return
    names = site.paths
    undo = site.exchange(pair for _, pairs in made for pair in pairs)
    try:
        with watched(module for _, pairs in made for pair in pairs for module in pair) as called:
            _ = site.outputs if last else site.record  # the forward that comes next in any case costs nothing more
    except Exception as error:  # whatever a guest's forward raises
        undo()
        if len(made) == 1:
            yield made[0][0], f"with it the forward of the model raises {type(error).__name__}: {error}"
            return
        half = len(made) // 2
        yield from _install(site, made[:half], fused, last)
        yield from _install(site, made[half:], fused, last)
        return

    good: list[_Made] = []
    bad: list[tuple[BlockProof, str]] = []
    for proof, pairs in made:
        old = [names[module] for module, _ in pairs if module in called]
        scripted = torch.jit.ScriptModule  # takes no hooks: its calls are not seen
        unused = [names[module] for module, new in pairs if not (new in called or isinstance(new, scripted))]
        if old:
            bad.append((proof, f"the model still calls the old {', '.join(old)}, held in a list or another attribute"))
        elif unused:
            bad.append((proof, f"the model does not call what replaces {', '.join(unused)}"))
        else:
            good.append((proof, pairs))
    if not bad:
        fused.extend(proof for proof, _ in made)
        return
    undo()
    yield from bad
    yield from _install(site, good, fused, last)


def _prove(block: Block, sample: Any, site: Site, generator: torch.Generator) -> tuple[nn.Module, BlockProof]:
    """The proof on a crop; on the whole activation, recorded anew, for a block that does not run on a crop."""
    try:
        return prove(block, sample, generator)
    except NotRunnable:
        whole = capture(site.model, site.inputs, {block.entry: block.whole}, site.seed)
        return prove(block, whole.get(block.entry), generator)


def _compare(
    model: nn.Module, site: Site, rules: Sequence[Rule], reference: Any, proof: Proof, say: Callable[[str], None]
) -> Reparameterized:
    """Compare the outputs of the whole models; if they are not the same, do without the last rule that fused."""
    float32, float64 = _whole(model, site, rules, reference)
    if float32 <= MODEL_TOLERANCE or (float64 is not None and float64 <= MODEL_TOLERANCE_FLOAT64):
        return Reparameterized(site.model, replace(proof, float32=float32, float64=float64))
    # Anew, on the rules before it: a fusion cannot be taken back once the old modules are gone, and keeping these
    # for the rare model that needs it would cost the memory of a whole training form.
    fusing = {block.rule for block in proof.fused}
    last = max(index for index, rule in enumerate(rules) if rule.name in fusing)
    name = rules[last].name
    say(f"reparameterize: the outputs of the whole models differ, trying without {name}")
    differ = (
        f"differ by a relative L2 of {float32:.1e} in float32 (at most {MODEL_TOLERANCE:.0e})"
        if math.isfinite(float32)
        else "are missing, not finite, or of another shape"
    )
    reason = f"rolled back: the block holds alone, but with {name} the outputs of the whole model {differ}"
    undone = [NotFused(block.path, name, reason, block.errors) for block in proof.fused if block.rule == name]
    tried = {rule.name for rule in rules[:last]}
    others = [entry for entry in proof.not_fused if entry.rule not in tried]
    less = _reparameterize(model, site.inputs, rules[:last], site.seed, say, site.shared)
    return replace(less, proof=replace(less.proof, not_fused=[*undone, *less.proof.not_fused, *others]))


def _whole(model: nn.Module, site: Site, rules: Sequence[Rule], reference: Any) -> tuple[float, float | None]:
    """The distance of the whole models in float32, and in float64 where float32 leaves a doubt."""
    try:
        float32 = distance(reference, site.outputs)
    except Exception:  # it ran when the last block went in, but a guest may count its calls
        return math.inf, None
    # Rounding that the model itself amplifies, or a real difference? float64 tells. It is slow, so only in doubt.
    return float32, None if float32 <= MODEL_TOLERANCE else _distance64(model, site, rules)


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
    except Exception:  # in float64 a guest may fail in any way
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
