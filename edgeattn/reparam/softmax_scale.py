"""Rule ``softmax_scale``: the scale of attention logits goes into the projection of the queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from edgeattn.reparam.block import Block, Refused, Rule, Site
from edgeattn.reparam.fold import Layer, bias_of, fold_output_affine, is_layer
from edgeattn.reparam.proof import NotFused

NAME = "softmax_scale"
QUERIES = ("q", "to_q", "q_proj", "query", "wq")
PACKED = ("qkv", "to_qkv", "qkv_proj", "in_proj", "wqkv")


def _query(module: nn.Module) -> tuple[Layer, bool] | None:
    """The layer that projects the queries, and whether keys and values are packed behind them."""
    for names, packed in ((QUERIES, False), (PACKED, True)):
        for name in names:
            child = getattr(module, name, None)
            if isinstance(child, nn.Module):
                # A container counts if one layer is all that it computes (a conv whose batch norm is folded already).
                leaves = [m for m in child.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
                if len(leaves) == 1 and is_layer(leaves[0]):
                    return leaves[0], packed
    return None


def _fuse(module: nn.Module) -> nn.Module:
    found = _query(module)
    assert found is not None
    layer, packed = found
    scale = bias_of(layer).new_ones(len(bias_of(layer)))
    if packed and len(scale) % 3:
        raise Refused("the packed projection is not three times as wide as the queries")
    if "weight" not in layer._parameters:
        raise Refused("the weight of the query projection is computed (a parametrization)")
    scale[: len(scale) // 3 if packed else None] = cast(float, module.scale)
    had_bias = layer.bias is not None
    fold_output_affine(layer, scale, scale.new_zeros(len(scale)))
    if not had_bias:
        layer.bias = None
    setattr(module, "scale", 1.0)  # noqa: B010 (nn.Module types its attributes as tensors)
    return module


def propose(site: Site) -> Iterator[Block | NotFused]:
    """Every module with a float ``scale`` other than 1 and a child that projects the queries.

    Given:
        softmax(scale (W_q x + b_q) k^T) v, W_q alone (``q``, ``to_q``, ``q_proj``, ``query``, ``wq``) or first in a
        packed projection (``qkv`` and the like)
    Result:
        softmax((W_q' x + b_q') k^T) v with W_q' = scale W_q, b_q' = scale b_q, and ``scale`` = 1.0.

    Whether the module uses ``scale`` this way cannot be read off its attributes: the measured proof decides, and a
    module that scales otherwise is rolled back. What the proof of the module cannot see is who else uses the
    projection: such a module is refused.
    """
    for module, path in site.paths.items():
        scale = getattr(module, "scale", None)
        found = _query(module) if isinstance(scale, float) and scale != 1.0 else None
        if found is None:
            continue
        try:
            calls = site.record.calls_of(module)
            if calls:  # else the proof says that there are none
                site.alone(found[0], calls)
        except Refused as refusal:
            yield NotFused(path, NAME, str(refusal))
        else:
            yield Block(
                path=path,
                rule=NAME,
                modules=(path,),
                entry=module,
                before=module,
                fuse=_fuse,
                pairs=lambda fused, old=module: [(old, fused)],  # type: ignore[misc]
            )


RULE = Rule(NAME, propose)
