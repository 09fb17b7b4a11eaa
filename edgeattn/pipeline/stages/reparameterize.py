"""Reparameterize: training form -> deploy form, every fused block proven."""

from __future__ import annotations

from typing import Any

import torch

from edgeattn import targets
from edgeattn.models.build import Built
from edgeattn.pipeline.context import Context
from edgeattn.reparam import reparameterize
from edgeattn.reparam.engine import RULES

#: Tokens of the forward that shows what reaches each module of a decoder.
EXAMPLE = 64


def run(context: Context) -> dict[str, Any]:
    """Leave the deploy form in memory; fact: the proof."""
    built: Built = context.value("build")
    if context.job.steps:
        from edgeattn.pipeline.decoding.samples import Text

        ids = Text.load(context.results["reference"].folder).ids[None, :EXAMPLE]
        inputs: tuple[torch.Tensor, ...] = (torch.from_numpy(ids.copy()),)
    else:
        inputs = tuple(torch.from_numpy(value) for value in context.golden()[0][0].values())

    def say(text: str) -> None:
        context.say(text.removeprefix("reparameterize: "))  # the stage's name is shown already

    leaves = targets.get(context.job.target).leaves
    rules = [rule for rule in RULES if rule.name not in leaves]
    seed = context.job.resolved.recipe.seed
    result = reparameterize(built.model, inputs, rules=rules, seed=seed, progress=say, shared=True)
    context.values["reparameterize"] = result.model
    del context.values["build"]  # the training form has done its part, and takes memory
    return {"proof": result.proof.to_dict(), "summary": result.proof.summary()}
