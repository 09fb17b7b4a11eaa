"""Rule ``conv_bn``: a batch norm goes into the convolution or linear layer in front of it, on any model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeattn.reparam.block import Block, Refused, Rule, Site
from edgeattn.reparam.flow import Fan, Step, consumers, passes, sequence, upstream, without_affine
from edgeattn.reparam.fold import (
    batch_norm_affine,
    channel_axis,
    fold_output_affine,
    is_batch_norm,
    is_layer,
    is_plain,
)
from edgeattn.reparam.proof import NotFused

NAME = "conv_bn"


def _block(site: Site, bn: _BatchNorm) -> Block:
    record = site.record
    site.once(bn)
    if bn.running_mean is None:
        raise Refused("it has no running statistics, so it normalises by the batch")
    call = record.calls_of(bn)[0]
    if len(call.inputs) != 1:
        raise Refused("it was not called with one tensor")
    source, between = upstream(record, call.inputs[0], is_layer)
    layer = source.module
    assert is_layer(layer)
    site.once(layer)

    value, axis = source.outputs[0], channel_axis(layer, len(source.outputs[0].shape))
    for op in between:
        if consumers(record, value) != [op]:
            raise Refused(f"the output of {source.path} has other readers")
        value, axis = op.outputs[0], passes(op, axis)
    if axis != 1:
        raise Refused(f"it normalises axis 1, and the channels of {source.path} are on axis {axis}")
    if any(op.call is None or not op.call.within(call) for op in consumers(record, value)):
        raise Refused(f"the output of {source.path} has other readers")

    rest = [] if is_plain(bn) else list(without_affine(record, call))
    steps = [Step(op=op) for op in between]
    whole = any(step.shaped for step in steps)

    def fuse(fan: nn.Module) -> nn.Module:
        assert isinstance(fan, Fan)
        conv, (*steps_before, last) = fan.head, fan.links()[0]
        assert is_layer(conv)
        assert is_batch_norm(last)
        fold_output_affine(conv, *batch_norm_affine(last))
        # What follows the batch norm inside its module lives on in its place, so that no batch norm is exported.
        names = {id(module): name for name, module in bn.named_modules()}
        kept = sequence([last.get_submodule(names[id(module)]) for module in rest])
        return Fan(conv, [[*steps_before, kept]])

    def pairs(fused: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        assert isinstance(fused, Fan)
        return [(layer, fused.head), (bn, fused.links()[0][-1])]

    return Block(
        path=site.paths[layer],
        rule=NAME,
        modules=(site.paths[layer], site.paths[bn]),
        entry=layer,
        before=Fan(layer, [[*(step.module() for step in steps), bn]]),
        fuse=fuse,
        pairs=pairs,
        crop=lambda x: None if whole else channel_axis(layer, x.ndim),
    )


def propose(site: Site) -> Iterator[Block | NotFused]:
    """Every BatchNorm, subclasses included, that alone reads the output of one convolution or linear layer.

    Given:
        y = BN(conv(x)), possibly with views between; the batch norm may carry an activation (timm's BatchNormAct2d)
    Result:
        y = conv(x) with W' = diag(s) W, b' = s b + t, where s = g / sqrt(var + eps), t = beta - s mean. The batch norm
        is replaced by nn.Identity, or by the activation it carried.
    """
    if not any(is_batch_norm(module) for module in site.paths):
        return
    taken: set[nn.Module] = set()
    for module, path in site.paths.items():
        if not is_batch_norm(module):
            continue
        try:
            block = _block(site, module)
            if block.entry in taken:
                raise Refused(f"the output of {block.path} has other readers")
        except Refused as refusal:
            yield NotFused(path, NAME, str(refusal))
        else:
            taken.add(block.entry)
            yield block


RULE = Rule(NAME, propose)
