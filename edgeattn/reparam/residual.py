"""Rule ``residual``: RepMixer's residual branch becomes one depthwise convolution."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from edgeattn.models.layers.repmixer import RepMixer
from edgeattn.reparam.block import Block, Rule, Site
from edgeattn.reparam.fold import batch_norm_affine, diagonal
from edgeattn.reparam.multi_branch import convolution, kernel_of


def _fuse(module: nn.Module) -> nn.Module:
    assert isinstance(module, RepMixer)
    weight, bias, groups = kernel_of(module.mixer)
    scale, shift = batch_norm_affine(module.norm)
    gamma = module.scale.flatten()
    kernel = tuple(weight.shape[2:])
    weight = weight * gamma.reshape(-1, 1, 1, 1) + diagonal(1 - gamma * scale, groups, kernel)
    return convolution(weight, gamma * (bias - shift), groups, stride=1)


def propose(site: Site) -> Iterator[Block]:
    """Every RepMixer of the model.

    Given:
        y = x + ls (mixer(x) - norm(x)), mixer depthwise, norm a batch norm
    Result:
        y = conv(x), depthwise with bias: W = I + ls (Wm - Wn), b = ls (bm - bn).

    Source: FastViT, arXiv 2303.14189, section 3.2.
    """
    for module, path in site.paths.items():
        if isinstance(module, RepMixer):
            yield Block(
                path=path,
                rule="residual",
                modules=(path,),
                entry=module,
                before=module,
                fuse=_fuse,
                pairs=lambda fused, old=module: [(old, fused)],  # type: ignore[misc]
                crop=lambda x: x.ndim - 3,
            )


RULE = Rule("residual", propose)
