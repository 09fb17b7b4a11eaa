"""Rule ``mla``: latent attention from its expanded to its absorbed form, which reads latents and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from edgeattn.models.layers.mla import AbsorbedAttention, LatentAttention
from edgeattn.reparam.block import Block, Rule, Site
from edgeattn.reparam.proof import NotFused

NAME = "mla"


def _absorb(module: nn.Module) -> nn.Module:
    assert isinstance(module, LatentAttention)
    return AbsorbedAttention(module)


def propose(site: Site) -> Iterator[Block | NotFused]:
    """Every ``models.layers.mla.LatentAttention``.

    Given:
        softmax(q [W_uk c | k_rope]ᵀ) W_uv c, keys and values of every head computed from the latents c
    Result:
        W_uv (softmax([W_ukᵀ q_nope | q_rope] [c | k_rope]ᵀ) c): the same numbers, W_uk and W_uv stored apart. The
        module can take steps behind a cache of latents, with new tokens expanded or absorbed among themselves.
    """
    for module, path in site.paths.items():
        if isinstance(module, LatentAttention):
            yield Block(
                path=path,
                rule=NAME,
                modules=(path,),
                entry=module,
                before=module,
                fuse=_absorb,
                pairs=lambda absorbed, old=module: [(old, absorbed)],  # type: ignore[misc]
            )


RULE = Rule(NAME, propose)
